"""What a bulk run has to make: a file of edits and a prepared folder become a list of tasks, checked to the last row.

The file of edits is CSV, JSON or YAML, a row (or mapping) per edit:

    file_name             an image of the prepared folder; empty or "all": every image that the edit applies to
    edit                  a key ("remove_support_devices") or a sentence ("remove the pacemaker, keep the effusion")
    source, target        instead of `edit`: two prompts in your own words; `words`, parted by "|", say what it is about
    method, guidance_scale, ...   settings of this row: `method`, `num_inference_steps` and the fields of `EditConfig`
    sweep                 settings to try, {"self_replace_steps": [0.2, 0.4]} (such text in CSV); the best is kept, as
                          `guide`, `similarity`, `best`, `at_least` and `at_most` say (`bulk_choice.Choice`)
    seed                  of the noise, for methods that draw any (edit_friendly); each image draws its own from it

Nothing here loads a model, or the libraries that models need, or writes a file; every error names the file and the row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import yaml

from prism_lib.apps.bulk_choice import Choice
from prism_lib.apps.profiles import coerce
from prism_lib.data.folder import load_info, load_table, read_images
from prism_lib.devices import dtype_of
from prism_lib.editing.methods import METHODS, RECOMMENDED, method_of
from prism_lib.editing.settings import EditConfig, Overrides, grid
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.language.labels import Vocabulary, vocabulary
from prism_lib.paths import SHIPPED

ALL = "all"
MANIFEST, REJECTS = "metadata.csv", "rejected.csv"  # what a run leaves
BITS = (8, 16)
MOST_CANDIDATES = 256
_CHOICE = tuple(item.name for item in fields(Choice))
_WHAT = ("file_name", "edit", "source", "target", "words")


@dataclass(frozen=True)
class BulkConfig:
    """A bulk run: every task of `edits` on the images in `data`, into `out`.

    Args:
        data: a prepared folder (`datasets.prepare`); `split` narrows it to one split.
        edits: the file of edits, see the module.
        model: as `models.load_pipeline` takes it.
        edit: settings where a row has none of its own.
        seed: of the noise, for methods that draw any.
        sweep, guide, similarity, best, at_least, at_most: the choice among candidates where something is swept, see
            `bulk_choice.Choice`.
        batch_size: images per batch. Batches are the same whatever the number of processes, so the files are too.
        precision: "no" for float32, "bf16" or "fp16": of the model's weights, see `models.load_pipeline`.
        compile: see `models.compile_blocks`; worth its minute of compiling in long runs on GPUs.
        bits: 8, or 16 for gray images: the edit keeps its finer levels, and an 8-bit input's pixels v become 257 v.
        threads: CPU threads of each process, 0 for torch's choice; rounding may depend on it.
    """

    data: str
    edits: str
    out: str
    split: str = ""
    model: str = SHIPPED
    method: str = RECOMMENDED
    num_inference_steps: int = 50
    edit: Overrides = field(default_factory=dict, hash=False)
    seed: int = 0
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict, hash=False)
    guide: str = ""
    similarity: str = ""
    best: str = ""
    at_least: Mapping[str, float] = field(default_factory=dict, hash=False)
    at_most: Mapping[str, float] = field(default_factory=dict, hash=False)
    batch_size: int = 4
    precision: str = "no"
    compile: bool = False
    bits: int = 8
    threads: int = 1

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; expected 8 or 16")
        if self.batch_size < 1 or self.threads < 0:
            raise ValueError(f"need batch_size >= 1 and threads >= 0, got {self.batch_size} and {self.threads}")
        dtype_of(self.precision)
        _check_inversion(self.method, self.num_inference_steps)


@dataclass(frozen=True)
class Settings:
    """How a task is edited; tasks share a batch only with equal settings."""

    method: str
    num_inference_steps: int
    edit: Overrides
    seed: int | None = None
    choice: Choice | None = None

    @property
    def candidates(self) -> list[Overrides]:
        """What is tried for every image."""
        return [self.edit] if self.choice is None else grid(self.edit, **self.choice.sweep)

    @property
    def text(self) -> str:
        """All of it as JSON: what the manifest says and the names of files depend on."""
        settings = {name: value for name, value in asdict(self).items() if value is not None}
        settings["edit"] = {name: value for name, value in self.edit.items() if name != "batch_size"}
        return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Task:
    """One counterfactual to make: an image, its edit and prompts, and what the result's labels are."""

    file_name: str
    edit: Edit
    pair: PromptPair
    settings: Settings
    about: Mapping[str, Any]  # patient, split and labels of the counterfactual, for the manifest


