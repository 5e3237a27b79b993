"""A chest phantom whose counterfactuals are exact.

A seed and attributes enter; images, true counterfactuals and masks of what had to change leave. It is a small
structural causal model: keep the noise, change an attribute, render again.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "films": ["Rendered", "with_devices"],
        "patients": ["Patients", "counterfactual", "marker_mask", "render", "sample_patients"],
    },
)
