"""Chest X-rays: CheXpert (Irvin et al., AAAI 2019), ChestX-ray14 (Wang et al., CVPR 2017), the phantom, rendered films.

Films come as they are and with rendered devices: a pair whose truth is known to the pixel (see `phantom.films`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from prism_lib.data import tables
from prism_lib.data.images import ImageFiles, Picture, Rejection
from prism_lib.data.tables import Source, draw_patients, refuse, split_patients
from prism_lib.files import stable_seed
from prism_lib.language.labels import CHEXPERT_LABELS, NO_FINDING, PHANTOM_LABELS

DEVICES = "Support Devices"
CHEXPERT_COLUMNS = {
    **{"Path": "source_file", "Sex": "sex", "Age": "age", "Frontal/Lateral": "projection", "AP/PA": "view"},
    **{label: label for label in CHEXPERT_LABELS},
}
CHEXPERT_POLICY = (
    "1 mentioned as present, 0 as absent, -1 as uncertain, blank not mentioned (CheXpert's labeller read the reports); "
    "nearly all reports of films without devices do not mention devices: a blank is not an absence"
)
View = Literal["frontal", "lateral", "all"]
_CHEXPERT_PATH = r"^CheXpert-v1\.0[^/]*/(?P<file>(?:train|valid)/(?P<patient>patient\d+)/study\d+/view\d+_\w+\.jpg)$"


def chexpert_source(data_root: Path, num_images: int, seed: int, reader: ImageFiles, view: View, test: bool) -> Source:
    """At most `num_images` images of CheXpert v1.0 or v1.0-small, the folder with train.csv and valid.csv.

    With `test`, the published validation set is the test split, beside the `num_images`; otherwise it is left out.
    """
    table, path = _read_chexpert(data_root, "train.csv", view)
    table, rejected = tables.found(table, table.pop("_file"), data_root)
    table = draw_patients(table, num_images, seed)
    if test:
        kept, _ = _read_chexpert(data_root, "valid.csv", view)
        if both := set(kept["patient_id"]) & set(table["patient_id"]):
            raise ValueError(f"{path}: patient {min(both)} is in valid.csv too: one patient in two given splits")
        kept, more = tables.found(kept, kept.pop("_file"), data_root)
        table, rejected = pd.concat([table.assign(split=""), kept.assign(split="test")]), rejected + more
    return Source(table, CHEXPERT_LABELS, CHEXPERT_POLICY, reader, rejected=rejected)


def _read_chexpert(data_root: Path, name: str, view: View) -> tuple[pd.DataFrame, Path]:
    path = tables.find_table(data_root, [name])
    table = tables.read_table(path, CHEXPERT_COLUMNS)
    parts = table["source_file"].str.extract(_CHEXPERT_PATH)
    expected = "Path is not CheXpert-v1.0.../train/patientNNNNN/studyN/viewN_frontal.jpg"
    refuse(parts["file"].isna(), table["source_file"], path, expected)
    projection = table["projection"].str.lower()
    refuse(~projection.isin(("frontal", "lateral")), table["projection"], path, "Frontal/Lateral is neither of both")
    labels = {label: tables.label_values(table[label], path, label) for label in CHEXPERT_LABELS}
    table = table.assign(
        **labels,
        patient_id=parts["patient"],
        name=parts["file"].str.split("/", n=1).str[1].str.removesuffix(".jpg").str.replace("/", "_"),
        sex=tables.sexes(table["sex"]),
        age=tables.ages(table["age"]),
        projection=projection,
        _file=parts["file"],  # the folder may have been renamed since it was published
    )
    table = table if view == "all" else table[projection == view]
    if table.empty:
        raise ValueError(f"{path} has no {view} image")
    return table, path


NIH_COLUMNS = {
    **{"Image Index": "source_file", "Finding Labels": "findings", "Patient ID": "patient_id"},
    **{"Patient Age": "age", "Patient Gender": "sex", "View Position": "view"},
}
_NIH = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
# NIH's names and ours: CheXpert's where they mean the same.
NIH_LABELS = {name: name.replace("_", " ") for name in _NIH} | {"Effusion": "Pleural Effusion"}
NIH_POLICY = (
    "1 where the finding is listed, 0 where it is not (NIH's text mining looked for all 14); "
    "Support Devices, which NIH did not look for, is never mentioned"
)


def nih_source(data_root: Path, num_images: int, seed: int, reader: ImageFiles) -> Source:
    """At most `num_images` images of NIH ChestX-ray14: NIH's own table, and the images anywhere below its folder."""
    path = tables.find_table(data_root, ["Data_Entry_2017*.csv", "labels.csv"])
    table = tables.read_table(path, NIH_COLUMNS)
    table.insert(0, "name", table["source_file"].map(lambda file: Path(file).stem))
    refuse(table["name"].duplicated(), table["source_file"], path, "repeated Image Index")
    table["age"] = tables.ages(table["age"])  # the table has patients of 414 years
    findings, names = table.pop("findings"), {NO_FINDING: NO_FINDING, **NIH_LABELS}
    listed = findings.str.replace(r"\s*\|\s*", "|", regex=True).str.get_dummies("|").astype(float)
    unknown = listed[listed.columns.difference(list(names))].any(axis=1) | findings.str.contains(r"(?:^|\|)\s*(?:\||$)")
    refuse(unknown, findings, path, f"unknown label (known: {', '.join(names)})")
    listed = listed.reindex(columns=list(names), fill_value=0.0)
    refuse((listed[NO_FINDING] == 1) & (listed.sum(axis=1) > 1), findings, path, "contradiction")
    table = pd.concat([table, listed.rename(columns=names).assign(**{DEVICES: float("nan")})], axis=1)
    table, rejected = tables.found(table, table["source_file"], data_root, tables.images_below(data_root))
    labels = (NO_FINDING, *NIH_LABELS.values(), DEVICES)
    return Source(draw_patients(table, num_images, seed), labels, NIH_POLICY, reader, rejected=rejected)


