"""The published data sets that `chest.yaml` and `skin.yaml` describe, the phantom, rendered films.

A split never parts images of one lesion, or lesions of one patient. Films come as they are and with rendered devices:
a pair whose truth is known to the pixel (see `phantom.films`).
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from scipy import ndimage

from prism_lib.configs import checked, read
from prism_lib.data import tables
from prism_lib.data.images import ImageFiles, Mode, Picture, Reader, Rejection
from prism_lib.data.tables import Source, draw_patients, refuse, split_patients
from prism_lib.files import stable_seed
from prism_lib.language.labels import NO_FINDING, PHANTOM_LABELS, snake_case

DEVICES = "Support Devices"
LeftOut = defaultdict[str, Counter[Hashable]]  # what a source has and is not taken, and how often
View = Literal["frontal", "lateral", "frontal or unknown", "all"]


@checked()
class Table:
    """A table of an archive. Columns whose name here begins with "_" are read and not carried along."""

    files: tuple[str, ...]  # names, with {part} and {labelling}
    columns: dict[str, str]  # published name -> ours
    optional: dict[str, str] = field(default_factory=dict)
    by: tuple[str, ...] = ()  # our columns by which it is joined to the tables before it
    labels: bool = False  # whether it has a column per label
    every: bool = False  # whether it has a row for every row of the tables before it


@checked()
class Archive:
    """A published data set: its tables, where its images are, and what its views, splits and labels mean."""

    tables: tuple[Table, ...]
    labels: dict[str, tuple[str, ...]]  # ours -> the published names of the same meaning
    policy: str  # what a label's values mean
    absent: tuple[str, ...] = ()  # labels of ours that it never mentions
    ignored: tuple[str, ...] = ()  # published labels of no meaning here, which are counted; "*" is any other
    silent: tuple[str, ...] = ()  # where one of these is listed, labels that are not listed are unknown
    labelling: dict[str, str] = field(default_factory=dict)  # name -> meaning of every choice; the first is the default
    path: str = ""  # pattern of "source_file", whose named groups become columns
    expected: str = ""  # what a path that does not fit is told
    image: str = ""  # the path of an image by its columns; without, "source_file"
    folders: tuple[str, ...] = ()  # the first that exists is {folder} in `image`
    anywhere: bool = False  # whether images may lie anywhere below the data root
    by_stem: bool = False  # whether tables name images without suffix
    mode: Mode = "L"  # of the images
    exclusive: bool = False  # whether one label column of a row is 1, and any other value is 0
    beside: str = ""  # a table of the labels that are otherwise absent, where it is there
    carried: tuple[str, ...] = ()  # the first columns of the result; one that no table has is empty
    views: dict[str, str] = field(default_factory=dict)  # published view -> frontal, lateral, unknown or other
    splits: dict[str, str] = field(default_factory=dict)  # published split or {part} -> ours; "" is drawn


_TEXTS = [Path(__file__).with_name(f"{kind}.yaml").read_text(encoding="utf-8") for kind in ("chest", "skin")]
_CHEST, _SKIN = map(yaml.safe_load, _TEXTS)
ARCHIVES = {name: read(Archive, raw, name) for name, raw in (_CHEST["archives"] | _SKIN["archives"]).items()}
POLICIES: dict[str, str] = _CHEST["policies"]  # of the phantom and of films with rendered devices
_WANTED = {"frontal": ("frontal",), "lateral": ("lateral",), "frontal or unknown": ("frontal", "unknown")}
# What readers agree on, from the share of them who see a label.
_AGREED: Mapping[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "majority": lambda share: share.gt(0.5).astype(float).mask(share == 0.5, -1.0),
    "any": lambda share: share.gt(0).astype(float).assign(**{NO_FINDING: share[NO_FINDING].eq(1).astype(float)}),
    "unanimous": lambda share: share.mask(share.gt(0) & share.lt(1), -1.0),
    "refuse": lambda share: share,
}


def chest_source(
    data_root: Path, num_images: int, seed: int, reader: ImageFiles, name: str, view: View, labelling: str, test: bool
) -> Source:
    """At most `num_images` images of one of `ARCHIVES`, by whole patients drawn from `seed`.

    With `test`, a published held-out set is the test split, beside the `num_images`; otherwise it is left out.
    """
    archive, left_out = ARCHIVES[name], LeftOut(Counter)
    labelling = labelling or next(iter(archive.labelling), "")
    held_out = "" in archive.splits.values()  # the other splits
    by_part = "{part}" in archive.tables[0].files[0]  # splits have tables of their own
    parts = [part for part, split in archive.splits.items() if split == "" or test] if by_part else [""]
    read = [_images(archive, data_root, part, labelling, view, left_out) for part in parts]
    table = pd.concat(read, ignore_index=True) if len(read) > 1 else read[0]
    if archive.splits:
        table = table if test or not held_out else table[table["split"] == ""]
        crossing = table.groupby("patient_id")["split"].nunique() > 1
        if crossing.any():
            raise ValueError(f"{data_root}: patient {crossing.idxmax()} is in two of the published splits")
    files = table["_file"] if "_file" in table else table["source_file"]
    below = tables.images_below(data_root, by_stem=archive.by_stem) if archive.anywhere else None
    table, rejected = tables.found(table.loc[:, ~table.columns.str.startswith("_")], files, data_root, below)
    held = table[table["split"] != ""] if held_out else table[:0]
    table = pd.concat([draw_patients(table.drop(held.index), num_images, seed), held])
    policy = archive.policy + (f"; {labelling}: {archive.labelling[labelling]}" if labelling else "")
    counts = {what: dict(count.most_common()) for what, counter in left_out.items() if (count := +counter)}
    return Source(table, (*archive.labels, *archive.absent), policy, reader, rejected, counts)


def _images(archive: Archive, root: Path, part: str, labelling: str, view: View, left_out: LeftOut) -> pd.DataFrame:
    """The images of one part with labels and split; counts in `left_out` what is not taken."""
    table, path = _joined(archive, root, part, labelling, left_out)
    if archive.path:
        groups = table["source_file"].str.extract(archive.path)
        refuse(groups.isna().any(axis=1), table["source_file"], path, archive.expected)
        table = pd.concat([table, groups], axis=1)
    if "name" not in table:
        table.insert(0, "name", table["source_file"].map(lambda file: Path(file).stem))
    table["name"] = table["name"].str.replace("/", "_")
    if "patient_id" not in table:
        table["patient_id"] = _patients(table, path)
    if archive.image:
        folder = next((name for name in archive.folders if (root / name).is_dir()), "")
        rows = (row | {"part": part, "folder": folder} for row in table.to_dict("records"))
        table["source_file"] = [archive.image.format_map(row) for row in rows]
    if "_reader" in table:
        table = _agreed(table, list(archive.labels), labelling, path)
    refuse(table["name"].duplicated(), table["name"], path, "repeated image")
    if archive.views:
        seen = table["projection"] if "projection" in table else table["view"]
        if "*" not in archive.views:
            refuse(~seen.isin(list(archive.views)), seen, path, f"unknown view (known: {', '.join(archive.views)})")
        table["projection"] = seen.map(archive.views).fillna(archive.views.get("*", ""))
        wanted = table["projection"].isin(_WANTED.get(view, table["projection"].unique()))
        left_out["views"].update(seen[~wanted].replace("", "unknown").value_counts().to_dict())
        table = table[wanted]
    if "labelled_by" in table and labelling != "all":
        wanted = table["labelled_by"] == labelling
        left_out["labelled by"].update(table.loc[~wanted, "labelled_by"].value_counts().to_dict())
        table = table[wanted]
    if table.empty or (view == "lateral" and not archive.views):
        raise ValueError(f"{path} has no {view} image" + (f" with labelling {labelling!r}" if labelling else ""))
    if "_findings" in table:
        table = pd.concat([table, _listed(table["_findings"], archive, path, left_out["labels"])], axis=1)
    if "_melanoma" in table:  # known also where the diagnosis is not
        target = tables.label_values(table["_melanoma"], path, "target")
        contradiction = table["Melanoma"].notna() & (target != table["Melanoma"])
        refuse(contradiction, table["source_file"], path, "target and diagnosis contradict each other")
        table["Melanoma"] = target
    if "_born" in table:
        years = pd.to_numeric(table["_taken"].str[:4], errors="coerce") - pd.to_numeric(table["_born"], errors="coerce")
        table["age"] = years.astype(str)
    for column, clean in (("sex", tables.sexes), ("age", tables.ages)):
        if column in table:
            table[column] = clean(table[column])
    if archive.splits:
        split = table.get("split", pd.Series(part, index=table.index))
        refuse(~split.isin(list(archive.splits)), split, path, f"split is none of {', '.join(archive.splits)}")
        table["split"] = split.map(archive.splits)
    table = table.assign(**dict.fromkeys(archive.absent, float("nan")))
    if archive.beside and (beside := root.resolve() / archive.beside).is_file():
        header = tables.read_header(beside)
        there = {code: label for label in archive.absent if (code := snake_case(label)) in header}
        images = table.assign(source_file=table["source_file"].str.removesuffix("_downsampled"))
        table = table.assign(**tables.joined(images, tables.ExtraLabels(beside, there, "image"))[0])
    rest = [column for column in table if column not in archive.carried]
    return table.reindex(columns=[*archive.carried, *rest], fill_value="")


def _patients(table: pd.DataFrame, path: Path) -> pd.Series:
    """The patient, else the lesion, else the image."""
    patients = table["name"]
    for column in ("lesion_id", "_patient"):
        if column in table:
            patients = patients.where(table[column] == "", table[column])
    if "lesion_id" in table:
        shared = patients.groupby(table["lesion_id"]).transform("nunique") > 1
        refuse(shared & (table["lesion_id"] != ""), table["lesion_id"], path, "one lesion of two patients")
    return patients


def _joined(archive: Archive, root: Path, part: str, labelling: str, left_out: LeftOut) -> tuple[pd.DataFrame, Path]:
    """The tables of an archive as one, in the rows of the first, and the path of the first."""
    joined, paths = pd.DataFrame(), []
    for each in archive.tables:
        paths.append(tables.find_table(root, [file.format(part=part, labelling=labelling) for file in each.files]))
        published = [name for names in archive.labels.values() for name in names] if each.labels else []
        ignored, silent = (archive.ignored, archive.silent) if each.labels else ((), ())
        required, optional = ({name: name for name in names} for names in (published, (*ignored, *silent)))
        table = tables.read_table(paths[-1], each.columns | required, each.optional | optional)
        if each.labels:
            there = [name for name in (*published, *ignored, *silent) if name in table]
            marks = pd.DataFrame({name: tables.label_values(table[name], paths[-1], name) for name in there})
            if archive.exclusive:
                marks = marks.eq(1).astype(float)
                wrong = f"not one of {', '.join(there)} is 1, but"
                refuse(marks.sum(axis=1) != 1, table["source_file"], paths[-1], wrong)
                marks = marks.mask(marks.filter(silent).eq(1).any(axis=1))
            values = {label: marks[list(names)].max(axis=1) for label, names in archive.labels.items()}
            table = table.drop(columns=there).assign(**values)
            if ignored:
                seen = marks.drop(columns=published).eq(1).groupby(table["name"]).any().sum()
                left_out["labels"].update(seen.to_dict())
        if not each.by:
            joined = table
            continue
        keys = list(each.by)
        refuse(table.duplicated(keys), table[keys[-1]], paths[-1], f"repeated {' and '.join(keys)}")
        joined = joined.merge(table, on=keys, how="left", indicator="_row")
        alone = joined.pop("_row") == "left_only"
        refuse(alone & each.every, joined[keys[-1]], paths[-1], "no row for the image")
        left_out["no row in"][paths[-1].name] += int(alone.sum())
        words = [*each.columns.values()]
        joined[words] = joined[words].fillna("")
    return joined, paths[0]


def _agreed(table: pd.DataFrame, labels: list[str], rule: str, path: Path) -> pd.DataFrame:
    """One row an image, with the labels that its readers agree on by one of `_AGREED`."""
    refuse(table.duplicated(["name", "_reader"]), table["name"], path, "two rows of one reader for image")
    share = table.groupby("name")[labels].mean()
    parted = share.gt(0) & share.lt(1)
    if rule == "refuse" and parted.any(axis=None):
        image, count = str(parted.any(axis=1).idxmax()), int(parted.any(axis=1).sum())
        named = ", ".join(label for label in labels if parted.at[image, label])
        raise ValueError(f"{path}: readers of image {image!r} disagree on {named} ({count} such images)")
    return table.drop_duplicates("name").drop(columns=labels).join(_AGREED[rule](share), on="name")


def _listed(texts: pd.Series, archive: Archive, path: Path, ignored: Counter[Hashable]) -> pd.DataFrame:
    """Labels from cells that list findings: 1 where one is listed, 0 where not, missing where that says nothing."""
    lists = texts.map(_names)
    refuse(lists.isna(), texts, path, "not a list of labels")
    names, closed = lists.explode(), "*" not in archive.ignored
    known = [name for published in archive.labels.values() for name in published] + [*archive.silent]
    unknown = names[~names.isin(known)]
    odd = pd.Series(texts.index.isin(unknown[~unknown.isin(archive.ignored)].index), index=texts.index)
    refuse(odd & closed, texts, path, f"unknown label (known: {', '.join(known)})")
    ignored.update(unknown.value_counts().to_dict())
    listed = pd.DataFrame(
        {label: names.isin(published).groupby(level=0).any() for label, published in archive.labels.items()}
    ).astype(float)
    if NO_FINDING in listed:
        findings = listed.drop(columns=[NO_FINDING, DEVICES], errors="ignore")
        both = listed[NO_FINDING].eq(1) & (findings.eq(1).any(axis=1) | odd)
        refuse(both & closed, texts, path, "contradiction")
        listed[NO_FINDING] = listed[NO_FINDING].mask(both, -1.0)
    return listed.mask(listed.eq(0).mul(names.isin(archive.silent).groupby(level=0).any(), axis=0))


def _names(text: str) -> list[str] | None:
    """The names in "Mass|Nodule" or "['mass ', 'nodule']"; None where a list cannot be read."""
    if not text.startswith("["):
        return [name.strip() for name in text.split("|")]
    try:
        return [str(name).strip() for name in ast.literal_eval(text)] or [""]
    except (ValueError, SyntaxError):
        return None


NOT_THERE = "none"  # an empty cell would turn a column of words into one of numbers where all are empty


def phantoms(seed: int, confounding: float, size: int, rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
    """The phantom patients of a table's rows, rendered (see `phantom.patients`)."""
    from prism_lib.phantom.patients import render, sample_patients  # torch: only in a process that renders

    patients = sample_patients(rows["phantom_index"].tolist(), seed, confounding)
    for image in (render(patients, size)[:, 0] * 255).round().byte().numpy():
        yield Picture(image)


