"""Counterfactuals: abduction, action, prediction.

A pipeline, images and prompt pairs enter; edited images with masks and scores leave. Pixels outside the mask are the
input's own.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={})
