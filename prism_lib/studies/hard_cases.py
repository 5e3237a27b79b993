"""Where edits of phantoms go wrong: on entangled findings, hard images and small text (the paper's App. G, H, I)."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from torch import Tensor

from prism_lib.data.folder import Folder, load_info, load_vocabulary, read_images
from prism_lib.data.rows import known_truth, prompt_pairs
from prism_lib.evaluation import evaluate
from prism_lib.evaluation.evaluate import Editor, Evaluation, choose_cases, interval, summarise_rows
from prism_lib.evaluation.metrics import masked_l1
from prism_lib.language.captions import caption
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.models.pipeline import Pipe
from prism_lib.studies.comparison import CRITERION
from prism_lib.studies.editors import PromptToPrompt

Numbers = dict[str, dict[str, float]]


def entanglement(
    pipe: Pipe, folder: Folder, change: Edit, other: str, count: int, editor: PromptToPrompt, seed: int = 0
) -> Numbers:
    """How much of another finding an edit carries along, by the folder's confounding, the prompts' wording and mask."""
    cases = choose_cases(folder, change, count, having=other)
    removed, wanted = (known_truth(folder, cases, edit) for edit in (Edit(remove=(other,)), change))
    images, confounding = read_images(folder, cases), load_info(folder)["config"]["confounding"]
    numbers = {}
    for wording, prompts in {"negated": prompt_pairs, "prism": prism_pairs}.items():
        pairs = prompts(folder, cases, change)
        inverted = editor.invert(pipe, images, pairs)
        for mask in ("auto", "off"):
            results = replace(editor, mask=mask).edit(pipe, inverted, pairs, change)
            found = evaluate.evaluate_results(folder, cases, change, results)
            share = carried_along(found.edited, images, removed.images, ~wanted.changed)
            columns = ["file_name", "patient_id", "carried_along", CRITERION]
            values = summarise_rows(found.table.assign(carried_along=share.tolist())[columns], seed)
            numbers[f"confounding {confounding:g}, {wording}, mask {mask}"] = {"confounding": confounding, **values}
    return numbers


def carried_along(edited: Tensor, factual: Tensor, without: Tensor, region: Tensor) -> Tensor:
    """How much of the other finding an edit removed, (N,), over ``region`` (N, 1, H, W): 0 is nothing, 1 all of it.

    <edited - factual, without - factual> / |without - factual|^2; ``without`` is the truth without the other finding.
    """
    removal = (without - factual) * region
    size = removal.square().sum((1, 2, 3))
    if bool((size == 0).any()):
        raise ValueError(f"image {int((size == 0).nonzero()[0])} shows nothing of the other finding in the region")
    return ((edited - factual) * removal).sum((1, 2, 3)) / size


def prism_pairs(folder: Folder, cases: pd.DataFrame, change: Edit) -> list[PromptPair]:
    """Prompts as PRISM's captions: what is absent is not mentioned."""
    info, vocab, pairs = load_info(folder), load_vocabulary(folder), []
    for row in cases.to_dict("records"):
        labels = {label: row[label] for label in info["labels"]}
        source, target = (caption(state, "prism", vocab) for state in (labels, change.apply(labels, vocab)))
        pairs.append(Edit.text(source, target).prompts(labels, vocab))
    return pairs


def study(pipe: Pipe, folder: Folder, change: Edit, count: int, editor: Editor, seed: int = 0) -> dict[str, Numbers]:
    """Edit ``count`` test patients: {"hard_cases": `by_stratum`, "corner_text": `corner_text`}."""
    cases = choose_cases(folder, change, count)
    truth = known_truth(folder, cases, change)
    (evaluation,) = evaluate.evaluate_edits(pipe, folder, {change: cases}, editor)
    labels = [label for label in load_info(folder)["labels"] if label != "No Finding"]
    return {
        "hard_cases": by_stratum(evaluation, strata(evaluation, cases, labels), seed),
        "corner_text": corner_text(evaluation, truth.marker, seed),
    }


def strata(evaluation: Evaluation, cases: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """What makes each image hard, a bool column per stratum; ``cases`` are the rows that were edited, in their order.

    Kinds of devices; "with LABEL" for the findings that stay; "over bone and heart", where most of the true change lies
    on pixels brighter than the median; "faint", where the true change is weaker than that of half of these images.
    """
    changed, truth = evaluation.truth_mask, evaluation.truth
    assert changed is not None and truth is not None
    pixels = changed.flatten(1).sum(1)
    bright = truth > truth.flatten(1).median(1).values[:, None, None, None]
    over = (bright & changed).flatten(1).sum(1) / pixels
    strength = ((truth - evaluation.factual).abs() * changed).flatten(1).sum(1) / pixels
    changing = {*evaluation.edit.remove, *evaluation.edit.add}
    hard = cases[[label for label in labels if label not in changing]].eq(1).add_prefix("with ")
    if "devices" in cases:
        hard = cases["devices"].str.get_dummies("|").drop(columns="none", errors="ignore").eq(1).join(hard)
    faint = strength < strength.quantile(0.5)
    halves = {"over bone and heart": over > 0.5, "over lung": over <= 0.5, "faint": faint, "distinct": ~faint}
    return hard.assign(**{name: half.tolist() for name, half in halves.items()}).set_axis(evaluation.table.index)


def by_stratum(evaluation: Evaluation, hard: pd.DataFrame, seed: int = 0) -> Numbers:
    """Images and mean error to the truth of every stratum that has any, and of "all"; intervals over patients."""
    numbers = {}
    for name, members in pd.DataFrame({"all": True}, index=hard.index).join(hard).items():
        if len(table := evaluation.table[members]):
            numbers[str(name)] = summarise_rows(table[["file_name", "patient_id", CRITERION]], seed)
    return numbers


def corner_text(evaluation: Evaluation, marker: Tensor, seed: int = 0) -> Numbers:
    """Mean |difference| to the input on ``marker`` bool (N, 1, H, W): autoencoder, edit before composite, result."""
    e = evaluation
    paths = {"autoencoder": e.reconstruction, "latent path": e.raw, "composite": e.edited}
    errors = {name: pd.Series(masked_l1(images, e.factual, marker).tolist()) for name, images in paths.items()}
    return {name: interval("marker_l1", values, e.table["patient_id"], seed) for name, values in errors.items()}
