"""Preparation and reading of data sets on disk.

Input: tables and images of any source. Output: a prepared folder in the imagefolder convention, with rows split by
patient. The functions that read this folder, and select the rows to which an edit applies, are here as well.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