def load_config(path: str | Path) -> BulkConfig:
    """The configuration in a JSON file; ValueError names the file and the field that does not fit."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return _built(BulkConfig, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no configuration of a bulk run: {error}") from None


def configured(config: BulkConfig, overrides: Sequence[tuple[str, str]]) -> BulkConfig:
    """The configuration with other values, as text, for fields of `BulkConfig` or of its `EditConfig`."""
    own = {item.name: getattr(config, item.name) for item in fields(config) if item.name != "edit"}
    edit = {name: value for name, value in asdict(EditConfig()).items() if name not in own}
    given: dict[str, Any] = {}
    for name, value in overrides:
        if name not in own and name not in edit:
            raise ValueError(f"unknown setting {name!r}; known: {', '.join((*own, *edit))}")
        given[name] = coerce(name, value, own.get(name, edit.get(name)))
    ours = {name: value for name, value in given.items() if name in own}
    return replace(config, **ours, edit={**config.edit, **{name: given[name] for name in given.keys() - ours.keys()}})


def config_json(config: BulkConfig) -> str:
    """The configuration as `load_config` reads it."""
    return json.dumps(asdict(config), indent=2) + "\n"


def plan(config: BulkConfig) -> list[Task]:
    """Every task, by row and then by image; the first thing that is wrong raises ValueError or FileNotFoundError."""
    info, table = load_info(config.data), load_table(config.data, config.split or None)
    vocab, rows = vocabulary(info["config"]["vocabulary"]), read_rows(config.edits)
    images = {row["file_name"]: cast(dict[str, Any], row) for row in table.to_dict("records")}
    tasks: dict[tuple[str, PromptPair, str], Task] = {}
    for number, row in enumerate(rows, 1):
        try:
            for task in _tasks(row, config, images, info["labels"], vocab):
                tasks.setdefault((task.file_name, task.pair, task.settings.text), task)
        except ValueError as error:
            raise ValueError(f"{config.edits}, row {number}: {error}") from None
    for name in dict.fromkeys(task.file_name for task in tasks.values()):
        if not (Path(config.data) / name).is_file():
            raise FileNotFoundError(f"{config.data} lacks {name}, which its metadata.csv lists")
    return list(tasks.values())


def batches(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Tasks of equal settings in batches of `size`, in order: they depend on the plan alone."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.settings.text, []).append(task)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of edits, without empty cells; values of CSV are still text."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of edits {path}")
    readers: dict[str, Callable[[str], Any]] = {
        ".csv": _read_csv,
        ".json": json.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
    }
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
    reader = csv.DictReader(text.splitlines(), strict=True)
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"row {number} has more cells than the heading: put text with commas in quotes")
    return rows


def _tasks(
    row: Mapping[str, Any],
    config: BulkConfig,
    images: Mapping[str, Mapping[str, Any]],
    labels: Sequence[str],
    vocab: Vocabulary,
) -> Iterator[Task]:
    """The tasks of one row of the file of edits."""
    settings, edit = _settings(row, config), _edit(row, vocab)
    name = str(row.get("file_name", ALL))
    if name != ALL and name not in images:
        raise ValueError(f"file_name {name!r} is not in {config.data}")
    if settings.choice is not None and settings.choice.guide and not edit.attributes:
        raise ValueError(f"a guide reads labels, and the edit {edit.key} names none")
    edit.prompts({}, vocab)  # of an image of which nothing is known: names and words, whatever the labels
    for candidate in settings.candidates:
        EditConfig(**candidate)
    found = False
    for file_name in [name] if name != ALL else images:
        image = images[file_name]
        known = {label: image[label] for label in labels}
        try:
            pair = edit.prompts(known, vocab)
        except ValueError:
            if name != ALL:
                raise
            continue  # of all images, those that the edit applies to
        found = True
        about = {key: image[key] for key in ("patient_id", "split")} | edit.apply(known, vocab)
        yield Task(file_name, edit, pair, settings, about)
    if not found:
        raise ValueError(f"edit {edit.key} applies to none of the {len(images)} images in {config.data}")


def _edit(row: Mapping[str, Any], vocab: Vocabulary) -> Edit:
    """The edit of a row: a key, a sentence, or two prompts."""
    if "edit" in row:
        if twice := [name for name in ("source", "target", "words") if name in row]:
            raise ValueError(f"a row has either edit or source and target, not both: {twice[0]} is given too")
        return Edit.read(str(row["edit"]), vocab)
    words = row.get("words", ())
    words = words.split("|") if isinstance(words, str) else words
    return Edit.text(str(row.get("source", "")), str(row.get("target", "")), tuple(words))


def _settings(row: Mapping[str, Any], config: BulkConfig) -> Settings:
    """The run's settings, replaced by what the row says."""
    defaults = {item.name: getattr(EditConfig(), item.name) for item in fields(EditConfig)}
    tried = {name: value for name, value in defaults.items() if not is_dataclass(value)}
    del tried["batch_size"]  # the run's, or a row's result could depend on its neighbours
    own: dict[str, Any] = {name: getattr(config, name) for name in ("method", "num_inference_steps", "seed", *_CHOICE)}
    plain = own | tried
    given = {}
    for name, value in row.items():
        if name in _WHAT:
            continue
        if name not in plain:
            raise ValueError(f"unknown column {name!r}; known: {', '.join((*_WHAT, *plain))}")
        given[name] = coerce(name, value, plain[name])
    own |= {name: given.pop(name) for name in own if name in given}
    method, steps, seed = (own.pop(name) for name in ("method", "num_inference_steps", "seed"))
    _check_inversion(method, steps)
    if "seed" in row and not METHODS[method].random:
        raise ValueError(f"seed is given, but the method {method} draws no noise")
    if not own["sweep"] and (idle := [name for name in _CHOICE if name in row]):
        raise ValueError(f"{idle[0]} is given, but no sweep of candidates to choose from")
    edit = {**config.edit, "batch_size": config.batch_size, **given}
    choice = Choice.of(own, tried) if own["sweep"] else None
    settings = Settings(method, steps, edit, seed if METHODS[method].random else None, choice)
    if len(settings.candidates) > MOST_CANDIDATES:  # builds, and so checks, every candidate
        raise ValueError(f"the sweep has {len(settings.candidates)} candidates; expected {MOST_CANDIDATES} at most")
    return settings


def _check_inversion(method: str, steps: int) -> None:
    method_of(method)
    if not 1 <= steps <= 1000:
        raise ValueError(f"num_inference_steps is {steps}; expected 1 to 1000")


def _built(kind: type, values: Any) -> Any:
    """A frozen configuration from plain JSON, nested ones included; TypeError or ValueError for what does not fit."""
    if not isinstance(values, dict):
        raise ValueError(f"expected a mapping of fields, got {values!r}")
    known = {item.name: item for item in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"unknown field {', '.join(unknown)}; known: {', '.join(known)}")
    built = {}
    for name, value in values.items():
        factory = known[name].default_factory
        default = known[name].default if factory is MISSING else factory()
        if is_dataclass(default):
            built[name] = _built(type(default), value)
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


def image_shape(config: BulkConfig, tasks: Sequence[Task]) -> tuple[int, int, int]:
    """(height, width, channels) of the first image: a prepared folder's are all alike."""
    image = read_images(config.data, pd.DataFrame({"file_name": [tasks[0].file_name]}))[0]
    return image.shape[1], image.shape[2], image.shape[0]
