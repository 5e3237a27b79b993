"""Measurement of edits.

Input: prepared folders, edits and a judge. Output: tables of numbers with intervals. The judge is a classifier that
only reads edits; it does not guide or select them.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
