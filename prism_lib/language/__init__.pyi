"""The public names of `prism_lib.language`, by the module that defines them."""

from .captions import caption as caption
from .captions import corpus as corpus
from .captions import unseen_words as unseen_words
from .edits import Edit as Edit
from .edits import PromptPair as PromptPair
from .labels import DEVICE_KINDS as DEVICE_KINDS
from .labels import Vocabulary as Vocabulary
from .labels import snake_case as snake_case
from .labels import vocabulary as vocabulary
