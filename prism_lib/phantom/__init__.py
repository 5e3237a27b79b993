"""A chest phantom whose counterfactuals are exact.

Input: a seed and attributes. Output: images, true counterfactuals and masks of the pixels that had to change. The
phantom is a small structural causal model. A counterfactual keeps the noise, changes an attribute, is rendered again.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
