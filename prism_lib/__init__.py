"""PRISM: language-guided counterfactuals of medical images, measured against a known truth.

The notebooks choose, call and show; the rooms here hold the logic (docs/architecture.md). Import from a room (`from
prism_lib.editing import edit, invert`): nothing is imported at start-up, so that the `prism` command is quick.
"""

import os

# Threads of OpenMP that wait by spinning halve every other program on the machine; it must be said before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
