"""A shortcut in the training set, and what helps a classifier against it (FastDiME, Weng et al., ECCV 2024).

Target and shortcut agree in k % of the training set D_k and in half of the test set. Training sets are compared as they
are, reweighted by group, with Group-DRO, and with images added. A group is 2 target + shortcut. Readings are kept.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, field, replace
from functools import partial
from itertools import groupby
from operator import call
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple, cast

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.configs import Share, checked
from prism_lib.data.folder import Folder, image_batches, load_info, load_table, read_images
from prism_lib.devices import processes_for, side_by_side
from prism_lib.evaluation import metrics
from prism_lib.files import atomic
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier, ClassifierConfig, Objective, save_classifier, train_classifier
from prism_lib.studies.augmentation import Source

GROUPS = ("neither", "shortcut_only", "target_only", "both")
OBJECTIVES: dict[str, Objective] = {"as_is": "erm", "reweighted": "reweighted", "group_dro": "group_dro"}

Key = tuple[float, str, int]  # strength, training set, seed
Sources = Mapping[str, Source]
Statistic = Callable[[Tensor], Tensor]


@checked()
class ShortcutConfig:
    """What is compared: the label that classifiers are judged by, and the one that goes with it in training."""

    target: str  # a label of the data set, or a column and its value: "sex=F"
    shortcut: str
    strengths: Annotated[tuple[Share, ...], Field(min_length=1)] = (1.0, 0.75, 0.5)  # k as a fraction; 0.5 is balanced
    images: Annotated[int, Field(ge=4, multiple_of=2)] = 240  # of the training set, half of them with the target
    added: Annotated[int, Field(ge=4, multiple_of=4)] = 120  # by a source, the same number for each edit of `additions`
    size: Annotated[int, Field(ge=32)] = 128  # pixels a side that the classifiers read
    test_splits: tuple[str, ...] = ("val", "test")
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)  # initial weights and order of images
    draw_seed: int = 0
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    edit_target: bool = True  # else only the shortcut is edited, for models that cannot change the target

    def __post_init__(self) -> None:
        if self.target == self.shortcut:
            raise ValueError(f"target and shortcut are both {self.target!r}")
        for label in (self.target, self.shortcut):
            if label not in self.classifier.labels:
                raise ValueError(f"the classifier has no label {label!r}; it has {', '.join(self.classifier.labels)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")
        if not self.classifier.steps:
            raise ValueError("the classifier needs a number of optimizer steps, the same for every training set")


class TrainingSet(NamedTuple):
    """Images (N, 1, H, W) in [0, 1], labels (N, L) with NaN for unknown, and groups (N,)."""

    images: Tensor
    labels: Tensor
    groups: Tensor


class Readings(NamedTuple):
    """What every classifier reads on the test set: (strength, training set, seed) -> probabilities (N, L)."""

    table: pd.DataFrame
    labels: Tensor
    groups: Tensor
    probabilities: Mapping[Key, Tensor]


def groups(table: pd.DataFrame, target: str, shortcut: str) -> pd.Series:
    """2 target + shortcut of every row, -1 where either is not known."""
    for label in (target, shortcut):
        if label not in table:
            raise ValueError(f"the data set has no label {label!r}; it has {', '.join(map(str, table))}")
    known = table[target].isin([0, 1]) & table[shortcut].isin([0, 1])
    return (2 * table[target] + table[shortcut]).where(known, -1).astype(int)


def _with_values(table: pd.DataFrame, config: ShortcutConfig) -> pd.DataFrame:
    """The table with a column for every label "column=value": 1, 0, or NaN where the cell is unknown."""
    for label in config.classifier.labels:
        column, _, value = label.partition("=")
        if label not in table:
            if column not in table:
                raise ValueError(f"the data set has no label {label!r}; it has {', '.join(map(str, table))}")
            known = table[column].notna() & table[column].ne("unknown")
            table = table.assign(**{label: table[column].astype(str).eq(value).astype(float).where(known)})
    return table


def group_counts(rows: pd.DataFrame, config: ShortcutConfig) -> dict[str, int]:
    """Rows of each group."""
    member = groups(rows, config.target, config.shortcut)
    return {name: int((member == group).sum()) for group, name in enumerate(GROUPS)}


def training_rows(table: pd.DataFrame, config: ShortcutConfig, strength: float) -> pd.DataFrame:
    """The rows of D_k, drawn from a split, no film with its twin; a smaller k keeps the larger one's rows if it can."""
    half, what = config.images // 2, f"{config.images} images at strength {strength:g}"
    together = round(half * strength)
    wanted = {0: together, 3: together, 1: half - together, 2: half - together}
    left, parts = _with_values(table, config).sample(frac=1, random_state=config.draw_seed, ignore_index=True), {}
    film = left["twin"].where(left["rendered"], left["file_name"]) if "twin" in left else left["file_name"]
    for group, count in wanted.items():
        parts[group] = _first(left, config, group, count, what)
        left = left[~film[left.index].isin(film[parts[group].index])]
    return pd.concat([parts[group] for group in range(4)], ignore_index=True)


