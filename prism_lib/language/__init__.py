"""The names of findings and the wording of captions and edits.

Input: labels, phrases and sentences. Output: captions, prompt pairs and edits. Nothing here needs a model or an image.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
