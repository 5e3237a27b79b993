"""What an edit changed, where its words looked, and what it does to a classifier.

Statistics by region, attention maps and a film of the change; the effects of edits on a classifier's logit, by
subgroup and against the truth; the smallest edit that flips its answer, and whether another classifier agrees.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.data.folder import Folder, load_table, read_images
from prism_lib.data.rows import prompt_pairs
from prism_lib.editing.counterfactuals import Counterfactual, sweep
from prism_lib.editing.denoising import EditTask, denoise
from prism_lib.editing.inversion import Inversion
from prism_lib.editing.masks import Areas
from prism_lib.editing.settings import EditConfig, Settings, resolved
from prism_lib.evaluation.evaluate import Evaluation, Judge, interval, summarise_rows
from prism_lib.files import atomic
from prism_lib.language.edits import Edit, Pairs
from prism_lib.models.classifier import Classifier
from prism_lib.models.pipeline import Pipe
from prism_lib.models.schedule import Schedule
from prism_lib.studies.comparison import vary
from prism_lib.studies.editors import PromptToPrompt

RESPONSES = ("change", "true_change", "probability_change", "flipped", "true_flipped")
Swept = Sequence[tuple[str, Counterfactual]]  # what edits under several settings make of an image, by name


def region_statistics(edited: Tensor, original: Tensor, regions: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row per image and region: how much of the change lies there, and of which sign.

    Images are (N, C, H, W), regions boolean (N, 1, H, W). `brighter` and `darker` are shares of the region's pixels,
    `share_of_change` is that of the image's absolute change (NaN where nothing changed).
    """
    if edited.shape != original.shape:
        raise ValueError(f"edited has shape {tuple(edited.shape)}, original {tuple(original.shape)}")
    difference = (edited - original).mean(1, keepdim=True)
    total = difference.abs().sum((1, 2, 3))
    tables = []
    for name, region in regions.items():
        if region.shape != difference.shape or region.dtype != torch.bool:
            raise ValueError(f"region {name!r} must be boolean {tuple(difference.shape)}, got {tuple(region.shape)}")
        if empty := (~region.flatten(1).any(1)).nonzero().flatten().tolist():
            raise ValueError(f"region {name!r} of image {empty[0]} is empty")
        inside, pixels = difference * region, region.sum((1, 2, 3))
        size = inside.abs()
        means = {"brighter": inside > 0, "darker": inside < 0, "mean_change": inside, "mean_absolute_change": size}
        columns = {key: values.sum((1, 2, 3)) / pixels for key, values in means.items()}
        columns = {"pixels": pixels, **columns, "share_of_change": size.sum((1, 2, 3)) / total}
        values = {key: column.tolist() for key, column in columns.items()}
        tables.append(pd.DataFrame({"image": range(len(pixels)), "region": name, **values}))
    return pd.concat(tables, ignore_index=True)


def mask_regions(mask: Tensor) -> dict[str, Tensor]:
    """Regions for `region_statistics` from a soft mask (1, 1, H, W): where it is open, and elsewhere, if any."""
    regions = {"inside the mask": mask > 0, "outside": mask == 0}
    return {name: region for name, region in regions.items() if bool(region.any())}


@torch.no_grad()
def attention_maps(pipe: Pipe, inversion: Inversion, pairs: Pairs, settings: Settings) -> tuple[Tensor, Tensor]:
    """Where the words of each edit looked, in source and in target: two times (N, 1, H, W), each map's maximum 1.

    Cross-attention to the edit's words, averaged over heads, coarse layers and the steps of `editing.edit`
    (Hertz et al., 2023). A prompt without such words has a map of zeros.
    """
    if len(pairs) != len(inversion):
        raise ValueError(f"{len(inversion)} inverted images need as many prompt pairs, got {len(pairs)}")
    steps = inversion.schedule.num_steps
    tasks = [EditTask(n, pair, resolved(pipe, pair, steps, settings)) for n, pair in enumerate(pairs)]
    with tqdm(total=inversion.start * len(tasks), desc="attention", leave=False) as progress:
        outcome = denoise(pipe, inversion, tasks, Areas(), progress)
    maps = outcome.word_maps[list(outcome.row_of)].float().cpu()
    maps = F.interpolate(maps, size=inversion.images.shape[-2:], mode="bilinear", align_corners=False)
    source, target = (maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)).split(1, dim=1)
    return source, target


