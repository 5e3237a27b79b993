"""What a bulk run has to make: a file of edits (docs/your-data.md) and a prepared folder become tasks, all checked."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from pydantic import Field
from pydicom.datadict import tag_for_keyword

from prism_lib import paths
from prism_lib.apps.profiles import coerce
from prism_lib.configs import checked
from prism_lib.data.dicom import is_dicom
from prism_lib.data.folder import load_info, load_table, load_vocabulary
from prism_lib.data.rows import lacks
from prism_lib.data.tables import found, images_below
from prism_lib.editing.methods import RECOMMENDED, method_of
from prism_lib.editing.settings import EditConfig, grid
from prism_lib.evaluation import selection
from prism_lib.evaluation.selection import Criteria
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.language.labels import Labels, Vocabulary
from prism_lib.paths import SHIPPED

ALL = "all"
MANIFEST, REJECTS = "metadata.csv", "rejected.csv"  # what a run leaves
MOST_CANDIDATES = 256
_AREAS = ("mask", "keep")  # where the edit may show, and what stays the input's (`edit`)
_WHAT = ("file_name", "edit", "source", "target", "words", *_AREAS)
# Settings of single edits; `batch_size` is the run's, so that no row's result depends on its neighbours.
_EDIT = {name: value for name, value in asdict(EditConfig()).items() if name not in ("mask", "batch_size")}
_EDIT["protect_text"] = None  # a bool or a word

Row = Mapping[str, Any]  # of the file of edits, or of the folder's table
Values = Annotated[list[Any], Field(min_length=1)]
Bound = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@checked(kw_only=True)
class Choice:
    """How the result of a row is chosen among candidates: the best of those that pass. The judge never scores."""

    sweep: dict[str, Values] = field(default_factory=dict, hash=False)  # values to try by field of `EditConfig`
    guide: str = ""  # a classifier below PRISM_WEIGHTS
    similarity: str = ""  # a CLIP or SigLIP model: a hub id, or a folder, also below PRISM_RUNS or PRISM_WEIGHTS
    best: str = ""  # the score to maximise; "" for `guide_gain`, or for `directional` without a guide
    at_least: dict[str, Bound] = field(default_factory=dict, hash=False)  # bounds by score
    at_most: dict[str, Bound] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.sweep) - set(_EDIT)):
            raise ValueError(f"sweep: unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(_EDIT)}")
        if not (self.best or self.guide or self.similarity):
            raise ValueError("a sweep needs a guide or a similarity to choose by, or best, the score to maximise")
        takers = {"a guide": selection.GUIDE, "a similarity": selection.SIMILARITY}
        known = (*selection.EDIT, *selection.IDENTITY)
        known += (*(selection.GUIDE if self.guide else ()), *(selection.SIMILARITY if self.similarity else ()))
        for score in (self.criteria.best, *self.at_least, *self.at_most):
            if score not in known:
                hint = "".join(f" (it takes {what})" for what, names in takers.items() if score in names)
                raise ValueError(f"unknown score {score!r}{hint}; known: {', '.join(known)}")

    @property
    def criteria(self) -> Criteria:
        return Criteria(self.best or ("guide_gain" if self.guide else "directional"), self.at_least, self.at_most)


_CHOICE = tuple(item.name for item in fields(Choice))
_ROW = ("method", "num_inference_steps", "seed", *_CHOICE)  # settings of a run that a row may replace


@checked()
class BulkConfig(Choice):
    """A bulk run: every task of `edits` on the images in `data`, into `out`; rows may have settings of their own."""

    data: str  # a prepared folder
    edits: str
    out: str
    split: str = ""  # "" for all
    model: str = SHIPPED
    method: str = RECOMMENDED
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    edit: dict[str, Any] = field(default_factory=dict, hash=False)  # fields of `EditConfig`
    seed: int = 0
    batch_size: Annotated[int, Field(ge=1)] = 4
    precision: Literal["no", "bf16", "fp16"] = "no"
    bits: Literal[8, 16] = 8  # with 16, an 8-bit input's pixels v become 257 v
    out_format: Literal["PNG", "DICOM"] = "PNG"  # a DICOM is a Secondary Capture without the patient
    header: tuple[str, ...] = ()  # fields that it copies from the film's own DICOM, by keyword
    full_size: bool = False  # also put every edit back into the film that its image was made of (`data.full_size`)
    threads: Annotated[int, Field(ge=0)] = 1  # CPU threads of each process, 0 for torch's choice

    def __post_init__(self) -> None:
        method_of(self.method)
        EditConfig(**self.edit)
        if self.header and self.out_format == "PNG":
            raise ValueError("header fields can be copied with out_format DICOM only")
        if wrong := [keyword for keyword in self.header if tag_for_keyword(keyword) is None]:
            raise ValueError(f"header field {wrong[0]!r} is no keyword of DICOM's dictionary (one is 'PatientAge')")


@dataclass(frozen=True)
class Settings:
    """How a task is edited; tasks share a batch only with equal settings."""

    method: str
    num_inference_steps: int
    edit: Mapping[str, Any] = field(hash=False)  # replaces what the model recommends
    seed: int | None = None
    choice: Choice | None = None

    @property
    def candidates(self) -> list[dict[str, Any]]:
        return [dict(one) for one in grid(self.edit, **(self.choice.sweep if self.choice else {}))]

    @property
    def text(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None}, sort_keys=True)


@dataclass(frozen=True)
class Task:
    """One counterfactual to make: an image, its edit and prompts, and what the result's labels are."""

    file_name: str
    edit: Edit
    pair: PromptPair
    settings: Settings
    about: Mapping[str, Any]  # patient, split, labels of the counterfactual and the edit's note, for the manifest
    film: str = field(default="", kw_only=True)  # the file that the image was made of, where it is needed
    areas: Mapping[str, str] = field(default_factory=dict, hash=False, kw_only=True)  # the row's own mask and keep
    row: int  # of the file of edits, from 1
    output: str = ""  # the path below `out`, "" until the model is known


