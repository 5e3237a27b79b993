"""The named folders, each an absolute path, so that no code depends on the working directory.

`PRISM_DATA`, `PRISM_RUNS` and `PRISM_WEIGHTS` replace three of them; the defaults lie inside the checkout.
"""

import os
import re
from pathlib import Path

SHIPPED, FILMS = "phantom-sd", "film-sd"  # pipelines below `weights`, of phantoms and of films
_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The checkout; the current folder where the package was installed without one."""
    checkout = _PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def _from_environment(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser().resolve() if value else default


def data() -> Path:
    """Where data sets lie: `PRISM_DATA`, else `data/`."""
    return _from_environment("PRISM_DATA", root() / "data")


def runs() -> Path:
    """Where runs write, a folder each: `PRISM_RUNS`, else `runs/`."""
    return _from_environment("PRISM_RUNS", root() / "runs")


def weights() -> Path:
    """Where named pipelines lie: `PRISM_WEIGHTS`, else those shipped with the package."""
    return _from_environment("PRISM_WEIGHTS", _PACKAGE / "weights")


def notebooks() -> Path:
    """The numbered notebooks."""
    return root() / "notebooks"


def figures(dataset: str, figures_dir: str | os.PathLike[str] = "") -> Path:
    """Where figures and records go: `figures_dir` where given, else `figures/<dataset>/`."""
    if figures_dir:
        return Path(figures_dir).expanduser().resolve()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", dataset):
        raise ValueError(f"dataset {dataset!r} cannot name a folder: letters, digits, '-', '_' and '.' only")
    return root() / "figures" / dataset
