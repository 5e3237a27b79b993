"""Prepare a data set once: choose images, split by patient, write captions, and record what was done."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import AfterValidator, Field
from tqdm.auto import tqdm

from prism_lib import paths
from prism_lib.configs import Share, checked
from prism_lib.data.chest import ARCHIVES, DEVICES, View, chest_source, film_source, phantom_source, rendered_films
from prism_lib.data.folder import REPORT, SPLITS, building, load_info, load_table, write_metadata
from prism_lib.data.images import Fit, ImageFiles, Mode, Outcome, Rejection, Written, write_images
from prism_lib.data.rows import draw_captions
from prism_lib.data.tables import Columns, ExtraLabels, Source, split_patients, table_source, with_labels
from prism_lib.language.edits import Edit
from prism_lib.language.labels import VOCABULARIES, Vocabulary, vocabulary

logger = logging.getLogger(__name__)

# What decides a file: columns of a plan, and settings.
FILE_COLUMNS = ("file_name", "path", "phantom_index", "film_seed")
DECISIVE = ("dataset", "size", "seed", "confounding", "fit", "mode", "max_upscale", "columns", "kinds")
LOOK_AHEAD = 20  # unusable files collected after the error is certain, so that its message shows several
LABEL_STATES = {"present": 1, "absent": 0, "uncertain": -1, "not mentioned": float("nan")}
POLICIES = {"zeros": 0.0, "ones": 1.0}  # "ignore" leaves a label as it is


@checked()
class PrepareConfig:
    """What to prepare and how. The dataset "table" is any images with a table, "dicom" the same with DICOM files.

    "films" is NIH's films with and without rendered devices.
    """

    dataset: Literal[
        "phantom", "films", "chexpert", "chexpert-plus", "mimic", "nih", "padchest", "vindr",
        "isic2019", "isic2020", "ham10000", "table", "dicom",
    ]  # fmt: skip
    output: Path  # the prepared folder; an existing one is reused if it was made with the same configuration
    data_root: Path | None = None  # the folder with the table and the images; the phantom has none
    size: Annotated[int, Field(ge=32)] = 256
    num_images: Annotated[int, Field(ge=1)] = 1000  # of real images at most as many, by whole patients
    seed: int = 0
    # Shares of the patients for train, val and test; splits in a table, and MIMIC's, are kept. With a share of 0 for
    # test, CheXpert's published validation set or VinDr's test set is the test split; otherwise that set is left out.
    split: tuple[Share, Share, Share] = (0.7, 0.15, 0.15)
    confounding: Share = 0.0  # how strongly devices follow disease in the phantom
    vocabulary: str = "chest"  # whose labels captions name (see `vocabulary`); all label columns are kept
    subject: str = ""  # what the images are, for the vocabulary "labels": "knee x-ray"
    explicit_share: Share = 0.5  # of captions in the explicit template, which edits use
    # What -1 becomes, by label, and what a label that is not mentioned becomes; "*" is every other label.
    uncertain: Mapping[str, Literal["ignore", "zeros", "ones"]] = field(default_factory=dict)
    fit: Fit = "letterbox"  # keeps the whole image and pads; "crop" keeps its centre
    max_rejected: Share = 0.0  # of the files may be unusable
    blank: Mapping[str, Literal["ignore", "zeros"]] = field(default_factory=dict)
    mode: Literal["", Mode] = ""  # empty is the data set's own; "table" has none of its own
    max_upscale: Annotated[float, Field(ge=1)] = 1.0  # how many times an image smaller than `size` may be enlarged
    view: View = "frontal"  # of data sets with others
    labelling: str = ""  # of a data set with several, by its name in chest.yaml; empty is the first
    table: str = "metadata.csv"  # its file name, for "table" and "dicom"
    columns: Columns = field(default_factory=Columns)  # for the same two
    # Free captions with more tokens than a model reads (`caption_model`, as in fine-tuning) are an error, or cut.
    long_captions: Literal["refuse", "sentences"] = "refuse"  # "sentences": the first sentences that fit
    caption_model: str = paths.SHIPPED
    extra_labels: ExtraLabels | None = None  # from a table beside the data set's own
    # An image with the pixels of one in another split: "reject" keeps the one in test, else in val; "keep" keeps both.
    duplicates: Literal["reject", "keep"] = "reject"
    copies: Annotated[int, Field(ge=1)] = 1  # of each film of the data set "films" in the train split
    # For "films", below PRISM_DATA: "file_name" and "Support Devices": 0 clean; 1 and films not named are left out.
    screened: Annotated[Path, AfterValidator(lambda path: paths.data() / path)] | None = None
    kinds: tuple[str, ...] = ()  # of devices that are rendered into "films", of `phantom.films.KINDS`; () is all
    processes: Annotated[int, Field(ge=1)] = 1  # that read and write; the result does not depend on it

    def __post_init__(self) -> None:
        if abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split is {self.split}; expected shares of {', '.join(SPLITS)} that sum to 1")
        if self.dataset == "table":
            if not self.mode:
                raise ValueError("dataset 'table' needs a mode: L or RGB")
        elif self.mode not in ("", _own_mode(self)):
            raise ValueError(f"mode of dataset {self.dataset!r} is {_own_mode(self)!r}, not {self.mode!r}")
        words = vocabulary(self.vocabulary, (), self.subject)
        if self.subject not in ("", words.subject):
            raise ValueError(f"subject {self.subject!r} is for the vocabulary 'labels', not for {words.name!r}")
        if self.dataset == "films" and self.extra_labels and DEVICES in self.extra_labels.labels.values():
            raise ValueError(f"{DEVICES!r} of films are read from the table `screened`, not from extra_labels")
        choices = ARCHIVES[self.dataset].labelling if self.dataset in ARCHIVES else {}
        if self.labelling and self.labelling not in choices:
            known = ", ".join(choices) or "no others"
            raise ValueError(f"dataset {self.dataset!r} has no labelling {self.labelling!r}; it has {known}")
        if self.columns.header and self.dataset != "dicom":
            raise ValueError("header fields can be copied from the dataset 'dicom' only")
        if self.dataset != "films":
            if self.copies > 1 or self.screened or self.kinds:
                raise ValueError("copies, screened and kinds are settings of the dataset 'films' only")
        elif self.size < 128:
            raise ValueError(f"devices need films of 128 pixels or more; size is {self.size}")
        elif self.screened and self.blank.get(DEVICES, self.blank.get("*")) == "zeros":
            # Rendered devices of films that were not screened as clean have a blank label too.
            raise ValueError(f"blank {DEVICES!r} of screened films means unknown, and cannot become zeros")


def _own_mode(config: PrepareConfig) -> Mode:
    return ARCHIVES[config.dataset].mode if config.dataset in ARCHIVES else "L"


def settings(config: PrepareConfig) -> dict[str, Any]:
    """The values that decide the content, as JSON: all but the output folder and the number of processes."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    for name in ("output", "processes", *(() if config.columns.caption else ("long_captions", "caption_model"))):
        del values[name]
    if config.vocabulary not in (*VOCABULARIES, "labels"):  # a file, which may change or go
        values["vocabulary"] = json.loads(json.dumps(asdict(vocabulary(config.vocabulary))))
    root = None if config.dataset == "phantom" else config.data_root
    return values | {"data_root": root and str(root.resolve())}