def schedule(config: EditConfig, pipe: Pipe, num_inference_steps: int) -> pd.DataFrame:
    """Whose attention the edited image uses, a row per step in the order they run (the noisiest first).

    Columns: `timestep`; `cross` (which word each place looks at) and `self` (which places belong together), each
    "source" or "own"; `local_blend`, whether latents far from the edit's words return to the source.
    """
    levels, count = Schedule.from_config(pipe.scheduler.config, num_inference_steps), num_inference_steps
    columns: dict[str, list[object]] = {"timestep": [levels.timesteps[count - step] for step in range(count)]}
    for name, share in {"cross": config.cross_replace_steps, "self": config.self_replace_steps}.items():
        columns[name] = ["source" if step < round(share * count) else "own" for step in range(count)]
    columns["local_blend"] = [config.local_blend and step / count >= config.local_blend_start for step in range(count)]
    return pd.DataFrame(columns, index=pd.RangeIndex(1, count + 1, name="step"))


def save_transition(original: Tensor, edited: Tensor, path: Path) -> Path:
    """From original to edited and back, (1 or 3, H, W) in [0, 1], as a GIF of linear mixtures, repeated; 2 seconds."""
    if original.shape != edited.shape or original.ndim != 3 or original.shape[0] not in (1, 3):
        raise ValueError(f"images must be (1 or 3, H, W), got {tuple(original.shape)} and {tuple(edited.shape)}")
    there = torch.linspace(0, 1, 12)
    shares = torch.cat([there, there.flip(0)[1:-1]])[:, None, None, None]
    mixtures = (original + shares * (edited - original)).clamp(0, 1)
    pixels = (mixtures * 255).round().byte().permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()
    first, *rest = [Image.fromarray(frame) for frame in pixels]
    more = {"save_all": True, "append_images": rest, "duration": round(2000 / len(pixels)), "loop": 0}
    with atomic(path) as partial:
        first.save(partial, format="GIF", **more)
    return path


