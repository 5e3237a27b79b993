"""Counterfactuals in three steps: abduction (`invert`), action (a pair of prompts), prediction (`edit`, `sweep`).

Input: a pipeline, images and prompt pairs. Output: edited images with masks and scores. Pixels outside the mask equal
those of the input. The strength and the duration of an edit are settings; their defaults are stored with the model.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
