"""Fine-tuning of the U-Net, and a small Stable Diffusion from nothing.

A prepared folder and a configuration enter; checkpoints that resume to the bit and a pipeline folder leave.
Everything that the frozen parts compute is computed once.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={})