def configured(config: BulkConfig, given: Iterable[tuple[str, Any]]) -> BulkConfig:
    """The configuration with other values, which may be text, for its fields or for those of `EditConfig`."""
    own = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "edit"}
    changed: dict[str, Any] = {}
    edit = dict(config.edit)
    for name, value in given:
        if name in own:
            changed[name] = coerce(name, value, own[name])
        elif name in _EDIT:
            edit[name] = coerce(name, value, _EDIT[name])
        else:
            raise ValueError(f"unknown setting {name!r}; known: {', '.join((*own, *_EDIT))}")
    return replace(config, **changed, edit=edit)


def plan(config: BulkConfig) -> list[Task]:
    """Every task, by row and then by image; the first thing that is wrong raises ValueError or FileNotFoundError."""
    info, table = load_info(config.data), load_table(config.data, config.split or None)
    vocab, rows = load_vocabulary(config.data), read_rows(config.edits)
    images = {row["file_name"]: cast(dict[str, Any], row) for row in table.to_dict("records")}
    tasks: dict[tuple[object, ...], Task] = {}
    for number, row in enumerate(rows, 1):
        try:
            for task in _tasks(number, row, config, images, info, vocab):
                tasks.setdefault((task.file_name, task.pair, task.settings.text, *task.areas.items()), task)
        except ValueError as error:
            raise ValueError(f"{config.edits}, row {number}: {error}") from None
    idle = [name for name in _CHOICE if getattr(config, name)]
    if idle and not any(task.settings.choice for task in tasks.values()):
        raise ValueError(f"{idle[0]} is given, but no sweep of candidates to choose from")
    names = dict.fromkeys(task.file_name for task in tasks.values())
    for name in names:
        if not (Path(config.data) / name).is_file():
            raise FileNotFoundError(f"{config.data} lacks {name}, which its metadata.csv lists")
    if not (config.full_size or config.header):
        return list(tasks.values())
    films = _films(config.data, info, table[table["file_name"].isin(names)])
    if config.header and (other := next((film for film in films.values() if not is_dicom(Path(film))), "")):
        raise ValueError(f"header: {other} is no DICOM, so there is no {config.header[0]} to copy")
    return [replace(task, film=films[task.file_name]) for task in tasks.values()]


