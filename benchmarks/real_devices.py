"""Does a judge of rendered devices read real ones, and does it still after a model has removed them?

``python -m benchmarks.real_devices PREPARED_FOLDER JUDGE_FOLDER [--model MODEL]`` writes the record `real_devices`. The
prepared folder has films with the label "Support Devices" that were read by eye, such as Hannover's by the adapter
"table", of the size that the model was trained on. The judge is the shipped `film-judge`, or a folder below
PRISM_RUNS/judges that 03 left. `auc` is the judge's, on the films as they are.

With a model, devices are removed from the films that have them. `below_half` is the share of these films whose
probability is below 0.5 afterwards, `below_half_as_it_is` before; `flip_rate` is over the films that were read as films
with devices. Where readers drew the devices of a film (`drawn_devices.DRAWN`), `left` is how much of them is still
seen, as the mean over devices of the amount of their contrast: 0 is nothing, 1 all of it. `left_dark` is the share of
devices in whose place a dark trace of more than a quarter of their contrast is. `named_left` and `others_left` are of
edits of one kind by name, on films on which several kinds were drawn that have a name in the vocabulary: of its own
devices, and of the others that have a name, which an edit should leave (1).
Intervals are over patients. The true film without the devices is not known: look at the images as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

from benchmarks.drawn_devices import load_devices, residuals
from prism_lib import devices, records
from prism_lib.data import load_info, load_table, load_vocabulary, prompt_pairs, read_images
from prism_lib.data.chest import DEVICES
from prism_lib.data.rows import NO_DEVICES
from prism_lib.editing import edit, invert, stack
from prism_lib.evaluation import interval, judge_auc
from prism_lib.language import Edit
from prism_lib.models import load_pipeline
from prism_lib.models.classifier import Classifier
from prism_lib.models.pipeline import image_factor

HALF, DARK = 0.5, 0.25


def removed(
    pipe: StableDiffusionPipeline, judge: Classifier, folder: Path, films: pd.DataFrame, steps: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Remove devices from films (rows of a prepared table): patient, `p_before` and `p_after` by the judge.

    The second table has the drawn devices: patient, kind and `left`.
    """
    column, size, parts, drawn = judge.labels.index(DEVICES), devices.batch_for(pipe), [], list[pd.DataFrame]()
    for first in tqdm(range(0, len(films), size), desc="remove devices"):
        rows = films.iloc[first : first + size]
        images, pairs = read_images(folder, rows), prompt_pairs(folder, rows, NO_DEVICES)
        inversion = invert(pipe, images, [pair.source for pair in pairs], num_inference_steps=steps, batch_size=size)
        edited = stack(edit(pipe, inversion, pairs))
        read = {"p_before": judge.read(images)[:, column], "p_after": judge.read(edited)[:, column]}
        parts.append(rows[["patient_id"]].assign(**{name: values.tolist() for name, values in read.items()}))
        drawn += [
            left_of(Path(row["file_name"]).stem, row["patient_id"], film[0].numpy(), after[0].cpu().numpy())
            for row, film, after in zip(rows.to_dict("records"), images, edited, strict=True)
        ]
    return pd.concat(parts, ignore_index=True), pd.concat(drawn, ignore_index=True)


def by_name(pipe: StableDiffusionPipeline, folder: Path, films: pd.DataFrame, steps: int) -> pd.DataFrame:
    """Each drawn kind removed alone: patient, film, the kind `removed`, and `kind` and `left` of every device."""
    kinds, found = {*load_vocabulary(folder).owners}, list[pd.DataFrame]()
    for row in tqdm(films.to_dict("records"), desc="one kind by name"):
        name, film, table = Path(row["file_name"]).stem, read_images(folder, pd.DataFrame([row])), pd.DataFrame([row])
        shown = kinds & {device.kind for device in load_devices({name: film[0, 0].numpy()})[name]}
        for kind in sorted(shown) if len(shown) > 1 else []:
            pairs = prompt_pairs(folder, table, Edit(remove=(kind,)))
            (result,) = edit(pipe, invert(pipe, film, [pairs[0].source], num_inference_steps=steps), pairs)
            left = left_of(name, row["patient_id"], film[0, 0].numpy(), result.image[0].cpu().numpy())
            left = left[left["kind"].isin(kinds)].assign(removed=kind, film=name)
            if left["kind"].eq(kind).any() and left["kind"].ne(kind).any():  # some of both show
                found.append(left)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def left_of(name: str, patient: str, film: np.ndarray, edited: np.ndarray) -> pd.DataFrame:
    """The drawn devices of a film (H, H) that show: patient, kind and the share of their contrast that is `left`."""
    (drawn,) = load_devices({name: film}).values()
    left = residuals(film, edited, drawn)
    table = pd.DataFrame({"kind": [device.kind for device in drawn], "left": left, "patient_id": patient})
    return table.dropna(subset="left")