SOURCES: dict[str, Callable[[PrepareConfig], Source]] = {
    "phantom": lambda c: phantom_source(c.num_images, c.seed, c.confounding, c.size),
    **dict.fromkeys(ARCHIVES, lambda c: _chest(c, c.dataset)),
    "films": lambda c: film_source(
        _chest(c, "nih"), partial(rendered_films, _files(c)[-1], c.kinds), c.split, c.seed, c.copies, c.screened
    ),
    **dict.fromkeys(("table", "dicom"), lambda c: table_source(*_files(c), c.table, c.columns, c.vocabulary)),
}


def _chest(config: PrepareConfig, name: str) -> Source:
    return chest_source(*_files(config), name, config.view, config.labelling, config.split[SPLITS.index("test")] == 0)


def _files(config: PrepareConfig) -> tuple[Path, int, int, ImageFiles]:
    """The first arguments of every source of files: data root, how many images, seed, reader."""
    root = config.data_root
    if root is None:
        raise ValueError(f"dataset {config.dataset!r} needs a data_root: the folder with its table and images")
    if config.output.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"output {config.output} lies inside the data root {root}, where images are searched")
    header = config.columns.header if config.dataset in ("dicom", "vindr") else None
    mode = config.mode or _own_mode(config)
    return root, config.num_images, config.seed, ImageFiles(config.size, config.fit, mode, config.max_upscale, header)


