"""What people start: the command line, bulk generation, the explorer.

Profiles, files of edits and clicks enter. Runs, manifests and recipes leave. No method is defined here.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "bulk": ["files", "generate"],
        "bulk_plan": ["BulkConfig"],
        "explorer": ["explore"],
        "recipe": ["Recipe"],
        "session": ["Session"],
    },
)