def _first(rows: pd.DataFrame, config: ShortcutConfig, group: int, count: int, what: str) -> pd.DataFrame:
    """The first ``count`` rows of a group; ValueError says that ``what`` needs more than there are."""
    found = rows[groups(rows, config.target, config.shortcut) == group]
    if len(found) < count:
        of_group = f"training images of group {GROUPS[group]!r} ({config.target} and {config.shortcut})"
        raise ValueError(f"{what} need {count} {of_group}, there are {len(found)}")
    return found.head(count)


def balanced_rows(folder: Folder, config: ShortcutConfig) -> pd.DataFrame:
    """The balanced test set: as many rows of each group as the smallest has."""
    parts = [load_table(folder, split) for split in config.test_splits]
    table = _with_values(pd.concat(parts, ignore_index=True), config)
    member, counts = groups(table, config.target, config.shortcut), group_counts(table, config)
    fewest = min(counts, key=counts.__getitem__)
    if not counts[fewest]:
        raise ValueError(f"no test image in group {fewest!r} of {config.target}, {config.shortcut}")
    return pd.concat([table[member == group].head(counts[fewest]) for group in range(4)], ignore_index=True)


def additions(rows: pd.DataFrame, config: ShortcutConfig) -> list[tuple[pd.DataFrame, Edit]]:
    """The edits that a source makes: training rows in which the two go together, and edits that separate them."""
    labels, what = (config.shortcut, config.target)[: 1 + config.edit_target], f"{config.added} added images"
    count = config.added // (2 * len(labels))
    both, neither = (_first(rows, config, group, count, what) for group in (3, 0))
    return [(both, Edit(remove=(label,))) for label in labels] + [(neither, Edit(add=(label,))) for label in labels]


def examples(
    folder: Folder, rows: pd.DataFrame, sources: Sources, config: ShortcutConfig, count: int = 1
) -> tuple[Tensor, list[str]]:
    """The first images of every edit and what each source makes of them, in rows of 1 + sources, with titles."""
    panels, titles = [], []
    for chosen, edit in additions(rows, config):
        some = chosen.head(count)
        columns = [read_images(folder, some), *(source(some, edit) for source in sources.values())]
        panels.append(torch.stack([_resized(images, config.size) for images in columns], dim=1).flatten(0, 1))
        titles += [name.replace("_", " ") for name in (edit.key, *sources)] * len(some)
    return torch.cat(panels), titles


def load_images(folder: Folder, rows: pd.DataFrame, config: ShortcutConfig) -> TrainingSet:
    """The rows as they are."""
    return _training_set(torch.cat([_resized(one, config.size) for one in image_batches(folder, rows)]), rows, config)


def added_images(rows: pd.DataFrame, source: Source, config: ShortcutConfig) -> TrainingSet:
    """What a source adds to the rows of a training set, with the labels that the edits give."""
    parts = []
    for chosen, edit in additions(rows, config):
        states = chosen[list(config.classifier.labels)].to_dict("records")
        labels = pd.DataFrame([edit.apply(cast(dict[str, Any], row)) for row in states])
        parts.append(_training_set(_resized(source(chosen, edit), config.size), labels, config))
    return _joined(*parts)


