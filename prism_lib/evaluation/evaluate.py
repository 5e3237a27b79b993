"""Edit held-out images and measure the result: against the truth of phantoms, and by a judge, which only reads."""

import hashlib
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib import devices, paths
from prism_lib.data.folder import Folder, image_batches, load_info, load_table, load_vocabulary, read_images
from prism_lib.data.rows import editable, prompt_pairs, says_details, true_counterfactual
from prism_lib.editing.counterfactuals import Counterfactual, stack
from prism_lib.evaluation import metrics
from prism_lib.language.edits import Edit, Pairs, PromptPair
from prism_lib.language.labels import CHEST, Vocabulary
from prism_lib.models.classifier import Classifier, ClassifierConfig, named_network, save_classifier, train_classifier
from prism_lib.models.pipeline import Pipe
from prism_lib.records import Timer

Results = list[Counterfactual]
Judge = Classifier | None  # it only reads; None where there is none
Cases = Mapping[Edit, pd.DataFrame]  # rows of a prepared table that the edit suits


class Editor:
    """A method with its settings: `invert` the images, then `edit` what that gave; a call does both."""

    @property
    def inverts(self) -> Hashable:
        """The settings that `invert` depends on; editors with equal ones may share what it gives."""
        return None

    def invert(self, pipe: Pipe, images: Tensor, pairs: Pairs) -> Any:
        """What follows from images (N, C, H, W) in [0, 1] and prompts before any edit; by default the images."""
        return images

    def edit(self, pipe: Pipe, inverted: Any, pairs: Pairs, change: Edit) -> Results:
        """A result per image, from what `invert` gave and the edit that the pairs stand for."""
        raise NotImplementedError

    def effect(self, pipe: Pipe, pairs: Pairs) -> str:
        """A description of all that decides the results; editors with equal ones are measured once."""
        return repr(self)

    def __call__(self, pipe: Pipe, images: Tensor, pairs: Pairs, change: Edit) -> Results:
        return self.edit(pipe, self.invert(pipe, images, pairs), pairs, change)


class Made(NamedTuple):
    """What one editor made of images, in how many seconds and rows of U-Net calls."""

    results: Results
    seconds: float
    rows: int


Job = tuple[Tensor, Pairs, Edit, Sequence[Editor]]  # images (N, C, H, W), a pair each, and editors that may share


