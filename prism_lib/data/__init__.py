"""Preparation and reading of data sets on disk.

Input: tables and images of any source. Output: a prepared folder in the imagefolder convention, with rows split by
patient. The functions that read this folder, and select the rows to which an edit applies, are here as well.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "folder": ["load_info", "load_table", "load_vocabulary", "read_images", "truth_is_known"],
        "full_size": ["put_back", "put_back_file"],
        "preparation": ["PrepareConfig", "caption_tokenizer", "prepare"],
        "rows": ["edit_examples", "editable", "label_counts", "prompt_pairs", "sample_captions", "true_counterfactual"],
        "tables": ["Columns"],
        "uploads": ["read_file", "read_upload"],
    },
)
