"""What an edit is worth.

Prepared folders, edits and a judge enter; tables of numbers with intervals leave. The judge reads and never guides.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={})