def load_judge(
    name: str, folder: Folder = "", *, network: str = "densenet-small", images: int = 20_000, **settings: Any
) -> Judge:
    """What `Classifier.load` takes, checked on the folder; "" is None; "train" the folder's `own_classifier`.

    Settings are those of `Classifier.load`, or of a `ClassifierConfig` to train.
    """
    if name != "train":
        judge = Classifier.load(name, **settings) if name else None
        if judge is None or not folder:
            return judge
        table = load_table(folder)
        return judge.checked(read_images(folder, table[:: max(1, len(table) // 16)]), load_info(folder)["labels"])
    known, table = load_info(folder)["labels"], load_table(folder, "train").head(images)
    labels = settings.pop("labels", [label for label in known if {0, 1} <= set(table[label])])
    if not labels or not set(labels) <= set(known):
        raise ValueError(f"a judge of {folder} needs labels of {known} with both classes, not {labels}")
    config = named_network(network, ClassifierConfig(tuple(labels), **{"size": 256} | settings))
    return own_classifier(folder, paths.runs() / "judges", config, images)


def own_classifier(folder: Folder, home: Path, config: ClassifierConfig, images: int) -> Classifier:
    """What `train_judge` makes of a prepared folder, kept below ``home`` by the folder's content and the settings."""
    made = repr((load_info(folder)["content_hash"], config, images))
    kept = home / hashlib.sha256(made.encode()).hexdigest()[:12]
    if not (kept / "config.json").is_file():
        train_judge(folder, kept, config, images)
    return Classifier.load(kept)  # read back even if just trained: stored weights are float16


def train_judge(folder: Folder, output: Path, config: ClassifierConfig, images: int) -> Classifier:
    """Train a judge on the first ``images`` of a prepared folder's train split and save it to ``output``."""
    table = load_table(folder, "train").head(images)
    table = table[table[list(config.labels)].isin([0, 1]).any(axis=1)]
    labels = torch.tensor(table[list(config.labels)].to_numpy(dtype=float).tolist())
    model = train_classifier(gray_bytes(folder, table), labels, config)
    save_classifier(model, config, output)
    return Classifier(model, config.labels)


def gray_bytes(folder: Folder, table: pd.DataFrame) -> Tensor:
    """All images of a table's rows as uint8 (N, 1, H, W)."""
    return torch.cat([(part.mean(1, keepdim=True) * 255).round().byte() for part in image_batches(folder, table)])


def judge_auc(judge: Judge, folder: Folder, split: str = "test", minimum: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """A row per label: known `images`, `auc` (NaN without both classes), its interval, `judged`: >= ``minimum``."""
    rows: dict[str, dict[str, float]] = {}
    table = load_table(folder, split).reindex(columns=["patient_id", "file_name", *(judge.labels if judge else ())])
    read = torch.cat([judge.read(part) for part in image_batches(folder, table)]) if judge else torch.zeros(0, 0)
    for label, probabilities in zip(table.columns[2:], read.T, strict=True):
        known = table[label].isin([0, 1]).tolist()
        patients = table["patient_id"][known].tolist()
        readings = torch.stack([probabilities, torch.tensor(table[label].tolist())], 1)[known]
        rows[label] = {"images": len(readings), "judged": False}
        if len(set(patients)) > 1 and not math.isnan(metrics.auc(readings)):
            found = metrics.bootstrap_ci(readings, patients, metrics.auc, seed=seed)
            rows[label] |= {**found.named("auc"), "judged": found.estimate >= minimum}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["images", "auc", "auc_low", "auc_high", "judged"])


def trusted(judge: Judge, reading: pd.DataFrame) -> Judge:
    """The judge of the labels that are `judged` in what `judge_auc` found; None where there is none."""
    labels = list(reading.index[reading["judged"].astype(bool)])
    return judge.only(labels) if judge and labels else None


@dataclass(frozen=True)
class Evaluation:
    """One edit on N images; images are (N, C, H, W), masks (N, 1, H, W), ``table`` has a row of numbers per image."""

    edit: Edit
    table: pd.DataFrame
    pairs: tuple[PromptPair, ...]  # the prompts
    factual: Tensor
    edited: Tensor
    raw: Tensor
    reconstruction: Tensor
    mask: Tensor
    truth: Tensor | None
    truth_mask: Tensor | None
    seconds: float = 0.0  # of inversion and edit alone
    settings: tuple[object, ...] = ()  # those used, each once
    vocab: Vocabulary = CHEST

    def head(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first images for a sheet: factual, edited, and truth where it is known."""
        return self.factual[:count], self.edited[:count], None if self.truth is None else self.truth[:count]


def choose_cases(folder: Folder, edit: Edit, count: int, split: str = "test", having: str = "") -> pd.DataFrame:
    """The first ``count`` images of a split that the edit applies to (``having`` another label), one per patient."""
    rows = editable(load_table(folder, split), edit, load_vocabulary(folder))
    if having and (having not in rows or having in (*edit.remove, *edit.add)):
        raise ValueError(f"{having!r} is no other label of {folder} than those that {edit.key} changes")
    rows = (rows[rows[having] == 1] if having else rows).drop_duplicates("patient_id")
    if len(rows) < count:
        found = f"{len(rows)} patients of split {split!r} in {folder}" + (f" with {having!r}" if having else "")
        raise ValueError(f"{edit.key} applies to {found}; {count} were asked for")
    return rows.head(count).reset_index(drop=True)


def edit_jobs(pipe: Pipe, jobs: Sequence[Job], size: int = 0) -> list[list[Made]]:
    """What the editors of each job make of its images, on all cores; of a job, the first inverts for all.

    Jobs are cut into batches of ``size`` (by default `devices.batch_for`) that processes of one thread share, so
    results do not depend on their number.
    """
    size = size or devices.batch_for(pipe)
    numbers, batches = [], []
    for number, (images, pairs, change, editors) in enumerate(jobs):
        for editor in editors:
            editor.effect(pipe, pairs)  # settings that do not suit an edit are refused before any work
        for part in (slice(first, first + size) for first in range(0, len(images), size)):
            numbers.append(number)
            batches.append((images[part], pairs[part], change, editors))
    count = devices.copies_for(pipe, len(batches))
    made = [[Made([], 0.0, 0) for _ in editors] for *_, editors in jobs]
    worked = tqdm(devices.with_copies(pipe, _edit_batch, batches, count), "edit batches", len(batches), leave=False)
    for number, batch in zip(numbers, worked, strict=True):
        for place, (results, seconds, rows) in enumerate(batch):
            before = made[number][place]
            made[number][place] = Made(before.results + results, before.seconds + seconds / count, before.rows + rows)
    return made


def _edit_batch(pipe: Pipe, batch: Job) -> Sequence[Made]:
    """What each editor makes of a batch; the inversion counts for the first."""
    images, pairs, change, editors = batch
    made: list[Made] = []
    inverted: Any = None
    rows: list[int] = []  # of every forward call of the U-Net: one row is one evaluation; gradients do not count
    with pipe.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))):
        for editor in editors:
            rows.clear()
            with Timer() as timer:
                inverted = inverted if made else editor.invert(pipe, images, pairs)
                results = editor.edit(pipe, inverted, pairs, change)
            made.append(Made(results, timer.seconds, sum(rows)))
    return made


def evaluate_edits(pipe: Pipe, folder: Folder, cases: Cases, editor: Editor, judge: Judge = None) -> list[Evaluation]:
    """Edit and measure the images of all ``cases``, on all cores."""
    jobs = [
        (read_images(folder, rows), prompt_pairs(folder, rows, change), change, [editor])
        for change, rows in cases.items()
    ]
    return [
        evaluate_results(folder, rows, change, made.results, judge, made.seconds)
        for (change, rows), (made,) in zip(cases.items(), edit_jobs(pipe, jobs), strict=True)
    ]


def evaluate_results(
    folder: Folder, cases: pd.DataFrame, change: Edit, edited: Results, judge: Judge = None, seconds: float = 0.0
) -> Evaluation:
    """Measure what any method made of the images of ``cases``, one result a row and in their order."""
    if len(edited) != len(cases):
        raise ValueError(f"{len(cases)} images of {change.key} need as many results, got {len(edited)}")
    # A null edit ("unchanged") has no pixel that had to change, so there is no truth to compare with.
    known = true_counterfactual(folder, cases, change) if change.attributes else None
    pairs, settings = tuple(each.pair for each in edited), tuple(dict.fromkeys(each.settings for each in edited))
    names = ("factual", "image", "raw", "reconstruction", "mask")
    factual, image, raw, decoded, mask = (stack(edited, name) for name in names)
    truth, table = (known and known.images, known and known.changed), cases[["file_name", "patient_id"]]
    parts = (factual, image, raw, decoded, mask, *truth)
    evaluation = Evaluation(change, table, pairs, *parts, seconds, settings, load_vocabulary(folder))
    columns = _of_pixels(evaluation, known and known.marker)
    if judge is not None:
        columns |= _by_judge(evaluation, judge)
    return replace(evaluation, table=evaluation.table.assign(**columns))


def reread(evaluation: Evaluation, judge: Classifier) -> Evaluation:
    """The same results, read by another judge: a table of its numbers alone."""
    table = evaluation.table[["file_name", "patient_id"]]
    return replace(evaluation, table=table.assign(**_by_judge(evaluation, judge)))


def batch_difference(pipe: Pipe, evaluation: Evaluation, editor: Editor) -> float:
    """Largest difference of any pixel between up to four evaluated images and the same edited one by one."""
    e = evaluation
    (alone,) = edit_jobs(pipe, [(e.factual[:4], e.pairs[:4], e.edit, [editor])], size=1)[0]
    return float((stack(alone.results) - e.edited[:4]).abs().max())


def composition(pipe: Pipe, folder: Folder, cases: pd.DataFrame, editor: Editor) -> pd.DataFrame:
    """Edit nothing: per image `metrics.relative_l1` of the composite (`image`) and of the decoded latents (`raw`)."""
    (e,) = evaluate_edits(pipe, folder, {Edit(): cases}, editor)
    image, raw = (metrics.relative_l1(images, e.factual, e.reconstruction).tolist() for images in (e.edited, e.raw))
    return cases[["file_name", "patient_id"]].assign(image=image, raw=raw)


def reversibility(pipe: Pipe, evaluation: Evaluation, editor: Editor) -> pd.DataFrame:
    """Undo an evaluated edit: a row per image, `metrics.relative_l1` of what comes back in column `image`."""
    e = evaluation
    back = [PromptPair(pair.target, pair.source, pair.target_words, pair.source_words, pair.side) for pair in e.pairs]
    (returned,) = edit_jobs(pipe, [(e.edited, back, Edit(remove=e.edit.add, add=e.edit.remove), [editor])])[0]
    distances = metrics.relative_l1(stack(returned.results), e.factual, e.reconstruction)
    return e.table[["file_name", "patient_id"]].assign(image=distances.tolist())


def load_features(name: str, judge: Judge, folder: Folder) -> Judge:
    """The classifier whose features `realism` reads: of that name, or the judge; None and a warning if it has none."""
    features = Classifier.load(name) if name else judge
    try:
        if features:
            features.features(read_images(folder, load_table(folder).head(1)))
    except ValueError as error:
        if name:
            raise
        logging.getLogger(__name__).warning("KID and FID are not measured: %s", error)
        return None
    return features


def realism(
    evaluations: Sequence[Evaluation], folder: Folder, features: Judge, split: str = "test", limit: int = 512
) -> pd.DataFrame:
    """A row per edit: `kid` and `fid` of the edited images, and of the same unedited, to real images of a split.

    The real ones, up to ``limit``, are other patients' with the edit's target state. An edit has no row if either side
    has fewer than two images, or if the table does not say which rows have a detail; none has one without features.
    """
    rows: dict[str, dict[str, float]] = {}
    for e in evaluations:
        table, undone = load_table(folder, split), Edit(remove=e.edit.add, add=e.edit.remove)
        details = {*undone.remove} & {*e.vocab.owners}
        others = table[~table["patient_id"].isin(e.table["patient_id"])]
        unknown = any(not says_details(table, e.vocab.owners[name]) for name in details)
        if features is None or not e.edit.attributes or unknown:
            continue
        real = editable(others, undone, e.vocab).head(limit)
        if min(len(real), len(e.table)) > 1:
            read = torch.cat([features.features(part) for part in image_batches(folder, real)])
            rows[e.edit.key] = {"images": float(len(e.table)), "real_images": float(len(real))}
            for name, images in (("", e.edited), ("_unedited", e.factual)):
                own = features.features(images)
                rows[e.edit.key] |= {f"kid{name}": metrics.kid(own, read), f"fid{name}": metrics.fid(own, read)}
    return pd.DataFrame.from_dict(rows, orient="index")


def _of_pixels(e: Evaluation, marker: Tensor | None) -> dict[str, Any]:
    """Numbers of the images alone and, where it is known, against the truth."""
    open_pixels = e.mask > 0
    columns = {
        "identity_l1": metrics.l1(e.edited, e.factual),
        "reconstruction_l1": metrics.l1(e.reconstruction, e.factual),
        "raw_l1": metrics.l1(e.raw, e.factual),
        "mask_share": open_pixels.float().mean((1, 2, 3)),
        "changed_outside_mask": metrics.changed_fraction_outside(e.edited, e.factual, open_pixels),
    }
    if e.truth is not None and e.truth_mask is not None and marker is not None:
        # Pixels of the marker that the true counterfactual leaves alone: a lead that crosses the letter is fair.
        marker_changed = (e.edited != e.factual).any(1, keepdim=True) & marker & ~e.truth_mask
        columns |= {
            "true_error_ratio": metrics.true_error_ratio(e.edited, e.truth, e.factual, e.truth_mask),
            "mask_recall": metrics.mask_recall(open_pixels, e.truth_mask),
            "mask_area_ratio": metrics.mask_area_ratio(open_pixels, e.truth_mask),
            "latent_outside_l1_ratio": metrics.outside_l1_ratio(e.raw, e.reconstruction, e.factual, e.truth_mask),
            "marker_changed": marker_changed.flatten(1).sum(1),
        }
    return {name: values.tolist() for name, values in columns.items()}


def _by_judge(e: Evaluation, judge: Classifier) -> dict[str, Any]:
    """Probabilities of the edited label before and after, CPG, and how many other labels flipped."""
    before, after = judge.read(e.factual), judge.read(e.edited)
    owners = e.vocab.owners
    changed = [owners.get(name, name) for name in (*e.edit.remove, *e.edit.add)]
    others = [k for k, label in enumerate(judge.labels) if label not in changed]
    columns: dict[str, Any] = {}
    # A label of which one detail is removed may still be present by another, so no reading is expected.
    decided = not any(name in owners for name in e.edit.remove)
    if len(changed) == 1 and changed[0] in judge.labels and decided:
        column, target = judge.labels.index(changed[0]), int(bool(e.edit.add))
        p_before, p_after = before[:, column], after[:, column]
        columns = {
            "p_before": p_before.tolist(),
            "p_after": p_after.tolist(),
            "cpg": metrics.counterfactual_prediction_gain(p_before, p_after, target).tolist(),
            "flipped": ((p_after >= 0.5) == bool(target)).float().tolist(),
        }
    if others:
        columns["side_effect_rate"] = metrics.side_effect_rate(before[:, others], after[:, others]).tolist()
    return columns


def summarise(evaluation: Evaluation, seed: int = 0) -> dict[str, float]:
    """`summarise_rows` of an evaluation; the flip rate is of images that the judge did not first read as the target."""
    table = evaluation.table
    summary = summarise_rows(table.drop(columns=["p_before", "p_after", "flipped"], errors="ignore"), seed)
    if "flipped" in table:
        can_flip = table[(table["p_before"] < 0.5) == bool(evaluation.edit.add)]
        summary["flip_denominator"] = float(len(can_flip))
        if len(can_flip):
            summary |= interval("flip_rate", can_flip["flipped"], can_flip["patient_id"], seed)
    return summary


def summarise_rows(table: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """Means with 95 % bootstrap intervals over patients: ``{metric, metric_low, metric_high}`` for each column."""
    summary = {"images": float(len(table))}
    for name in table.columns.drop(["file_name", "patient_id"]):
        summary |= interval(name, table[name], table["patient_id"], seed)
    return summary


def interval(name: str, values: pd.Series, patients: pd.Series, seed: int) -> dict[str, float]:
    """Mean of a column with its bootstrap interval over patients, or alone where there is one patient."""
    if patients.nunique() < 2:
        return {name: float(values.mean())}
    return metrics.bootstrap_ci(torch.tensor(values.to_numpy(float)), patients.tolist(), seed=seed).named(name)


def notes(evaluation: Evaluation) -> list[str]:
    """A short text per image for the margin of a sheet."""
    words = {"true_error_ratio": "error", "cpg": "CPG", "mask_recall": "recall"}
    shown = [name for name in words if name in evaluation.table]
    return ["\n".join(f"{words[n]} {row[n]:.2f}" for n in shown) for row in evaluation.table.to_dict("records")]
