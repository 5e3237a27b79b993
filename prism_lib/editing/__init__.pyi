"""The public names of `prism_lib.editing`, by the module that defines them."""

from .counterfactuals import Counterfactual as Counterfactual
from .counterfactuals import edit as edit
from .counterfactuals import stack as stack
from .counterfactuals import sweep as sweep
from .inversion import Inversion as Inversion
from .inversion import invert as invert
from .methods import METHODS as METHODS
from .methods import RECOMMENDED as RECOMMENDED
from .methods import InversionConfig as InversionConfig
from .settings import EditConfig as EditConfig
from .settings import grid as grid
from .settings import recommended as recommended
