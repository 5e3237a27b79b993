"""The labels of medical images, their states, and the words that captions use for them: a vocabulary, a YAML file.

A label is 1 (present), 0 (absent), -1 (uncertain) or missing (not mentioned); the last two never count as 0.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from prism_lib import paths
from prism_lib.configs import checked, read

Labels = Mapping[str, float | None]

NO_FINDING = "No Finding"
SIDES = ("left", "right")  # of the patient, whose right is at the image's left
MOST_STATED = 7  # absences that captions state where a vocabulary does not say which: more would overflow CLIP's tokens
Words = Annotated[str, Field(pattern=r"\w")]


@checked(eq=False)
class Vocabulary:
    """The words for a set of labels."""

    name: str
    subject: Words
    phrases: Mapping[Words, Words]  # by label, in the order of the clauses
    stated: tuple[str, ...]  # labels whose absence the explicit template says: all would overflow CLIP's 77 tokens
    synonyms: Mapping[str, tuple[Words, ...]] = field(default_factory=dict)  # of a label, for captions
    details: Mapping[str, tuple[Words, ...]] = field(default_factory=dict)  # that say more than the label, for captions
    aliases: Mapping[str, tuple[Words, ...]] = field(default_factory=dict)  # of a label or detail, in users' sentences
    sided: tuple[str, ...] = ()  # details that have a side, which captions do not say: an edit confines it (`side`)
    foreign: tuple[str, ...] = ()  # labels of what is no finding of the patient
    title: str = "Chest X-ray"  # the subject in PRISM's own templates

    def __post_init__(self) -> None:
        details = dict.fromkeys(detail for own in self.details.values() for detail in own)
        if unknown := [name for name in self.sided if name not in details]:
            raise ValueError(f"sided names {unknown[0]!r}, which is no detail: {', '.join(details) or 'none'}")
        for key in ("stated", "synonyms", "details", "aliases", "foreign"):
            known = {*self.phrases, *(self.owners if key == "aliases" else ())}
            if unknown := [name for name in getattr(self, key) if name not in known]:
                raise ValueError(f"{key} names {unknown[0]!r}, which is no label of phrases: {', '.join(self.phrases)}")
        owner: dict[str, str] = {}
        for label, phrase in self.phrases.items():
            for word in (phrase, *self.synonyms.get(label, ()), *self.details.get(label, ())):
                if (other := owner.setdefault(word.lower(), label)) != label:
                    raise ValueError(f"{word!r} stands for two labels, {other!r} and {label!r}")
        names = (*self.labels, *details, *(f"{side} {name}" for name in self.sided for side in SIDES))
        keys = [snake_case(name) for name in names]
        if bad := [place for place, key in enumerate(keys) if not key or key in keys[:place]]:
            raise ValueError(f"{names[bad[0]]!r} has the key {keys[bad[0]]!r}, which is empty or that of another name")

    def __repr__(self) -> str:
        return f"Vocabulary({self.name!r})"  # the default of `Edit.parse` in its help

    @property
    def labels(self) -> tuple[str, ...]:
        """All label names, "No Finding" included, in order."""
        return (NO_FINDING, *self.phrases)

    @property
    def owners(self) -> dict[str, str]:
        """Detail, also one of a side -> the label that it belongs to: {"left pacemaker": "Support Devices"}."""
        found = {detail: label for label in self.phrases for detail in self.details.get(label, ())}
        return found | {f"{side} {name}": found[name] for name in self.sided if name in found for side in SIDES}

    def label(self, key: str) -> str:
        """The label or detail whose snake-case form is `key`: "pleural_effusion" -> "Pleural Effusion"."""
        keys = {snake_case(name): name for name in (*self.labels, *self.owners)}
        if key not in keys:
            raise ValueError(f"unknown label {key!r} in vocabulary {self.name!r}; it has {', '.join(keys)}")
        return keys[key]

    def side(self, name: str) -> str:
        """ "left" for "left pacemaker", "" for what has no side or says it in captions."""
        side, _, detail = name.partition(" ")
        return side if side in SIDES and detail in self.sided else ""

    def phrase(self, name: str) -> str:
        """The words for a label, or a detail itself without its `side`: it is its own phrase."""
        return self.phrases.get(name, name.removeprefix(self.side(name)).lstrip())


def vocabulary(source: str | Mapping[str, Any], labels: Sequence[str] = (), subject: str = "") -> Vocabulary:
    """The vocabulary "chest" (CheXpert's and NIH's labels), "phantom" (three of them), "skin", or of a YAML file.

    A file is absolute or below PRISM_DATA; a mapping has the content of one. "labels" makes a vocabulary of `labels`,
    a table's own names, for images of a `subject` ("knee x-ray"). ValueError names file and key.
    """
    if source == "labels":
        phrases = {label: label.replace("_", " ").lower() for label in labels if label != NO_FINDING}
        source = {"name": "labels", "subject": subject or "image", "phrases": phrases}
    if isinstance(source, Mapping):
        return _of_text(json.dumps(source, default=str))
    if source in VOCABULARIES:
        return VOCABULARIES[source]
    if not source.endswith((".yaml", ".yml")):
        raise ValueError(f"unknown vocabulary {source!r}; known: {', '.join(VOCABULARIES)}, labels, and YAML files")
    return _from_file(paths.data() / Path(source).expanduser())


def _from_file(path: Path) -> Vocabulary:
    """The vocabulary of a YAML file; one that `extends` a shipped one adds to its mappings and replaces its lists."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no vocabulary {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is no mapping with subject and phrases")
    content: dict[str, Any] = {"name": path.stem} | raw
    if (base := content.pop("extends", None)) is not None:
        if not isinstance(base, str) or base not in VOCABULARIES:
            raise ValueError(f"{path}: extends is {base!r}, none of {', '.join(VOCABULARIES)}")
        known = asdict(VOCABULARIES[base])
        both = {key for key, own in content.items() if isinstance(own, dict) and isinstance(known.get(key), dict)}
        content = known | content | {key: known[key] | content[key] for key in both}
    return _of_text(json.dumps(content, default=str), str(path))


@cache  # one object for one content, by which `grammar` keeps what it makes of a vocabulary
def _of_text(text: str, source: str = "vocabulary") -> Vocabulary:
    content = json.loads(text)
    labels = list(content["phrases"]) if isinstance(content.get("phrases"), dict) else []
    title = str(content.get("subject", ""))
    defaults = {"stated": labels[:MOST_STATED], "title": title[:1].upper() + title[1:]}
    return read(Vocabulary, defaults | content, source)


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


VOCABULARIES = {path.stem: _from_file(path) for path in sorted(Path(__file__).with_name("vocabularies").glob("*.yaml"))}
CHEST, PHANTOM, SKIN = (VOCABULARIES[name] for name in ("chest", "phantom", "skin"))
CHEXPERT_LABELS, PHANTOM_LABELS, SKIN_DIAGNOSES = CHEST.labels[:14], PHANTOM.labels, SKIN.labels[1:9]
DEVICE_KINDS = CHEST.details["Support Devices"]
# Words of users beside those of vocabularies: spellings, verbs, and terms for kinds of devices.
WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))
