"""PRISM: language-guided counterfactuals of medical images, measured against a known truth.

The notebooks call this library and show the results. Its ten subpackages are called rooms (docs/architecture.md).
Import from a room (`from prism_lib.editing import edit, invert`). Nothing is imported at start-up: `prism` is quick.
"""

import logging
import os
import sys

# Threads of OpenMP that wait by spinning halve the speed of every other program on the machine. OpenMP reads the
# variable when torch is loaded, so it is set too late where that has happened; `prism doctor` reports it.
SET_TOO_LATE = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Images are prepared here, so the lack of torchvision is no news; transformers warns about it in every notebook.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda record: "torchvision" not in record.getMessage())

__version__ = "0.1.0"