def phantom_source(num_images: int, seed: int, confounding: float, size: int) -> Source:
    """`num_images` phantom patients, rendered at `size` x `size`."""
    from prism_lib.phantom.patients import sample_patients

    patients = sample_patients(num_images, seed, confounding)
    table = patients.labels().replace({"devices": {"": NOT_THERE}, "effusion_side": {"": NOT_THERE}})
    table.insert(0, "name", table["patient_id"])
    table["phantom_index"] = patients.index
    return Source(table, PHANTOM_LABELS, POLICIES["phantom"], partial(phantoms, seed, confounding, size))


def rendered_films(films: ImageFiles, kinds: Sequence[str], rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
    """Films of which those of a "copy" above 0 are moved, and "rendered" ones get devices by "film_seed".

    Devices are of these `kinds`, of all if there are none; those that show are in the column "kinds".
    """
    import torch  # only in a process that renders

    from prism_lib.phantom.films import KINDS, with_devices

    columns = ("source_file", "path", "film_seed", "copy", "rendered")
    for name, path, seed, copy, devices in zip(*(rows[column] for column in columns), strict=True):
        try:
            pixels = moved(films, Path(path), seed) if copy else films.read(Path(path)).pixels
        except (OSError, ValueError) as error:
            yield Rejection(name, str(error))
            continue
        shown: Sequence[str] = ()
        if devices:
            rendered = with_devices(torch.from_numpy(pixels)[None, None] / 255, [seed], kinds or KINDS)
            pixels, (shown,) = (rendered.images[0, 0] * 255).round().byte().numpy(), rendered.kinds
        if copy:
            pixels = acquired(pixels, seed)
        yield Picture(pixels, {"kinds": "|".join(shown) or NOT_THERE})


def moved(films: ImageFiles, path: Path, seed: int) -> np.ndarray:
    """A film turned by up to 4 degrees, zoomed by 0.96 to 1.15, shifted by up to 3 %, with gamma 0.8 to 1.25."""
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
    return (255 * small ** (0.8 * (1.25 / 0.8) ** random.uniform())).round().astype(np.uint8)


def acquired(pixels: np.ndarray, seed: int) -> np.ndarray:
    """A film (H, W), uint8, as another machine would show it: blurred or sharpened, with grain; one way a seed.

    A film with devices gets the grain of the one without: else a model finds devices by the lack of grain on them.
    """
    random = np.random.default_rng([seed, 1])
    film, radius = pixels / 255, random.uniform(0.8, 3.0)
    amount = random.uniform(-0.4, 1.2)  # below 0: blurred
    film = film + amount * (film - ndimage.gaussian_filter(film, radius))
    grain = ndimage.gaussian_filter(random.standard_normal(film.shape), random.uniform(0.3, 0.8))
    film = film + grain / grain.std() * random.uniform(0.002, 0.02) * random.choice([0.3, 1.0])
    return (255 * film.clip(0, 1)).round().astype(np.uint8)


def film_source(
    films: Source, reader: Reader, shares: Sequence[float], seed: int, copies: int, screened: Path | None
) -> Source:
    """Pairs of films with and without rendered devices; further `copies` of the train split are moved.

    `screened` has the columns "file_name" and "Support Devices": films with 1, or not named, are left out; 0 is clean.
    Films with an empty cell have no devices in captions and no pair in val and test. "twin" is the film without.
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
            # A film that may show devices has no true pair; words said of such films alone would mean other traits.
            clean = some[DEVICES] == 0
            devices = devices[(some["split"] == "train") | clean]
            devices[DEVICES] = devices[DEVICES].where(clean[devices.index])
        parts += [some, devices]
    pairs = pd.concat(parts).sort_values("name", kind="stable").reset_index(drop=True)
    return Source(pairs, films.labels, f"{POLICIES['films']} {films.label_policy}", reader, films.rejected)
