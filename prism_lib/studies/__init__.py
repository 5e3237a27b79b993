"""The experiments of the paper.

Input: editors (methods behind one call), prepared folders and budgets. Output: comparisons, ablations and trained
classifiers. An interrupted study resumes where it stopped.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
