"""Figures and tables.

Input: records, images and numbers. Output: plots, sheets and Markdown; tables and plots follow from records alone.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["plots"],
    submod_attrs={
        "tables": [
            "CLASSIFIERS", "EFFECTS", "HEADLINES", "absent", "as_tables", "by_strength", "check_figures", "drawings",
            "intervals", "load_all", "table", "tradeoff", "update_pages", "write_tables",
        ],
    },
)  # fmt: skip
