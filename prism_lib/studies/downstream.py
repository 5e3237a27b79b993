"""The downstream study: train classifiers on the training sets of `studies.shortcut`, and compare them by group.

Every classifier has its key, and what it read on the test set is kept under it, so that an interrupted study goes on
where it stopped; `summarise` turns the readings into the numbers of the record `classifiers`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.data.folder import Folder, load_info, load_table
from prism_lib.devices import processes_for
from prism_lib.evaluation import metrics
from prism_lib.models.classifier import auc
from prism_lib.studies import side_by_side
from prism_lib.studies.augmentation import Source
from prism_lib.studies.shortcut import (
    GROUPS,
    StudyConfig,
    TrainingSet,
    added_images,
    additions,
    balanced_rows,
    load_images,
    training_rows,
)

OBJECTIVES = {"as_is": "erm", "reweighted": "reweighted", "group_dro": "group_dro"}

Key = tuple[float, str, int]


@dataclass(frozen=True)
class Readings:
    """What every trained classifier reads on the test set: (strength, training set, seed) -> probabilities (N, L)."""

    table: pd.DataFrame
    labels: Tensor
    groups: Tensor
    probabilities: Mapping[Key, Tensor]


def run(
    folder: Folder,
    config: StudyConfig,
    sources: Mapping[str, Source],
    cache: Path,
    objectives: Sequence[str] = tuple(OBJECTIVES),
    processes: int = 1,
) -> Readings:
    """Train every classifier that ``cache`` does not know yet and read the test set with it.

    A classifier's key holds all that decides it, so that an interrupted study goes on where it stopped. A source with
    an attribute `settings` is known by that, any other by its name. ``processes`` classifiers are trained at a time, 0
    for as many as suit (`devices.processes_for`); one has other rounding than several, see `side_by_side`.
    """
    processes = processes_for(processes)
    train = load_table(folder, "train")
    drawn = {strength: training_rows(train, config, strength) for strength in config.strengths}
    if sources:
        for rows in drawn.values():
            additions(rows, config)
    table = balanced_rows(folder, config)
    content = load_info(folder)["content_hash"]
    files = {
        (strength, name, seed): cache / f"{_digest(config, strength, name, seed, content, sources)}.safetensors"
        for strength in config.strengths
        for name in (*objectives, *sources)
        for seed in config.seeds
    }
    test = load_images(folder, table, config)
    missing = [key for key, path in files.items() if not path.is_file()]

    def tasks() -> Iterator[tuple[Key, side_by_side.Task]]:
        prepared: dict[tuple[float, str], TrainingSet] = {}
        for strength, name, seed in missing:
            if (strength, name) not in prepared:
                prepared = {(strength, name): load_images(folder, drawn[strength], config)}
                if name in sources:
                    prepared[strength, name] += added_images(drawn[strength], sources[name], config)
            data, objective = prepared[strength, name], OBJECTIVES.get(name, "erm")
            classifier = replace(config.classifier, seed=seed, objective=objective)
            yield (
                (strength, name, seed),
                side_by_side.Task(data.images, data.labels, data.groups, classifier, test.images),
            )

    if processes > 1:
        _make_first(missing, drawn, sources, config)
    for key, probabilities in tqdm(side_by_side.train(tasks(), processes), total=len(missing), desc="classifiers"):
        _write(files[key], probabilities)
    read = {key: load_file(path)["probabilities"] for key, path in files.items()}
    return Readings(table, test.labels, test.groups, read)


def _make_first(
    missing: Sequence[Key], drawn: Mapping[float, pd.DataFrame], sources: Mapping[str, Source], config: StudyConfig
) -> None:
    """Have sources that keep their images make them, while no classifier asks for the same cores."""
    for strength, name in dict.fromkeys((strength, name) for strength, name, _ in missing):
        if name in sources and hasattr(sources[name], "settings"):
            for rows, edit in additions(drawn[strength], config):
                sources[name](rows, edit)


def summarise(readings: Readings, config: StudyConfig, baseline: str = "as_is") -> dict[str, Any]:
    """The numbers of the record `classifiers`: per strength and training set, means over seeds.

    Intervals are 95 %, over test patients and seeds. ``worst_group_gain`` is what "prism" adds to ``baseline`` at the
    greatest strength and ``gap_closed`` the share of the true counterfactuals' gain that this is, where there is one.
    """
    summary: dict[str, Any] = {}
    names = list(dict.fromkeys(name for _, name, _ in readings.probabilities))
    for strength in config.strengths:
        block = {name: _measures(readings, config, strength, name) for name in names}
        for name in names:
            if name != baseline and baseline in names:
                gain = _interval(readings, config, strength, (baseline, name), lambda worst: worst[1] - worst[0])
                block[name] |= gain.named("worst_group_gain")
        summary[f"strength_{round(100 * strength)}"] = block
    strongest = max(config.strengths)
    strong = summary[f"strength_{round(100 * strongest)}"]
    if {"prism", baseline} <= set(names):
        summary |= {key: value for key, value in strong["prism"].items() if key.startswith("worst_group_gain")}
    # A share of a gap that may be none says nothing.
    if {"prism", "true", baseline} <= set(names) and strong["true"]["worst_group_gain_low"] > 0:
        sets = (baseline, "prism", "true")
        share = _interval(
            readings, config, strongest, sets, lambda worst: (worst[1] - worst[0]) / (worst[2] - worst[0])
        )
        summary |= share.named("gap_closed")
    return summary


def _measures(readings: Readings, config: StudyConfig, strength: float, name: str) -> dict[str, Any]:
    """Means over seeds of one training set's classifiers, and every seed's worst group."""
    column = config.classifier.labels.index(config.target)
    labels, group = readings.labels[:, column], readings.groups
    read = [readings.probabilities[strength, name, seed] for seed in config.seeds]
    targets = [probabilities[:, column] for probabilities in read]
    by_group = [metrics.group_accuracy(values, labels, group, range(4)) for values in targets]
    areas = [auc(probabilities, readings.labels, config.classifier.labels) for probabilities in read]
    worst = _interval(readings, config, strength, (name,), lambda values: values[0])
    return {
        **worst.named("worst_group_accuracy"),
        "accuracy": _mean([sum(accuracies.values()) / 4 for accuracies in by_group]),
        "equalised_odds_difference": _mean(
            [metrics.equalised_odds_difference(values, labels, group % 2) for values in targets]
        ),
        "calibration_error": _mean([metrics.calibration_error(values, labels) for values in targets]),
        "group_accuracy": {GROUPS[g]: _mean([accuracies[g] for accuracies in by_group]) for g in range(4)},
        "auc": {label: _mean([area[label] for area in areas]) for label in config.classifier.labels},
        "worst_group_accuracy_by_seed": [min(accuracies.values()) for accuracies in by_group],
    }


def _interval(
    readings: Readings,
    config: StudyConfig,
    strength: float,
    names: Sequence[str],
    statistic: Callable[[Tensor], Tensor],
) -> metrics.Interval:
    """Bootstrap over test patients and seeds of a statistic of the training sets' worst-group accuracies."""
    column = config.classifier.labels.index(config.target)
    labels = readings.labels[:, column]
    read = torch.stack(
        [
            torch.stack([readings.probabilities[strength, name, seed][:, column] for seed in config.seeds])
            for name in names
        ]
    )  # (names, seeds, N)
    right = ((read >= 0.5) == (labels == 1)).double().permute(2, 0, 1)
    group = readings.groups.double()[:, None, None].expand(-1, 1, len(config.seeds))
    rows = torch.cat([group, right], dim=1)  # (N, 1 + names, seeds)

    def of_worst(drawn: Tensor) -> Tensor:
        member = F.one_hot(drawn[:, 0, 0].long(), 4).double()
        present = member.sum(0) > 0  # a small test set can lose a group in a draw
        accuracy = torch.einsum("ng,nks->gks", member, drawn[:, 1:])[present] / member.sum(0)[present, None, None]
        return statistic(accuracy.amin(0).mean(1))

    return metrics.bootstrap_ci(rows, readings.table["patient_id"].tolist(), of_worst)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _digest(
    config: StudyConfig, strength: float, name: str, seed: int, content: str, sources: Mapping[str, Source]
) -> str:
    """A name for one classifier's readings, of all that decides them."""
    settings = asdict(config) | {"strengths": strength, "seeds": seed, "set": name, "content": content}
    if name in sources:
        settings["source"] = getattr(sources[name], "settings", name)
    else:
        settings["added"] = 0
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def _write(path: Path, probabilities: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"probabilities": probabilities.contiguous()}, temporary)
    temporary.replace(path)
