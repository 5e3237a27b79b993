"""Figures and tables.

Input: records, images and numbers. Output: plots, sheets and Markdown; tables and plots follow from records alone.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["plots"],
    submod_attrs={
        "pages": ["check_figures", "update_pages"],
        "tables": [
            "CLASSIFIERS", "HEADLINES", "absent", "as_tables", "by_strength", "drawings", "intervals", "load_all",
            "table", "tradeoff", "write_tables",
        ],
    },
)  # fmt: skip