def subgroups(folder: Folder, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a folder's table as text, by file name; numbers of more than six values are cut into thirds."""
    table = load_table(folder).set_index("file_name")
    if absent := [column for column in columns if column not in table]:
        has = ", ".join(table.columns.map(str))
        raise ValueError(f"{folder} has no column {absent[0]!r} for subgroups; it has {has}")
    return table[[*columns]].apply(_bands)


def responses(
    result: Evaluation, classifiers: Mapping[str, Classifier], label: str, groups: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row per classifier and image: logits of ``label`` `before` and `after` the edit, `change`, `flipped` (0 or 1).

    `true_change` and `true_flipped` are those of the true counterfactual, where known; ``groups`` are `subgroups`.
    """
    e, tables = result, []
    about = e.table[["file_name", "patient_id"]].assign(edit=e.edit.key)
    if groups is not None:
        about = about.join(groups, "file_name")
    for name, classifier in classifiers.items():
        one = classifier.only([label])
        before, after, *truth = (one.logits(i)[:, 0] for i in (e.factual, e.edited, e.truth) if i is not None)
        columns = {"before": before, "after": after, "probability_change": after.sigmoid() - before.sigmoid()}
        for prefix, logits in zip(("", "true_"), (after, *truth), strict=False):
            columns[f"{prefix}change"] = logits - before
            columns[f"{prefix}flipped"] = ((logits >= 0) != (before >= 0)).float()
        tables.append(about.assign(classifier=name, **{key: values.tolist() for key, values in columns.items()}))
    return pd.concat(tables, ignore_index=True)


def effects(table: pd.DataFrame, groups: Sequence[str] = (), seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Classifier -> edit, and "edit, column value" of each subgroup -> means with 95 % intervals over patients.

    `effect_ratio` is the mean change over that of the true counterfactuals, `rank_correlation` Spearman's over images.
    """
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for (name, key), part in table.groupby(["classifier", "edit"], sort=False):
        rows = summary.setdefault(str(name), {})
        rows[str(key)] = _effect(part, seed)
        for column in groups:
            rows |= {f"{key}, {column} {value}": _effect(some, seed) for value, some in part.groupby(column)}
    return summary


def _effect(part: pd.DataFrame, seed: int) -> dict[str, float]:
    summary = summarise_rows(part[["file_name", "patient_id", *(name for name in RESPONSES if name in part)]], seed)
    if "true_change" in part and len(part) > 2 and part["true_change"].any():
        summary["effect_ratio"] = float(part["change"].mean() / part["true_change"].mean())
        summary["rank_correlation"] = float(part["change"].corr(part["true_change"], method="spearman"))
    return {name: value for name, value in summary.items() if math.isfinite(value)}


def _bands(values: pd.Series) -> pd.Series:
    """A column as text; numbers of more than six values in thirds ("41 to 66"), missing ones as "unknown"."""
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 6:
        cut = pd.qcut(values, 3, duplicates="drop")
        values = cut.map(lambda band: f"{band.left:.3g} to {band.right:.3g}", na_action="ignore")
    return values.astype(object).where(values.notna(), "unknown").astype(str)


def sweep_edits(
    pipe: Pipe,
    folder: Folder,
    rows: pd.DataFrame,
    edits: Sequence[Edit],
    editor: PromptToPrompt,
    values: Mapping[str, Sequence[float]],
) -> list[list[tuple[str, Counterfactual]]]:
    """What every edit under every value of settings makes of each image: ("remove_edema, guidance_scale 2", result)."""
    variants = vary(editor, **values)
    images, swept = read_images(folder, rows), [list[tuple[str, Counterfactual]]() for _ in range(len(rows))]
    for edit in edits:
        pairs = prompt_pairs(folder, rows, edit)
        names = [f"{edit.key}, {name}".removesuffix(", ") for name in variants]
        made = sweep(pipe, editor.invert(pipe, images, pairs), pairs, [one.settings for one in variants.values()])
        for own, results in zip(swept, made, strict=True):
            own += zip(names, results, strict=True)
    return swept


def smallest_flips(
    rows: pd.DataFrame, swept: Sequence[Swept], classifier: Classifier, label: str, judge: Judge = None
) -> pd.DataFrame:
    """The result of least mean absolute change that flips a classifier's answer for ``label``, for each image.

    A row per image that it reads as present: `flipped` (0 where no result does), the `result` with its `edit`, `note`
    and `size` of change, and `confirmed`: the ``judge``, which has not chosen, changes its answer as well.
    """
    found = []
    for name, patient, candidates in zip(rows["file_name"], rows["patient_id"], swept, strict=True):
        images = torch.stack([candidates[0][1].factual, *(result.image for _, result in candidates)])
        before, *after = classifier.only([label]).logits(images)[:, 0].tolist()
        sizes = {place: candidates[place][1].scores["change"] for place, logit in enumerate(after) if logit < 0}
        if before < 0:
            continue
        row = {"file_name": name, "patient_id": patient, "flipped": float(bool(sizes)), "edit": ""}
        if sizes:
            place = min(sizes, key=sizes.__getitem__)
            edit, result = candidates[place]
            note = f"{edit.replace(', ', chr(10))}\nlogit {before:.1f} to {after[place]:.1f}"
            row |= {"edit": edit, "size": sizes[place], "result": result, "note": note}
            if judge is not None:
                answers = judge.only([label]).read(images[[0, place + 1]])[:, 0] >= 0.5
                row["confirmed"] = float(answers[0] != answers[1])
        found.append(row)
    columns = ["file_name", "patient_id", "flipped", "confirmed", "edit", "size", "note", "result"]
    return pd.DataFrame(found, columns=columns)


def smallest_summary(table: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """Shares and means of `smallest_flips` with intervals over patients, and the share of each edit."""
    summary = {"images": float(len(table))}
    for name in ("flipped", "confirmed", "size"):
        if len(known := table.dropna(subset=name)):
            summary |= interval(name, known[name], known["patient_id"], seed)
    chosen = table.loc[table["flipped"] == 1, "edit"].str.split(",").str[0]
    return summary | {f"chosen {edit}": float(share) for edit, share in chosen.value_counts(normalize=True).items()}