def run(folder: Folder, config: ShortcutConfig, sources: Sources, cache: Path, processes: int = 1) -> Readings:
    """Train every classifier whose readings are not in ``cache`` yet, and read the test set with it.

    A source is identified by its attribute `settings`, else by its name; processes: see `devices.processes_for`.
    """
    train = load_table(folder, "train")
    drawn = {strength: training_rows(train, config, strength) for strength in config.strengths}
    for rows in drawn.values() if sources else ():
        additions(rows, config)  # raises for too few images before anything is trained
    table = balanced_rows(folder, config)
    content = load_info(folder)["content_hash"]
    files = {
        (strength, name, seed): cache / f"{_digest(config, strength, name, seed, content, sources)}.safetensors"
        for strength in config.strengths
        for name in (*OBJECTIVES, *sources)
        for seed in config.seeds
    }
    test = load_images(folder, table, config)
    missing = [key for key, path in files.items() if not path.is_file()]
    for strength, name in dict.fromkeys((strength, name) for strength, name, _ in missing):
        if hasattr(sources.get(name), "settings"):  # images that are kept are made before classifiers need the cores
            for rows, edit in additions(drawn[strength], config):
                sources[name](rows, edit)

    def jobs() -> Iterator[Callable[[], None]]:
        for (strength, name), keys in groupby(missing, key=lambda key: key[:2]):
            data = load_images(folder, drawn[strength], config)
            if name in sources:
                data = _joined(data, added_images(drawn[strength], sources[name], config))
            for key in keys:
                classifier = replace(config.classifier, seed=key[2], objective=OBJECTIVES.get(name, "erm"))
                yield partial(_train, data, classifier, test.images, files[key])

    trained = side_by_side(call, jobs(), processes_for(processes))
    for _ in tqdm(trained, total=len(missing), desc="classifiers"):
        pass
    read = {key: load_file(path)["probabilities"] for key, path in files.items()}
    return Readings(table, test.labels, test.groups, read)


def trained(folder: Folder, config: ShortcutConfig, strength: float, home: Path) -> Classifier:
    """A classifier of D_k as it is, by the first seed, kept below ``home`` by the folder's content and the settings."""
    settings, seed = replace(config, strengths=(strength,)), config.seeds[0]
    kept = home / _digest(settings, strength, "as_is", seed, load_info(folder)["content_hash"], {})
    if not (kept / "config.json").is_file():
        data = load_images(folder, training_rows(load_table(folder, "train"), config, strength), config)
        network = replace(config.classifier, seed=seed, size=config.size)
        save_classifier(train_classifier(data.images, data.labels, network), network, kept)
    return Classifier.load(kept)  # read back even if just trained: stored weights are float16


def _train(data: TrainingSet, config: ClassifierConfig, test: Tensor, file: Path) -> None:
    """Train one classifier and keep what it reads of the test images; runs in a process of its own."""
    model = train_classifier(data.images, data.labels, config, groups=data.groups, progress=False)
    with atomic(file) as unfinished:
        save_file({"probabilities": Classifier(model, config.labels).read(test).contiguous()}, unfinished)


def summarise(readings: Readings, config: ShortcutConfig) -> dict[str, Any]:
    """The numbers of the record `classifiers`: per strength and training set, means over seeds.

    Intervals are 95 %, over test patients and seeds. ``worst_group_gain`` is what "prism" adds to "as_is" at the
    greatest strength and ``gap_closed`` the share of the true counterfactuals' gain that this is, where there is one.
    """
    summary: dict[str, Any] = {}
    names = list(dict.fromkeys(name for _, name, _ in readings.probabilities))
    for strength in config.strengths:
        block = {name: _measures(readings, config, strength, name) for name in names}
        for name in names:
            if name != "as_is":
                gain = _interval(readings, config, strength, ("as_is", name), lambda worst: worst[1] - worst[0])
                block[name] |= gain.named("worst_group_gain")
        summary[f"strength_{round(100 * strength)}"] = block
    strongest = max(config.strengths)
    strong = summary[f"strength_{round(100 * strongest)}"]
    if "prism" in names:
        summary |= {key: value for key, value in strong["prism"].items() if key.startswith("worst_group_gain")}
    # A share of a gap is left out where the interval of the gap includes 0.
    sets = ("as_is", "prism", "true")
    if set(sets) <= set(names) and strong["true"]["worst_group_gain_low"] > 0:
        share = _interval(readings, config, strongest, sets, lambda w: (w[1] - w[0]) / (w[2] - w[0]))
        summary |= share.named("gap_closed")
    return summary