def summarise(read: pd.DataFrame, drawn: pd.DataFrame, named: pd.DataFrame, seed: int) -> dict[str, float]:
    """Means over the films and drawn devices of `removed` and `by_name`, with intervals over patients."""
    before, after, patients = read["p_before"] < HALF, read["p_after"] < HALF, read["patient_id"]
    summary = {"films_edited": float(len(read)), "flip_denominator": float((~before).sum())}
    values = {
        "below_half": after,
        "below_half_as_it_is": before,
        "p_before": read["p_before"],
        "p_after": read["p_after"],
    }
    for name, column in values.items():
        summary |= interval(name, column, patients, seed)
    if not before.all():
        summary |= interval("flip_rate", after[~before], patients[~before], seed)
    if len(drawn):
        amount = drawn["left"].abs().clip(upper=1)
        summary |= {"drawn_devices": float(len(drawn))} | interval("left", amount, drawn["patient_id"], seed)
        summary |= interval("left_dark", drawn["left"] < -DARK, drawn["patient_id"], seed)
        summary |= {f"left of {kind}": float(some.mean()) for kind, some in amount.groupby(drawn["kind"])}
    if len(named):
        summary["named_edits"] = float(len(named.drop_duplicates(["film", "removed"])))
        amount, own = named["left"].abs().clip(upper=1), named["kind"] == named["removed"]
        for name, which in (("named_left", own), ("others_left", ~own)):
            summary |= interval(name, amount[which], named["patient_id"][which], seed)
        for kind, some in amount.groupby(named["removed"]):
            summary[f"named {kind}: left"] = float(some[own].mean())
            summary[f"named {kind}: others left"] = float(some[~own].mean())
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="prepared folder of real films with the label Support Devices")
    parser.add_argument("judge", type=Path, help="a shipped judge, or a folder")
    parser.add_argument("--split", default="test", help="split of the prepared folder")
    parser.add_argument("--model", default="", help="removes devices: a folder (also below PRISM_RUNS) or a hub id")
    parser.add_argument("--films", type=int, default=1000, help="largest number of films to edit")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--dataset", default="films", help="names the figures folder")
    given = parser.parse_args(arguments)
    judge, table = Classifier.load(given.judge), load_table(given.folder, given.split)
    if DEVICES not in judge.labels or DEVICES not in table:
        parser.error(f"{given.judge} and {given.folder} must both have the label {DEVICES!r}")
    films = table[table[DEVICES] == 1].head(given.films)
    if films.empty:
        parser.error(f"split {given.split!r} of {given.folder} has no film with devices")
    pipe, size = load_pipeline(given.model) if given.model else None, load_info(given.folder)["config"]["size"]
    if pipe is not None and size != (own := pipe.unet.config.sample_size * image_factor(pipe.vae)):
        parser.error(f"{given.folder} has films of {size} pixels, {given.model} edits {own}")
    load_devices({})  # before any edit: is the file as it should be?
    with records.Timer() as timer:
        reading = judge_auc(judge, given.folder, given.split, seed=given.seed).loc[DEVICES].drop("judged").dropna()
        known = table[table[DEVICES].isin([0, 1])]
        metrics = {"patients": known["patient_id"].nunique()} | {str(name): value for name, value in reading.items()}
        if pipe is not None:
            named = by_name(pipe, given.folder, films, given.steps)
            metrics |= summarise(*removed(pipe, judge, given.folder, films, given.steps), named, given.seed)
    written = records.record(
        "real_devices",
        dataset=given.dataset,
        notebook="benchmarks/real_devices.py",
        parameters={"folder": given.folder, "judge": given.judge, "split": given.split, "steps": given.steps},
        seed=given.seed,
        metrics=metrics,
        model=given.model or str(given.judge.name),
        seconds=timer.seconds,
    )
    tqdm.write(f"{written}")


if __name__ == "__main__":
    main()
