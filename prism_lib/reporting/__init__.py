"""Figures and tables.

Input: records, images and numbers. Output: plots, sheets and Markdown; tables and plots follow from records alone.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
