"""Data sets on disk.

Tables, films and DICOMs of any source enter; a folder in the Hugging Face imagefolder convention leaves, split by
patient. Readers of that folder live here too, and say which rows an edit suits.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={})
