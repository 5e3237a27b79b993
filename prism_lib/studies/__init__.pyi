"""The public names of `prism_lib.studies`, by the module that defines them."""

from .comparison import ComparisonConfig as ComparisonConfig
from .comparison import compare_methods as compare_methods
from .comparison import vary as vary
from .editors import Edict as Edict
from .editors import Imagic as Imagic
from .editors import LEdits as LEdits
from .editors import PromptToPrompt as PromptToPrompt
from .editors import SDEdit as SDEdit
from .editors import TwoMasks as TwoMasks
from .explanations import attention_maps as attention_maps
from .explanations import mask_regions as mask_regions
from .explanations import region_statistics as region_statistics
from .explanations import save_transition as save_transition
from .ganterfactual import GanConfig as GanConfig
from .ganterfactual import Ganterfactual as Ganterfactual
from .ganterfactual import train_gan as train_gan
from .shortcut import ShortcutConfig as ShortcutConfig
from .tuning import TuningConfig as TuningConfig
from .tuning import find_settings as find_settings