def prepare(config: PrepareConfig, edits: Sequence[str] = ()) -> Path:
    """Write the prepared folder and return its path; at once if it is already there, whole and the same.

    Raises before any long work if the configuration, a table, the output, or a word of `edits` (keys or sentences) is
    at fault, and later if more than `config.max_rejected` of the files cannot be used (an image in two splits does not
    count). After an error or a kill the same configuration continues with the images that were finished.
    """
    output = config.output
    if _already_prepared(config):
        logger.info("reusing the prepared folder %s", output)
        return output
    with building(output) as folder:
        source, unmatched = SOURCES[config.dataset](config), list[str]()
        if config.extra_labels:
            source, unmatched = with_labels(source, config.extra_labels)
        words = vocabulary(config.vocabulary, source.labels, config.subject)
        for edit in edits:
            Edit.read(edit, words)
        plan = _plan(source, config, words)
        free = [REPORT] if REPORT in plan else []
        # A key of everything that decides an image file's bytes, its name, or its patient.
        files = plan[[column for column in plan if column in FILE_COLUMNS]]
        rows = pd.util.hash_pandas_object(files, index=False).to_numpy().tobytes()
        chosen = {name: value for name, value in settings(config).items() if name in DECISIVE}
        key = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode() + rows).hexdigest()
        rejected = list(source.rejected)
        with closing(write_images(source.images, plan, folder, key, config.processes)) as outcomes:
            written = _collect(outcomes, rejected, len(plan) + len(rejected), config.max_rejected)
        usable = plan[plan["file_name"].isin(written.keys())]
        duplicates, within = _duplicates(usable, written)
        if config.duplicates == "reject":
            rejected += duplicates
            same = usable["file_name"].isin([item.file for item in duplicates])
            if "source_file" in usable:  # a film goes with its copies and its twin
                same = usable["source_file"].isin(usable.loc[same, "source_file"])
            usable = usable[~same]
        # Columns that come from the image files, such as their pixel spacing.
        more = pd.DataFrame([written[name].columns for name in usable["file_name"]], index=usable.index)
        metadata = _metadata(usable.join(more), source.labels, config, set(plan["split"]))
        info = {
            "source": config.dataset,
            "config": settings(config),
            "labels": list(source.labels),
            "label_policy": {"source": source.label_policy, "uncertain": config.uncertain, "blank": config.blank},
            "counts": {"before": _counts(plan, source.labels), "after": _counts(metadata, source.labels)},
            "rejected": [asdict(item) for item in rejected],
            "left_out": source.left_out,
            "duplicates": {"across_splits": len(duplicates), "within_split": within},
            "extra_labels": {"rows_without_image": len(unmatched), "first_of_these": unmatched[:20]},
            "captions_shortened": int((plan[free].to_numpy() != source.table[free].to_numpy()).sum()),
        }
        write_metadata(folder, metadata, {name: written[name].file_hash for name in metadata["file_name"]}, info)
    return output


