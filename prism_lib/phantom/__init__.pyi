"""The public names of `prism_lib.phantom`, by the module that defines them."""

from .films import Rendered as Rendered
from .films import with_devices as with_devices
from .patients import Patients as Patients
from .patients import counterfactual as counterfactual
from .patients import marker_mask as marker_mask
from .patients import render as render
from .patients import sample_patients as sample_patients
