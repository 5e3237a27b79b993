"""The experiments of the paper.

Editors, prepared folders and budgets enter; comparisons, ablations and trained classifiers leave. Each one resumes
where it was interrupted.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={})