def _plan(source: Source, config: PrepareConfig, vocab: Vocabulary) -> pd.DataFrame:
    """The source's table with split, file name and caption of every image."""
    labels = list(source.labels)
    if config.caption_model != paths.SHIPPED:
        caption_tokenizer(config.caption_model)  # it must be there
    if wordless := {*(config.extra_labels.labels.values() if config.extra_labels else ())} - {*vocab.phrases}:
        raise ValueError(f"vocabulary {vocab.name!r} has no words for the extra label {min(wordless)!r}")
    if config.columns.caption and REPORT not in source.table:
        raise ValueError(f"captions in a column ({config.columns.caption!r}) are for the datasets 'table' and 'dicom'")
    if not set(labels) & set(vocab.phrases):
        raise ValueError(f"vocabulary {vocab.name!r} has words for no label of {config.dataset!r}: {', '.join(labels)}")
    for name, policy in (("uncertain", config.uncertain), ("blank", config.blank)):
        if unknown := set(policy) - {*labels, "*"}:
            raise ValueError(f"{name} names {min(unknown)!r}, which is no label of the data set: {', '.join(labels)}")
    table = source.table.reset_index(drop=True)
    table[labels] = table[labels].astype(float)
    given = table["split"] if "split" in table else pd.Series("", index=table.index)
    drawn = table.loc[given == "", "patient_id"]
    shares = split_patients(drawn, config.split, config.seed) if len(drawn) else {}
    table["split"] = table["patient_id"].map(shares).where(given == "", given)
    table["file_name"] = table["split"] + "/" + table["name"] + ".png"
    if REPORT in table:
        table[REPORT] = _shortened(table, config)
    known = _resolved(table, labels, config)
    captions = draw_captions(known, labels, config.dataset, vocab, config.seed, 1, config.explicit_share)
    return table.assign(text=[texts[0] for texts in captions])


def caption_tokenizer(model: str) -> Any:
    """The tokenizer of a model's folder, also below PRISM_RUNS or PRISM_WEIGHTS, or of a hub id; ValueError if none."""
    from transformers import AutoTokenizer  # seconds

    places = [place / model for place in (Path(), paths.runs(), paths.weights())]
    folder = next((place for place in places if (place / "tokenizer").is_dir()), model)
    try:
        return AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    except (OSError, ValueError):
        raise ValueError(f"caption_model {model!r} is neither a folder with a tokenizer nor a hub id") from None


def _shortened(table: pd.DataFrame, config: PrepareConfig) -> pd.Series:
    """The free captions, or of long ones the first sentences that `caption_model` reads; ValueError names the rest."""
    tokenizer = caption_tokenizer(config.caption_model)
    most, cut = tokenizer.model_max_length, config.long_captions == "sentences"

    def shortened(text: str) -> str:
        heads = reversed(list(accumulate(re.split(r"(?<=[.!?;])\s+", text) if cut else [text], "{} {}".format)))
        return next((head for head in heads if len(tokenizer(head, verbose=False).input_ids) <= most), "")

    texts = table[REPORT].map(shortened)
    if (long := texts == "").any():
        said = "in the first sentence alone " if cut else ""
        files = ", ".join(table["source_file"][long].head())
        raise ValueError(f"{long.sum()} captions have {said}more than {most} tokens of {config.caption_model}: {files}")
    return texts


def _resolved(table: pd.DataFrame, labels: Sequence[str], config: PrepareConfig) -> pd.DataFrame:
    """The table with its uncertain and blank labels replaced as the policies say."""
    columns = {}
    for label in labels:
        uncertain, blank = (policy.get(label, policy.get("*", "ignore")) for policy in (config.uncertain, config.blank))
        values = table[label].fillna(POLICIES.get(blank, float("nan")))
        columns[label] = values.mask(values == -1, POLICIES.get(uncertain, -1.0))
    return table.assign(**columns)