def _measures(readings: Readings, config: ShortcutConfig, strength: float, name: str) -> dict[str, Any]:
    column = config.classifier.labels.index(config.target)
    labels, group = readings.labels[:, column], readings.groups
    read = [readings.probabilities[strength, name, seed] for seed in config.seeds]
    targets = [probabilities[:, column] for probabilities in read]
    by_group = [metrics.group_accuracy(values, labels, group, range(4)) for values in targets]
    names = config.classifier.labels
    pairs = [torch.stack([probabilities, readings.labels.to(probabilities)], 1) for probabilities in read]
    areas = [{label: metrics.auc(pair[..., column]) for column, label in enumerate(names)} for pair in pairs]
    odds = [metrics.equalised_odds_difference(values, labels, group % 2) for values in targets]
    worst = _interval(readings, config, strength, (name,), lambda values: values[0])
    return {
        **worst.named("worst_group_accuracy"),
        "accuracy": fmean(fmean(accuracies.values()) for accuracies in by_group),
        "equalised_odds_difference": fmean(odds),
        "calibration_error": fmean(metrics.calibration_error(values, labels) for values in targets),
        "group_accuracy": {GROUPS[g]: fmean(accuracies[g] for accuracies in by_group) for g in range(4)},
        "auc": {label: fmean(area[label] for area in areas) for label in names},
        "worst_group_accuracy_by_seed": [min(accuracies.values()) for accuracies in by_group],
    }


def _interval(
    readings: Readings, config: ShortcutConfig, strength: float, names: Sequence[str], statistic: Statistic
) -> metrics.Interval:
    """Bootstrap over test patients and seeds of a statistic of the training sets' worst-group accuracies."""
    column = config.classifier.labels.index(config.target)
    read = [readings.probabilities[strength, name, seed][:, column] for name in names for seed in config.seeds]
    right = (torch.stack(read) >= 0.5) == (readings.labels[:, column] == 1)  # (names x seeds, N)
    right = right.double().reshape(len(names), len(config.seeds), -1).permute(2, 0, 1)  # (N, names, seeds)
    group = readings.groups.double()[:, None, None].expand(-1, 1, len(config.seeds))
    rows = torch.cat([group, right], dim=1)  # (N, 1 + names, seeds)

    def of_worst(drawn: Tensor) -> Tensor:
        member = F.one_hot(drawn[:, 0, 0].long(), 4).double()
        present = member.sum(0) > 0  # a small test set can lose a group in a draw
        accuracy = torch.einsum("ng,nks->gks", member, drawn[:, 1:])[present] / member.sum(0)[present, None, None]
        return statistic(accuracy.amin(0).mean(1))

    return metrics.bootstrap_ci(rows, readings.table["patient_id"].tolist(), of_worst)


def _digest(config: ShortcutConfig, strength: float, name: str, seed: int, content: str, sources: Sources) -> str:
    settings = asdict(config) | {"strengths": strength, "seeds": seed, "set": name, "content": content}
    settings |= {"source": getattr(sources[name], "settings", name)} if name in sources else {"added": 0}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _training_set(images: Tensor, rows: pd.DataFrame, config: ShortcutConfig) -> TrainingSet:
    labels = torch.tensor(rows[list(config.classifier.labels)].astype(float).to_numpy().tolist())
    member = torch.tensor(groups(rows, config.target, config.shortcut).to_numpy())
    return TrainingSet(images, torch.where((labels == 0) | (labels == 1), labels, torch.nan), member)


def _joined(*parts: TrainingSet) -> TrainingSet:
    return TrainingSet(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _resized(images: Tensor, size: int) -> Tensor:
    """Gray images (N, 1, size, size), smoothed before they are made smaller."""
    return F.interpolate(images.mean(1, keepdim=True), (size, size), mode="bilinear", antialias=True).clamp(0, 1)
