"""Loading, building and calling of networks.

Input: a name, a folder or a hub id. Output: a pipeline, a classifier or an image-text model. No other room loads them.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
