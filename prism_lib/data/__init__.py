"""Data sets on disk.

Tables, films and DICOMs of any source enter; a folder in the Hugging Face imagefolder convention leaves, split by
patient. Readers of that folder live here too, and say which rows an edit suits.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={
        "any_table": ["Columns"],
        "folder": ["load_info", "load_table", "read_images", "truth_is_known"],
        "preparation": ["PrepareConfig", "prepare"],
        "rows": ["edit_examples", "editable", "label_counts", "marker_masks", "prompt_pairs", "sample_captions", "true_counterfactual"],
        "uploads": ["UploadError", "read_file", "read_upload"],
    },
)
