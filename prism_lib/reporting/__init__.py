"""Figures and tables.

Records, images and numbers enter; plots, sheets and Markdown leave. Everything is redrawn from records alone.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, submod_attrs={})
