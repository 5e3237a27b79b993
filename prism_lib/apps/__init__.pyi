"""The public names of `prism_lib.apps`, by the module that defines them."""

from .bulk import files as files
from .bulk import generate as generate
from .bulk_plan import BulkConfig as BulkConfig
from .explorer import explore as explore
from .recipe import Recipe as Recipe
from .session import Session as Session
