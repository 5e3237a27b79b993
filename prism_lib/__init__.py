"""PRISM: language-guided counterfactuals of medical images, measured against a known truth.

The notebooks choose, call and show; the modules here hold the logic. Import the module you need (`from
prism_lib import phantom, editing`): nothing is imported at start-up, so that the `prism` command is quick.
"""

__version__ = "0.1.0"
