"""What to prepare and how: one frozen configuration, checked when it is made, and the source that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prism_lib.data import any_table
from prism_lib.data.chest import CHEXPERT_VIEWS, chexpert_source, nih_source
from prism_lib.data.folder import SPLITS
from prism_lib.data.images import FITS, ImageFiles, MODES
from prism_lib.data.skin import skin_source
from prism_lib.data.sources import Source, phantom_source
from prism_lib.language.labels import vocabulary

UNCERTAIN_POLICIES = {"ignore": -1.0, "zeros": 0.0, "ones": 1.0}
BLANK_POLICIES = {"ignore": float("nan"), "zeros": 0.0}
DUPLICATES = ("reject", "keep")
Policy = str | Mapping[str, str]


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare and how.

    Args:
        dataset: "phantom"; "chexpert", "nih"; "isic2019", "isic2020", "ham10000"; "table" (any images with a table);
            "dicom" (the same with DICOM files). All but the phantom lie below `data_root`.
        output: the prepared folder; an existing one is reused if it was made with the same configuration.
        num_images: how many phantoms; of real images at most as many, drawn by patient.
        split: shares of the patients for train, val and test. CheXpert with a share of 0 for test has its published
            validation set as the test split; otherwise that set is left out. Splits that a table gives are kept.
        confounding: how strongly devices follow disease in the phantom, in [0, 1].
        vocabulary: whose labels captions speak of, "chest", "phantom" or "skin"; all label columns are kept.
        explicit_share: share of captions in the explicit template, which edits use.
        uncertain: what -1 becomes: "ignore" leaves it (never said, never learnt), "zeros", "ones"; for all labels, or
            by label, where the key "*" is every other label.
        blank: what a label that is not mentioned becomes: "ignore" leaves it, "zeros"; for all labels or by label.
        fit: "letterbox" keeps the whole image and pads, "crop" keeps its centre.
        max_rejected: the greatest share of files that may be unusable.
        mode: "L" (gray) or "RGB"; empty is the data set's own, which only "table" does not have.
        max_upscale: how many times an image smaller than `size` may be enlarged.
        view: of CheXpert: "frontal", "lateral" or "all".
        table: the table's file name for "table" and "dicom".
        columns: for the same two, which of its columns are labels and which else are copied.
        duplicates: what happens to an image with the same pixels as one of another split: "reject" keeps the one in
            test, else in val; "keep" keeps both. Within a split both are kept.
        processes: how many read and write; the result does not depend on it.
    """

    dataset: str
    output: Path
    data_root: Path | None = None
    size: int = 256
    num_images: int = 1000
    seed: int = 0
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    confounding: float = 0.0
    vocabulary: str = "chest"
    explicit_share: float = 0.5
    uncertain: Policy = "ignore"
    fit: str = "letterbox"
    max_rejected: float = 0.0
    blank: Policy = "ignore"
    mode: str = ""
    max_upscale: float = 1.0
    view: str = "frontal"
    table: str = "metadata.csv"
    columns: any_table.Columns = field(default_factory=any_table.Columns)
    duplicates: str = "reject"
    processes: int = 1

    def __post_init__(self) -> None:
        known: dict[str, Iterable[str]] = {"dataset": SOURCES, "fit": FITS, "mode": ("", *MODES)}
        known |= {"view": CHEXPERT_VIEWS, "duplicates": DUPLICATES}
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(filter(None, allowed))}")
        for name, policies in (("uncertain", UNCERTAIN_POLICIES), ("blank", BLANK_POLICIES)):
            for label, policy in by_label(getattr(self, name)).items():
                if policy not in policies:
                    of = "" if label == "*" else f" of {label!r}"
                    raise ValueError(f"unknown {name} {policy!r}{of}; known: {', '.join(policies)}")
        for name in ("confounding", "explicit_share", "max_rejected"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1]")
        if len(self.split) != len(SPLITS) or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split is {self.split}; expected shares of {', '.join(SPLITS)} that sum to 1")
        if self.num_images < 1 or self.size < 32:
            raise ValueError(f"need num_images >= 1 and size >= 32, got {self.num_images} and {self.size}")
        if self.processes < 1 or self.max_upscale < 1:
            raise ValueError(f"need processes >= 1 and max_upscale >= 1, got {self.processes} and {self.max_upscale}")
        vocabulary(self.vocabulary)
        _mode(self)


def by_label(policy: Policy) -> dict[str, str]:
    """{label: policy}, with "*" for all others; "ignore" where nothing is said."""
    return {"*": "ignore"} | ({"*": policy} if isinstance(policy, str) else dict(policy))


def settings(config: PrepareConfig) -> dict[str, Any]:
    """What the content depends on, as JSON: all but where it is written."""
    values = asdict(config)
    del values["output"], values["processes"]
    root = config.data_root
    return values | {
        "split": list(config.split),
        "columns": {name: list(columns) for name, columns in values["columns"].items()},
        "data_root": None if root is None or config.dataset == "phantom" else str(Path(root).resolve()),
    }


SOURCES: dict[str, Callable[[PrepareConfig], Source]] = {
    "phantom": lambda c: phantom_source(c.num_images, c.seed, c.confounding, c.size),
    "chexpert": lambda c: chexpert_source(
        _data_root(c), c.num_images, c.seed, _reader(c), view=c.view, test=c.split[SPLITS.index("test")] == 0
    ),
    "nih": lambda c: nih_source(_data_root(c), c.num_images, c.seed, _reader(c)),
    "isic2019": lambda c: skin_source("isic2019", _data_root(c), c.num_images, c.seed, _reader(c)),
    "isic2020": lambda c: skin_source("isic2020", _data_root(c), c.num_images, c.seed, _reader(c)),
    "ham10000": lambda c: skin_source("ham10000", _data_root(c), c.num_images, c.seed, _reader(c)),
    "table": lambda c: _table_source(c),
    "dicom": lambda c: _table_source(c),
}
_COLOUR = ("isic2019", "isic2020", "ham10000")


def _mode(config: PrepareConfig) -> str:
    """Gray or colour, as the data set is; only the images of a table may be either."""
    if config.dataset == "table":
        if not config.mode:
            raise ValueError(f"dataset 'table' needs a mode: {' or '.join(MODES)}")
        return config.mode
    own = "RGB" if config.dataset in _COLOUR else "L"
    if config.mode not in ("", own):
        raise ValueError(f"mode of dataset {config.dataset!r} is {own!r}, not {config.mode!r}")
    return own


def _reader(config: PrepareConfig) -> ImageFiles:
    header = config.columns.header if config.dataset == "dicom" else None
    return ImageFiles(config.size, config.fit, _mode(config), config.max_upscale, header)


def _table_source(config: PrepareConfig) -> Source:
    root, vocab = _data_root(config), vocabulary(config.vocabulary)
    if config.columns.header and config.dataset != "dicom":
        raise ValueError("header fields can be copied from the dataset 'dicom' only")
    return any_table.table_source(
        root, config.table, config.num_images, config.seed, _reader(config), config.columns, vocab
    )


def _data_root(config: PrepareConfig) -> Path:
    if config.data_root is None:
        raise ValueError(f"dataset {config.dataset!r} needs a data_root: the folder with its table and images")
    root = Path(config.data_root)
    if Path(config.output).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"output {config.output} lies inside the data root {root}, where images are searched")
    return root