def _films(folder: str, info: Mapping[str, Any], table: pd.DataFrame) -> dict[str, str]:
    """The file that each image of a prepared folder shows, whole and unchanged."""
    made = info["config"]
    if "source_file" not in table or made["fit"] != "letterbox":
        raise ValueError(f"full_size and header need the whole films, and {folder} was not made of such files")
    altered = table.get("rendered", pd.Series(False, table.index)) | table.get("copy", pd.Series(0, table.index)).ne(0)
    if altered.any():
        name = table.loc[altered, "file_name"].iloc[0]
        raise ValueError(f"full_size and header need films as they are; {name} has rendered devices or was moved")
    root, files = Path(made["data_root"]), table["source_file"]
    files = files.str.partition("/")[2] if info["source"] == "chexpert" else files  # without the archive's name
    anywhere = info["source"] in ("nih", "films", "padchest")
    table, missing = found(table, files, root, images_below(root) if anywhere else None)
    if missing:
        raise FileNotFoundError(f"full_size or header: {missing[0].file} {missing[0].reason}")
    return dict(zip(table["file_name"], table["path"], strict=True))


def batches(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Tasks of equal settings, with or without areas, in batches of `size`: they depend on the plan alone."""
    groups: dict[tuple[object, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.settings.text, *task.areas), []).append(task)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of edits, without empty cells; values of CSV are still text."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of edits {path}")
    readers: dict[str, Callable[[str], Any]] = {".csv": _read_csv, ".json": json.loads}
    readers |= dict.fromkeys((".yaml", ".yml"), yaml.safe_load)
    if path.suffix not in readers:
        raise ValueError(f"{path} is no file of edits: expected one of {', '.join(readers)}")
    try:
        rows = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
    except (ValueError, yaml.YAMLError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold rows of edits, a list of mappings, at least one")
    return [{str(key): value for key, value in row.items() if value not in ("", None)} for row in rows]


def _read_csv(text: str) -> list[dict[str, Any]]:
    lines = text.splitlines()
    separator = max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.DictReader(lines, strict=True, delimiter=separator)
    if twice := [name for name in reader.fieldnames or () if name and (reader.fieldnames or []).count(name) > 1]:
        raise ValueError(f"two columns are {twice[0]!r}")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the heading: put text with commas in quotes")
    return rows


@lru_cache(256)  # every mask of a large run would fill the memory
def region(given: str, size: int) -> np.ndarray:
    """The pixels (size, size), bool, of a box "x0,y0,x1,y1" or of an image below PRISM_DATA, white where it is true.

    A box is in fractions if no number exceeds 1, else in pixels, without its right and lower end.
    """
    try:
        box = [float(part) for part in given.split(",")]
    except ValueError:
        return _drawn(given, size)
    usable, scale = len(box) == 4 and np.isfinite(box).all(), size if max(box) <= 1 else 1
    left, top, right, bottom = (round(x * scale) for x in box) if usable else (0, 0, 0, 0)
    if not (0 <= left < right <= size and 0 <= top < bottom <= size):
        raise ValueError(f"{given!r} is no box x0,y0,x1,y1 in an image of {size} x {size} pixels")
    found = np.zeros((size, size), dtype=bool)
    found[top:bottom, left:right] = True
    return found


def _drawn(name: str, size: int) -> np.ndarray:
    root = paths.data().resolve()
    if not (path := (root / name).resolve()).is_relative_to(root):
        raise ValueError(f"{name} is outside of the data root, {root}")
    try:
        with Image.open(path) as file:
            found = np.asarray(file.convert("L")) > 127
    except OSError as error:
        raise ValueError(f"{path} is no image: {error.strerror or 'it cannot be decoded'}") from None
    if found.shape != (size, size):
        raise ValueError(f"{name} has {found.shape[1]} x {found.shape[0]} pixels, and the images {size} x {size}")
    if not found.any():
        raise ValueError(f"{name} is empty: no pixel is brighter than half")
    return found


def _areas(row: Row, size: int) -> dict[str, str]:
    """The row's own areas, as text; ValueError if they leave nothing to edit."""
    given = {name: row[name] for name in _AREAS if name in row}
    texts = {name: ",".join(map(str, area)) if isinstance(area, list) else str(area) for name, area in given.items()}
    pixels = {name: region(text, size) for name, text in texts.items()}
    if "keep" in pixels and not (pixels.get("mask", True) & ~pixels["keep"]).any():
        raise ValueError("mask and keep leave no pixel to edit" if "mask" in pixels else "keep leaves no pixel to edit")
    return texts


def _tasks(
    number: int, row: Row, config: BulkConfig, images: Mapping[str, Row], info: Mapping[str, Any], vocab: Vocabulary
) -> Iterator[Task]:
    settings, edit, labels = _settings(row, config), _edit(row, vocab), info["labels"]
    areas = _areas(row, info["config"]["size"])
    name = str(row.get("file_name", ALL))
    if name != ALL and name not in images:
        raise ValueError(f"file_name {name!r} is not in {config.data}")
    if settings.choice is not None and settings.choice.guide and not edit.attributes:
        raise ValueError(f"a guide reads labels, and the edit {edit.key} names none")
    edit.prompts({}, vocab)  # names and words are checked even where the edit applies to no image
    found = False
    for file_name in [name] if name != ALL else images:
        image = images[file_name]
        known = {label: image[label] for label in labels}
        try:
            edit = _edit(row, vocab, known)  # "everything" is another thing in every image
            pair = edit.prompts(known, vocab)
        except ValueError:
            if name != ALL:
                raise
            continue  # of all images, those that the edit applies to
        if name == ALL and any(lacks(image, one, vocab.owners.get(one, one)) for one in edit.remove):
            continue
        found = True
        about = {"patient_id": image["patient_id"], "split": image["split"], "note": edit.note}
        about |= edit.apply(known, vocab) | areas
        yield Task(file_name, edit, pair, settings, about, number, areas=areas)
    if not found:
        raise ValueError(f"edit {edit.key} applies to none of the {len(images)} images in {config.data}")


def _edit(row: Row, vocab: Vocabulary, known: Labels | None = None) -> Edit:
    """The edit of a row: a key, a sentence, or two prompts."""
    if "edit" in row:
        if twice := [name for name in ("source", "target", "words") if name in row]:
            raise ValueError(f"a row has either edit or source and target, not both: {twice[0]} is given too")
        return Edit.read(str(row["edit"]), vocab, known)
    words = row.get("words", ())
    words = words if isinstance(words, list | tuple) else str(words).split("|")
    return Edit.text(str(row.get("source", "")), str(row.get("target", "")), tuple(words))


def _settings(row: Row, config: BulkConfig) -> Settings:
    """The run's settings, replaced by what the row says, and every candidate of a sweep checked."""
    given = {name: value for name, value in row.items() if name not in _WHAT}
    if unknown := [name for name in given if name not in (*_ROW, *_EDIT)]:
        raise ValueError(f"unknown column {unknown[0]!r}; known: {', '.join((*_WHAT, *_ROW, *_EDIT))}")
    own = configured(config, given.items())
    random = method_of(own.method).random
    if "seed" in row and not random:
        raise ValueError(f"seed is for methods that draw noise, and {own.method} draws none")
    if not own.sweep and (idle := [name for name in _CHOICE if name in row]):
        raise ValueError(f"{idle[0]} is given, but no sweep of candidates to choose from")
    chosen = {name: getattr(own, name) for name in _CHOICE}
    chosen["sweep"] = {name: [coerce(name, one, _EDIT.get(name)) for one in tried] for name, tried in own.sweep.items()}
    choice = Choice(**chosen) if own.sweep else None
    settings = Settings(own.method, own.num_inference_steps, own.edit, own.seed if random else None, choice)
    candidates = settings.candidates
    if len(candidates) > MOST_CANDIDATES:
        raise ValueError(f"the sweep has {len(candidates)} candidates; expected {MOST_CANDIDATES} at most")
    for candidate in candidates:
        EditConfig(**candidate)
    return settings
