"""Counterfactuals: abduction (`invert`), action (a pair of prompts), prediction (`edit`, `sweep`).

A pipeline, images and prompt pairs enter; edited images with masks and scores leave. Pixels outside the mask are the
input's own. How strongly and how long an edit acts is recommended by the model and can be overridden.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "counterfactuals": ["Counterfactual", "edit", "stack", "sweep"],
        "inversion": ["Inversion", "invert"],
        "methods": ["METHODS", "RECOMMENDED", "InversionConfig"],
        "settings": ["EditConfig", "grid", "recommended"],
    },
)
