"""The programs that users start: the command line, bulk generation and the explorer.

Input: profiles, files of edits, and clicks. Output: runs, manifests and recipes. No editing method is defined here.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
