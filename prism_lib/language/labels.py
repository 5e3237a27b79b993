"""The labels of medical images: CheXpert's or ISIC's names, their states, and the words that captions use for them.

A label is 1 (present), 0 (absent), -1 (uncertain) or missing (not mentioned); the last two never count as 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

Labels = Mapping[str, float | None]

NO_FINDING = "No Finding"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The words for a set of labels."""

    name: str
    subject: str
    phrases: Mapping[str, str]  # by label, in the order of the clauses
    stated: tuple[str, ...]  # labels whose absence the explicit template says: all would overflow CLIP's 77 tokens
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of a label, for captions
    details: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # that say more than the label, for captions
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of a label or detail, for sentences of users
    title: str = "Chest X-ray"  # the subject in PRISM's own templates

    @property
    def labels(self) -> tuple[str, ...]:
        """All label names, "No Finding" included, in order."""
        return (NO_FINDING, *self.phrases)

    @property
    def owners(self) -> dict[str, str]:
        """Detail -> the label that it belongs to: {"pacemaker": "Support Devices"}."""
        return {detail: label for label in self.phrases for detail in self.details.get(label, ())}

    def label(self, key: str) -> str:
        """The label or detail whose snake-case form is `key`: "pleural_effusion" -> "Pleural Effusion"."""
        keys = {snake_case(name): name for name in (*self.labels, *self.owners)}
        if key not in keys:
            raise ValueError(f"unknown label {key!r} in vocabulary {self.name!r}; it has {', '.join(keys)}")
        return keys[key]

    def phrase(self, name: str) -> str:
        """The words for a label, or a detail itself: it is its own phrase."""
        return self.phrases.get(name, name)


CHEXPERT_LABELS = (
    NO_FINDING, "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
# NIH ChestX-ray14's names and ours: CheXpert's where they mean the same.
_NIH = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
NIH_LABELS = {name: name.replace("_", " ") for name in _NIH} | {"Effusion": "Pleural Effusion"}
PHANTOM_LABELS = (NO_FINDING, "Cardiomegaly", "Pleural Effusion", "Support Devices")

DEVICE_KINDS = ("pacemaker", "central venous catheter", "ecg leads", "endotracheal tube")
SIDES = ("left", "right", "bilateral")
# Words of users: spellings, verbs, and terms for labels, details and kinds of devices.
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))

# The absences that captions of CHEST state: CheXpert's five competition findings, pneumothorax and devices.
_STATED = (
    "Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Support Devices",
)  # fmt: skip
CHEST = Vocabulary(
    name="chest",
    subject="chest x-ray",
    phrases={label: label.lower() for label in (*CHEXPERT_LABELS[1:], *NIH_LABELS.values())}
    | {"Pleural Other": "other pleural disease"},
    stated=_STATED,
    synonyms=WORDS["synonyms"],
    details={"Pleural Effusion": tuple(f"{side} pleural effusion" for side in SIDES), "Support Devices": DEVICE_KINDS},
    aliases=WORDS["terms"],
)
_THREE = PHANTOM_LABELS[1:]
PHANTOM = replace(CHEST, name="phantom", phrases={label: label.lower() for label in _THREE}, stated=_THREE)
# ISIC's diagnoses, one an image, in the order of the columns of 2019; and artefacts on the skin.
SKIN_DIAGNOSES = (
    "Melanoma", "Melanocytic Nevus", "Basal Cell Carcinoma", "Actinic Keratosis", "Benign Keratosis", "Dermatofibroma",
    "Vascular Lesion", "Squamous Cell Carcinoma",
)  # fmt: skip
_ARTEFACTS = ("ruler", "ink", "hair", "dark_corner", "gel_border", "gel_bubble", "patches")  # columns of their table
SKIN_ARTEFACTS = {code: code.replace("_", " ").title() for code in _ARTEFACTS}
SKIN = Vocabulary(
    name="skin",
    subject="dermoscopic image",
    phrases={label: label.lower() for label in (*SKIN_DIAGNOSES, *SKIN_ARTEFACTS.values())}
    | {"Ink": "ink marks", "Dark Corner": "dark corners", "Gel Bubble": "gel bubbles", "Patches": "colour patches"},
    stated=("Melanoma", "Melanocytic Nevus", "Ruler", "Ink", "Hair", "Dark Corner", "Gel Bubble"),
    synonyms=WORDS["synonyms"],
    aliases=WORDS["terms"],
    title="Dermoscopic image",
)
VOCABULARIES = {vocab.name: vocab for vocab in (CHEST, PHANTOM, SKIN)}


def vocabulary(name: str) -> Vocabulary:
    """The vocabulary called `name`: "chest" (CheXpert's and NIH's labels), "phantom" (four of them) or "skin"."""
    if name not in VOCABULARIES:
        raise ValueError(f"unknown vocabulary {name!r}; known: {', '.join(VOCABULARIES)}")
    return VOCABULARIES[name]


def snake_case(label: str) -> str:
    """A label as it appears in keys and file names: "Support Devices" -> "support_devices"."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def label_state(label: str, value: float | None) -> bool | None:
    """True present, False absent, None uncertain or not mentioned; other than 1, 0, -1, None, NaN raises."""
    if value is None or value != value or value == -1:
        return None
    if value not in (0, 1):
        raise ValueError(f"label {label!r} is {value!r}; expected 1, 0, -1 (uncertain) or missing")
    return value == 1
