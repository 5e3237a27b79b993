"""Data sets on disk. Tables and images of any source enter; a folder in the imagefolder convention leaves.

Its rows are split by patient. Its readers are here too, and find the rows that an edit suits.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "any_table": ["Columns"],
        "folder": ["load_info", "load_table", "read_images", "truth_is_known"],
        "preparation": ["PrepareConfig", "prepare"],
        "rows": ["edit_examples", "editable", "label_counts", "prompt_pairs", "true_counterfactual"],
        "uploads": ["UploadError", "read_file", "read_upload"],
    },
)
