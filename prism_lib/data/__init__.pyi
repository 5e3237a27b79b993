"""The public names of `prism_lib.data`, by the module that defines them."""

from .folder import load_info as load_info
from .folder import load_table as load_table
from .folder import load_vocabulary as load_vocabulary
from .folder import read_images as read_images
from .folder import truth_is_known as truth_is_known
from .full_size import put_back as put_back
from .full_size import put_back_file as put_back_file
from .preparation import PrepareConfig as PrepareConfig
from .preparation import caption_tokenizer as caption_tokenizer
from .preparation import prepare as prepare
from .rows import edit_examples as edit_examples
from .rows import editable as editable
from .rows import label_counts as label_counts
from .rows import prompt_pairs as prompt_pairs
from .rows import sample_captions as sample_captions
from .rows import true_counterfactual as true_counterfactual
from .tables import Columns as Columns
from .uploads import read_file as read_file
from .uploads import read_upload as read_upload
