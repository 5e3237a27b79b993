"""Sphinx's settings for the book; `docs/book.py` lays out its sources."""

import re

from sphinx.application import Sphinx

import prism_lib

project = "PRISM"
author = "PRISM contributors"
version = release = prism_lib.__version__
html_title = "PRISM: counterfactuals of medical images"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_design"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

nb_execution_mode = "off"  # `make figures` ran them
nb_merge_streams = True
myst_enable_extensions = ["html_image", "colon_fence"]
myst_heading_anchors = 4

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
suppress_warnings = ["misc.highlighting_failure"]  # a cell's `%magic` and a cut traceback are no Python


def plain_bars(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Docstrings are Markdown: |a - b| is a distance, and no substitution of reStructuredText."""
    lines[:] = [re.sub(r"\|(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\|", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Let Sphinx call `plain_bars` on every docstring."""
    app.connect("autodoc-process-docstring", plain_bars)
