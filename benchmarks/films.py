"""Devices removed from real films, against the truth: `python -m benchmarks.films DATA` writes its record.

DATA is a prepared folder of the data set "films". Fresh devices, drawn here and never trained on, are rendered into
the films of held-out patients that show none, so the true counterfactual is the film itself. The record
figures/films/film_removal.json holds our editor's numbers over all devices, and its error by kind inside the pixels
that this kind alone changes. `named` has edits of one kind in films with several: the error to the film without this
kind, and the share of the other devices that went with it. A judge reads films with devices, without, and edited: its
AUC, and the flips, the share read as without devices after the edit of those read as with devices before. Methods to
compare with edit the first films again: two masks on edit-friendly inversion, SDEdit from the same little noise, and
biharmonic inpainting (Chui & Mhaskar, 2010) of our mask and of the true one, which only a benchmark knows. LEDITS++ is
not among them: diffusers' has four channels of latents.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from skimage.restoration import inpaint_biharmonic
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib import records
from prism_lib.data import load_info, load_table, load_vocabulary, read_images
from prism_lib.data.chest import DEVICES
from prism_lib.data.rows import NO_DEVICES
from prism_lib.editing import Counterfactual, edit, invert
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import interval
from prism_lib.files import stable_seed
from prism_lib.language import Edit
from prism_lib.language.edits import PromptPair
from prism_lib.models import load_pipeline
from prism_lib.models.classifier import Classifier
from prism_lib.phantom import with_devices
from prism_lib.phantom.films import KINDS
from prism_lib.studies.editors import SDEdit, TwoMasks

COLUMNS = ["error", "mask_recall", "mask_area_ratio", "changed_outside_mask", "outside_l1_ratio"]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help='prepared folder of the data set "films"')
    parser.add_argument("--model", default="film-sd")
    parser.add_argument("--judge", default="film-judge")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=200, help="films with devices, several of a film where few films")
    parser.add_argument("--compared", type=int, default=16, help="of them for the methods to compare with")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="decides the devices")
    options = parser.parse_args()
    films = clean_films(options.data, options.split, options.images)
    pipe, judge = load_pipeline(options.model), Classifier.load(options.judge).only([DEVICES])
    found, rows = dict[str, dict[str, float]](), []
    by_kind, named = list[dict[str, object]](), list[dict[str, object]]()
    with records.Timer() as timer:
        for place, film in enumerate(tqdm(films.to_dict("records"), "films")):
            case = Case(options.data, film, stable_seed(options.seed, film["file_name"], place))
            begin = time.perf_counter()
            result = remove(pipe, case, options.steps)
            spent = time.perf_counter() - begin
            row = case.measured(result) | {"seconds": spent, "patient_id": film["patient_id"]}
            p = judge.read(torch.cat([case.truth, case.image, result.image[None].cpu()]))[:, 0].tolist()
            rows.append(row | dict(zip(("p_truth", "p_before", "p_after"), p, strict=True)))
            by_kind += case.by_kind(result)
            named += case.named(pipe, options.steps)
    table = pd.DataFrame(rows)
    found["ours"] = summary(table, options.seed) | {"seconds": float(table["seconds"].mean())}
    found["judge"] = judged(table, options.seed)
    for prefix, measured in (("", by_kind), ("named: ", named)):
        for kind, some in pd.DataFrame(measured).groupby("kind") if measured else ():
            found[f"{prefix}{kind}"] = {"images": float(len(some))}
            for column in some.columns.drop(["kind", "patient"]):
                found[f"{prefix}{kind}"] |= interval(column, some[column], some["patient"], options.seed)
    found |= compared(pipe, options.data, films.head(options.compared), table, options)
    records.record(
        "film_removal",
        dataset="films",
        notebook="benchmarks/films.py",
        parameters={"images": options.images, "split": options.split, "steps": options.steps},
        seed=options.seed,
        metrics=found,
        model=options.model,
        seconds=timer.seconds,
    )


def clean_films(folder: Path, split: str, count: int) -> pd.DataFrame:
    """``count`` rows of films that were screened and show no devices, the first of each patient first, in rounds."""
    if load_info(folder)["source"] != "films":
        raise SystemExit(f'{folder} does not hold the data set "films": prepare it with 01_data')
    table = load_table(folder, split)
    clean = table[table[DEVICES].eq(0) & ~table["rendered"] & table["copy"].eq(0)]
    if clean.empty:
        raise SystemExit(f"{folder} has no screened film without devices in split {split!r}")
    order = clean.assign(turn=clean.groupby("patient_id").cumcount()).sort_values("turn", kind="stable")
    return pd.concat([order] * (count // len(order) + 1)).head(count).drop(columns="turn")


class Case:
    """A film, the same with devices, and what had to change: (1, 1, H, W) each."""

    def __init__(self, folder: Path, film: dict, seed: int) -> None:
        self.truth = read_images(folder, pd.DataFrame([film]))
        self.seed, rendered = seed, with_devices(self.truth, [seed])
        self.vocabulary = load_vocabulary(folder)
        self.image, self.changed, (self.kinds,) = rendered.images, rendered.mask, rendered.kinds
        self.labels = {label: film[label] for label in load_info(folder)["labels"]} | {DEVICES: 1.0}
        self.pair = NO_DEVICES.prompts(self.labels, self.vocabulary)
        self.patient = film["patient_id"]

    def measured(self, result: Counterfactual) -> dict[str, float]:
        """The numbers of one result; errors are shares of the unedited film's."""
        image, mask = result.image[None].cpu(), result.mask[None].cpu()
        outside = metrics.outside_l1_ratio(result.raw[None], result.reconstruction[None], self.image, self.changed)
        return {
            "error": self.error(image, self.changed),
            "mask_recall": metrics.mask_recall(mask > 0, self.changed).item(),
            "mask_area_ratio": metrics.mask_area_ratio(mask > 0, self.changed).item(),
            "changed_outside_mask": metrics.changed_fraction_outside(image, self.image, mask > 0).item(),
            "outside_l1_ratio": outside.item(),
        }

    def error(self, image: Tensor, where: Tensor) -> float:
        return metrics.true_error_ratio(image, self.truth, self.image, where).item()

    def by_kind(self, result: Counterfactual) -> list[dict[str, object]]:
        """The error inside the pixels that each kind of device alone changes."""
        rows = []
        for kind in self.kinds:
            where = with_devices(self.truth, [self.seed], [kind]).mask & self.changed
            if where.any():
                rows.append({"kind": kind, "error": self.error(result.image[None], where), "patient": self.patient})
        return rows

    def named(self, pipe: StableDiffusionPipeline, steps: int) -> list[dict[str, object]]:
        """Each kind that has a name removed alone: its error, and the share of the others that went with it."""
        rows, names = [], [kind for kind in self.kinds if kind in self.vocabulary.owners]
        for kind in names if len(self.kinds) > 1 else []:
            rest = with_devices(self.truth, [self.seed], [other for other in KINDS if other != kind]).images
            own, others = rest != self.image, (rest != self.truth) & (rest == self.image)
            if not own.any() or not others.any():
                continue
            result = remove(pipe, self, steps, Edit(remove=(kind,)).prompts(self.labels, self.vocabulary))
            image = result.image[None].cpu()
            error = metrics.true_error_ratio(image, rest, self.image, own).item()
            gone = ((image - self.image).abs() * others).sum() / ((self.image - self.truth).abs() * others).sum()
            rows.append({"kind": kind, "error": error, "others_gone": gone.item(), "patient": self.patient})
        return rows