def _collect(outcomes: Iterable[Outcome], rejected: list[Rejection], total: int, share: float) -> dict[str, Written]:
    """What was written, by file name; adds to the rejected files and raises once they are too many of `total`."""
    written: dict[str, Written] = {}
    allowed, left = share * total, total - len(rejected)
    for item in tqdm(outcomes if len(rejected) <= allowed else (), "prepare", left, unit="image"):
        if isinstance(item, Written):
            written[item.file_name] = item
            continue
        logger.warning("rejected %s: %s", item.file, item.reason)
        rejected.append(item)
        if len(rejected) > allowed + LOOK_AHEAD:
            break
    if len(rejected) > allowed:
        first = "; ".join(f"{item.file}: {item.reason}" for item in rejected[:5])
        hint = ". A smaller size or a larger max_upscale takes small images" if "smaller than" in first else ""
        said = f"{len(rejected)} of {total} files cannot be used (max_rejected={share:g})"
        raise ValueError(f"{said}; the first are {first}{hint}")
    return written


def _duplicates(usable: pd.DataFrame, written: Mapping[str, Written]) -> tuple[list[Rejection], int]:
    """Images whose pixels are also in a more held-out split (test, then val), and how many repeat within a split."""
    order = usable.sort_values("split", key=lambda split: split.map(SPLITS.index), ascending=False, kind="stable")
    pixels = order["file_name"].map(lambda name: written[name].pixel_hash)
    kept = order[["file_name", "patient_id", "split"]].groupby(pixels).transform("first")
    across = order["split"] != kept["split"]
    reasons = "same pixels as " + kept["file_name"] + " of patient " + kept["patient_id"] + ", which is held out"
    rejected = list(map(Rejection, order.loc[across, "file_name"], reasons[across]))
    return rejected, len(order) - pixels.nunique() - len(rejected)


def _metadata(table: pd.DataFrame, labels: Sequence[str], config: PrepareConfig, planned: set[str]) -> pd.DataFrame:
    """The rows as they are stored: floats, and texts of which none is empty, as `load_dataset` needs."""
    if empty := planned - set(table["split"]):
        raise ValueError(f"no usable image is left for {', '.join(sorted(empty))}: prepare more images")
    first = ["file_name", "patient_id", "split", "text", *labels]
    others = [column for column in table if column not in (*first, "name", "path")]
    metadata = _resolved(table, labels, config)[first + others]
    words = [column for column in metadata if pd.api.types.is_string_dtype(metadata[column])]
    return metadata.assign(**metadata[words].replace("", "unknown").fillna("unknown"))


def _counts(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, Any]:
    counts = {}
    for split, rows in table.groupby("split"):
        states = {name: rows[[*labels]].isin([value]).sum() for name, value in LABEL_STATES.items()}
        about = {"images": len(rows), "patients": int(rows["patient_id"].nunique())}
        counts[str(split)] = about | {"labels": {k: {n: int(s[k]) for n, s in states.items()} for k in labels}}
    return counts


def _already_prepared(config: PrepareConfig) -> bool:
    """Whether the output is there, whole, and of this configuration; raises if something else is there."""
    output = config.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "dataset.json").is_file():
        raise FileExistsError(f"output {output} exists and is not a prepared data set: choose another place")
    asked = settings(config)
    # Folders lack the settings that are newer than they are.
    there = settings(PrepareConfig("phantom", output)) | load_info(output)["config"]
    there["columns"] = asdict(Columns()) | there["columns"]
    if differing := [name for name in asked if there.get(name) != asked[name]]:
        changes = ", ".join(f"{name} is {there.get(name)!r} and not {asked[name]!r}" for name in differing)
        raise FileExistsError(f"output {output} was prepared otherwise: {changes}. Delete it or choose another")
    if gone := [name for name in load_table(output)["file_name"] if not (output / name).is_file()]:
        raise FileNotFoundError(f"prepared data set {output} is incomplete: {gone[0]} is missing. Delete it")
    return True
