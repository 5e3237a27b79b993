"""Networks: load, build, call.

A name, a folder or a hub id enters; a `StableDiffusionPipeline`, a classifier or an image-text model leaves. Nothing
else in the library loads weights.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={})