def remove(pipe: StableDiffusionPipeline, case: Case, steps: int, pair: PromptPair | None = None) -> Counterfactual:
    """Our editor with the model's own settings."""
    pair = pair or case.pair
    return edit(pipe, invert(pipe, case.image, [pair.source], num_inference_steps=steps), [pair])[0]


def compared(
    pipe: StableDiffusionPipeline, folder: Path, films: pd.DataFrame, ours: pd.DataFrame, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Errors of other methods, and ours, on the same films."""
    errors: dict[str, list[float]] = {"ours": ours["error"].head(len(films)).tolist()}
    last = SDEdit(strength=1.5 / options.steps, guidance_scale=1.0, num_inference_steps=options.steps)
    methods = {"two masks": TwoMasks(num_inference_steps=options.steps), "SDEdit": last}
    for place, film in enumerate(tqdm(films.to_dict("records"), "compared")):
        case = Case(folder, film, stable_seed(options.seed, film["file_name"], place))
        for name, method in methods.items():
            image = method(pipe, case.image, [case.pair], NO_DEVICES)[0].image[None].cpu()
            errors.setdefault(name, []).append(case.error(image, case.changed))
        for name, mask in (("our", remove(pipe, case, options.steps).mask[None] > 0), ("the true", case.changed)):
            filled = inpaint_biharmonic(case.image[0, 0].double().numpy(), mask[0, 0].numpy(), split_into_regions=True)
            image = torch.from_numpy(filled).float().clamp(0, 1)[None, None]
            errors.setdefault(f"inpainting of {name} mask", []).append(case.error(image, case.changed))
    table, patients = pd.DataFrame(errors), films["patient_id"].reset_index(drop=True)
    return {
        f"compared: {name}": {"images": float(len(table))} | interval("error", table[name], patients, options.seed)
        for name in table
    }


def summary(table: pd.DataFrame, seed: int) -> dict[str, float]:
    """Means over patients with intervals."""
    values = {"images": float(len(table))}
    for column in COLUMNS:
        values |= interval(column, table[column], table["patient_id"], seed)
    return values


def judged(table: pd.DataFrame, seed: int) -> dict[str, float]:
    """AUC of films with devices and without, and the flips of those read as with devices, with intervals."""
    readings = torch.tensor([[p, label] for label, name in ((1, "p_before"), (0, "p_truth")) for p in table[name]])
    auc = metrics.bootstrap_ci(readings, 2 * table["patient_id"].tolist(), metrics.auc, seed=seed)
    shown = table[table["p_before"] >= 0.5]
    flips = interval("flips", shown["p_after"] < 0.5, shown["patient_id"], seed)
    return {"images": float(len(table))} | auc.named("auc") | flips


if __name__ == "__main__":
    main()
