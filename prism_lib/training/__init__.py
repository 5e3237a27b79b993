"""Fine-tuning of the U-Net, and training of a small Stable Diffusion from scratch.

Input: a prepared folder and a configuration. Output: checkpoints and a pipeline folder. A run that resumes from a
checkpoint ends in bit-identical weights. The outputs of the frozen parts are computed once and cached.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