NOT_THERE = "none"  # an empty cell would turn a column of words into one of numbers where all are empty


@dataclass(frozen=True)
class Phantoms:
    """Renders the phantom patients of a table's rows (see `phantom.patients`)."""

    seed: int
    confounding: float
    size: int

    def __call__(self, rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
        from prism_lib.phantom.patients import render, sample_patients  # torch: only in a process that renders

        patients = sample_patients(rows["phantom_index"].tolist(), self.seed, self.confounding)
        for image in (render(patients, self.size)[:, 0] * 255).round().byte().numpy():
            yield Picture(image)


def phantom_source(num_images: int, seed: int, confounding: float, size: int) -> Source:
    """`num_images` phantom patients, rendered at `size` x `size`."""
    from prism_lib.phantom.patients import sample_patients

    patients = sample_patients(num_images, seed, confounding)
    table = patients.labels().replace({"devices": {"": NOT_THERE}, "effusion_side": {"": NOT_THERE}})
    table.insert(0, "name", table["patient_id"])
    table["phantom_index"] = patients.index
    policy = "every label is known, 1 or 0: the phantom's causal model set it"
    return Source(table, PHANTOM_LABELS, policy, Phantoms(seed, confounding, size))


RENDERED_POLICY = (
    f"{DEVICES} is 1 where devices were rendered, 0 where the film was screened and shows none, and unknown elsewhere "
    "and, with screening, where devices were rendered into a film that may show others; "
    "other labels: "
)


@dataclass(frozen=True)
class RenderedFilms:
    """A `Reader` of films: "copy" above 0 is moved, "rendered" gets devices by "film_seed", their kinds in "kinds"."""

    films: ImageFiles

    def __call__(self, rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
        import torch  # only in a process that renders

        from prism_lib.phantom.films import with_devices

        columns = ("source_file", "path", "film_seed", "copy", "rendered")
        for name, path, seed, copy, devices in zip(*(rows[column] for column in columns), strict=True):
            try:
                pixels = moved(self.films, Path(path), seed) if copy else self.films.read(Path(path)).pixels
            except (OSError, ValueError) as error:
                yield Rejection(name, str(error))
                continue
            kinds: Sequence[str] = ()
            if devices:
                rendered = with_devices(torch.from_numpy(pixels)[None, None] / 255, [seed])
                pixels, (kinds,) = (rendered.images[0, 0] * 255).round().byte().numpy(), rendered.kinds
            if copy:
                pixels = acquired(pixels, seed)
            yield Picture(pixels, {"kinds": "|".join(kinds) or NOT_THERE})


def moved(films: ImageFiles, path: Path, seed: int) -> np.ndarray:
    """A film turned by up to 4 degrees, zoomed by 0.96 to 1.15, shifted by up to 3 % and with gamma 0.8 to 1.25.

    Chests are never mirrored.
    """
    random = np.random.default_rng(seed)
    # Moved at twice the size, so that the reduction hides the interpolation.
    large = replace(films, size=2 * films.size, max_upscale=2 * films.max_upscale).read(path).pixels
    side, angle, zoom = len(large), np.deg2rad(random.uniform(-4, 4)), random.uniform(0.96, 1.15)
    shift = side * random.uniform(-0.03, 0.03, 2)
    cos, sin, centre = np.cos(angle) / zoom, np.sin(angle) / zoom, side / 2
    x0, y0 = (centre - cos * centre - sin * centre + shift[0], centre + sin * centre - cos * centre + shift[1])
    turned = Image.fromarray(large).transform(
        (side, side), Image.Transform.AFFINE, (cos, sin, x0, -sin, cos, y0), Image.Resampling.BICUBIC
    )
    small = np.asarray(turned.resize((films.size, films.size), Image.Resampling.LANCZOS), dtype=float) / 255
    gamma = 0.8 * (1.25 / 0.8) ** random.uniform()
    return (255 * small**gamma).round().astype(np.uint8)


def acquired(pixels: np.ndarray, seed: int) -> np.ndarray:
    """A film (H, W), uint8, as another machine would show it: blurred or sharpened, with grain; one way a seed.

    A film and the same with devices get the same grain. Else devices are known by its lack, for rendering damps it
    there, and a model learns to remove what was rendered instead of what looks like a device.
    """
    random = np.random.default_rng([seed, 1])
    film, radius = pixels / 255, random.uniform(0.8, 3.0)
    amount = random.uniform(-0.4, 1.2)  # below 0: blurred
    film = film + amount * (film - ndimage.gaussian_filter(film, radius))
    grain = ndimage.gaussian_filter(random.standard_normal(film.shape), random.uniform(0.3, 0.8))
    film = film + grain / grain.std() * random.uniform(0.002, 0.02) * random.choice([0.3, 1.0])
    return (255 * film.clip(0, 1)).round().astype(np.uint8)


def film_source(
    films: Source, reader: ImageFiles, shares: Sequence[float], seed: int, copies: int, screened: Path | None
) -> Source:
    """Pairs of films with and without rendered devices; further `copies` of the train split are moved.

    `screened` is a table with the columns "file_name" and "Support Devices": films with 1 and films that it does not
    name are left out, films with 0 count as clean. Of films with an empty cell devices are in no caption, and they have
    no pair in val and test. The column "twin" of a film with devices is the file name of the one without.
    """
    if films.table.empty:
        return films  # the rejections say why
    table = films.table
    if screened is not None:
        labels, _ = tables.joined(table, tables.ExtraLabels(screened.resolve(), {DEVICES: DEVICES}))
        table = table.loc[labels.index].assign(**labels)
        table = table[table[DEVICES] != 1]
        if table.empty:
            raise ValueError(f"{screened} leaves out every film: all show devices")
    if "split" not in table:
        table["split"] = table["patient_id"].map(split_patients(table["patient_id"], shares, seed))
    names = table["name"]
    parts = []
    for copy in range(copies):
        some = table if copy == 0 else table[table["split"] == "train"]
        key = names[some.index] + f"_{copy}"
        draws = key.map(lambda name: stable_seed(seed, name))
        some = some.assign(name=key, copy=copy, film_seed=draws, rendered=False, twin=NOT_THERE)
        twin = some["split"] + "/" + key + ".png"
        devices = some.assign(name=key + "_devices", rendered=True, twin=twin, **{DEVICES: 1.0})
        if screened is not None:
            # A film that may show devices of its own has no true pair, and words about devices that are said of such
            # films alone would come to mean what else differs in them.
            clean = some[DEVICES] == 0
            devices = devices[(some["split"] == "train") | clean]
            devices[DEVICES] = devices[DEVICES].where(clean[devices.index])
        parts += [some, devices]
    pairs = pd.concat(parts).sort_values("name", kind="stable").reset_index(drop=True)
    return Source(pairs, films.labels, RENDERED_POLICY + films.label_policy, RenderedFilms(reader), films.rejected)
