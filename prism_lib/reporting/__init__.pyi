"""The public names of `prism_lib.reporting`, by the module that defines them."""

from . import plots as plots
from .tables import CLASSIFIERS as CLASSIFIERS
from .tables import EFFECTS as EFFECTS
from .tables import HEADLINES as HEADLINES
from .tables import absent as absent
from .tables import as_tables as as_tables
from .tables import by_strength as by_strength
from .tables import check_figures as check_figures
from .tables import drawings as drawings
from .tables import intervals as intervals
from .tables import load_all as load_all
from .tables import table as table
from .tables import tradeoff as tradeoff
from .tables import update_pages as update_pages
from .tables import write_tables as write_tables
