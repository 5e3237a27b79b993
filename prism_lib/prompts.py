"""Labels become captions, and an edit of labels becomes a pair of prompts.

Prompt-to-prompt edits an image by the difference of two prompts, so a prompt must be text that the model has
been trained on, and the pair should differ as little as possible. Hence two rules. Training captions come
from several templates that also *negate* ("without support devices"), and a fixed share of them follows the
"explicit" template word for word. An edit writes both of its prompts with that same template: they differ
only in "with" -> "without" and have equal length, so that no padding token of the target inherits the
attention map of a word that was removed.

Only what is known is said: neither an uncertain nor a missing label is ever written as an absence. The names
and phrases of labels are in `prism_lib.labels`, and can be had from here too.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from prism_lib.labels import (
    CHEST,
    NO_FINDING,
    NOT_A_DISEASE,
    PHANTOM,
    Labels,
    Vocabulary,
    label_state,
    snake_case,
    vocabulary,
)

__all__ = [
    "CHEST",
    "PHANTOM",
    "TEMPLATES",
    "Edit",
    "PromptPair",
    "Vocabulary",
    "caption",
    "corpus",
    "sample_caption",
    "snake_case",
    "unseen_words",
    "vocabulary",
]

_PUNCTUATION = ".,;:!?()\"'"


@dataclass(frozen=True)
class Clause:
    """One label in a caption: its name, the phrase chosen for it, and whether it is present."""

    label: str
    phrase: str
    present: bool


@dataclass(frozen=True)
class Statement:
    """What a caption has to say: subject, clauses in order, and whether the film is labelled normal."""

    subject: str
    clauses: tuple[Clause, ...]
    normal: bool

    def phrases(self, present: bool) -> list[str]:
        """The phrases of all present, or of all absent, labels."""
        return [clause.phrase for clause in self.clauses if clause.present == present]


def _explicit(said: Statement) -> str:
    """chest x-ray with cardiomegaly, without pleural effusion, with support devices"""
    clauses = [f"{'with' if clause.present else 'without'} {clause.phrase}" for clause in said.clauses]
    return f"{said.subject} {', '.join(clauses)}".strip()


def _prism(said: Statement) -> str:
    """PRISM's own two: 'Chest X-ray showing A, B' and 'Normal chest X-ray with no significant findings'"""
    present = [clause.label for clause in said.clauses if clause.present]
    if present:
        return f"Chest X-ray showing {', '.join(present)}"
    # Only what is labelled normal is called normal; PRISM's code says it of every film without a label.
    return "Normal chest X-ray with no significant findings" if said.normal else "Chest X-ray"


def _present(said: Statement) -> str:
    """chest x-ray with cardiomegaly and support devices"""
    phrases = said.phrases(present=True)
    return f"{said.subject} with {_enumerate(phrases, 'and')}" if phrases else said.subject


def _absent(said: Statement) -> str:
    """chest x-ray without pleural effusion or support devices"""
    phrases = said.phrases(present=False)
    return f"{said.subject} without {_enumerate(phrases, 'or')}" if phrases else said.subject


def _negated(said: Statement) -> str:
    """chest x-ray showing cardiomegaly, no pleural effusion"""
    clauses = [f"{'showing' if clause.present else 'no'} {clause.phrase}" for clause in said.clauses]
    return f"{said.subject} {', '.join(clauses)}".strip()


def _report(said: Statement) -> str:
    """there is evidence of cardiomegaly. there is no pleural effusion."""
    sentences = [f"there is {'evidence of' if c.present else 'no'} {c.phrase}." for c in said.clauses]
    return " ".join(sentences) or said.subject


def _patient(said: Statement) -> str:
    """chest x-ray of a patient with cardiomegaly, without pleural effusion"""
    return _explicit(replace(said, subject=f"{said.subject} of a patient"))


TEMPLATES: Mapping[str, Callable[[Statement], str]] = {
    "explicit": _explicit,
    "prism": _prism,
    "present": _present,
    "absent": _absent,
    "negated": _negated,
    "report": _report,
    "patient": _patient,
}


def caption(labels: Labels, template: str = "explicit", vocab: Vocabulary = CHEST) -> str:
    """The caption of `labels` in one of TEMPLATES: plain phrases in the vocabulary's order."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown caption template {template!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[template](_statement(labels, vocab))


def sample_caption(
    labels: Labels,
    rng: random.Random,
    vocab: Vocabulary = CHEST,
    explicit_share: float = 0.5,
    details: Mapping[str, str] | None = None,
) -> str:
    """A training caption: the explicit one with probability `explicit_share`, else any other template.

    The others shuffle their clauses and may say a synonym, or for a present label its entry in `details`:
    {"Pleural Effusion": "left pleural effusion", "Support Devices": "pacemaker"}.
    """
    if not 0 <= explicit_share <= 1:
        raise ValueError(f"explicit_share is {explicit_share}; expected a share in [0, 1]")
    said = _statement(labels, vocab)
    if rng.random() < explicit_share:
        return _explicit(said)
    clauses = [_reworded(clause, rng, vocab, details or {}) for clause in said.clauses]
    rng.shuffle(clauses)
    template = rng.choice([name for name in TEMPLATES if name != "explicit"])
    return TEMPLATES[template](replace(said, clauses=tuple(clauses)))


def corpus(vocab: Vocabulary = CHEST) -> list[str]:
    """Every phrase of a vocabulary in every template, present and absent: text to train a tokenizer on."""
    texts = [caption({NO_FINDING: 1}, template, vocab) for template in TEMPLATES]
    for label, phrase in vocab.phrases.items():
        wordings = (phrase, *vocab.synonyms.get(label, ()), *vocab.details.get(label, ()))
        clauses = [Clause(label, wording, present) for wording in wordings for present in (True, False)]
        statements = [Statement(vocab.subject, (clause, clause), False) for clause in clauses]
        texts += [template(said) for said in statements for template in TEMPLATES.values()]
    return texts


def unseen_words(prompts: Iterable[str], captions: Iterable[str]) -> tuple[str, ...]:
    """The words of `prompts` that no caption has, sorted: a model cannot follow what it never read."""
    seen = {word for text in captions for word in _words(text)}
    return tuple(sorted({word for text in prompts for word in _words(text)} - seen))


def _statement(labels: Labels, vocab: Vocabulary, also: Sequence[str] = ()) -> Statement:
    """All that is present, and the known absences among `vocab.stated` and `also`, in order."""
    clauses = []
    for label, phrase in vocab.phrases.items():
        state = label_state(label, labels.get(label))
        if state or (state is False and (label in vocab.stated or label in also)):
            clauses.append(Clause(label, phrase, state))
    normal = label_state(NO_FINDING, labels.get(NO_FINDING)) is True
    return Statement(vocab.subject, tuple(clauses), normal)


def _reworded(clause: Clause, rng: random.Random, vocab: Vocabulary, details: Mapping[str, str]) -> Clause:
    """The same clause in a phrase drawn from its plain one, its synonyms and, where present, its detail."""
    phrases = [clause.phrase, *vocab.synonyms.get(clause.label, ())]
    if clause.present and clause.label in details:
        phrases.append(details[clause.label])
    return Clause(clause.label, rng.choice(phrases), clause.present)


def _enumerate(phrases: Sequence[str], conjunction: str) -> str:
    """a; a and b; a, b and c"""
    return f" {conjunction} ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())


@dataclass(frozen=True)
class PromptPair:
    """Source and target prompt, with the phrases of each that the edit is about (for alignment and masks)."""

    source: str
    target: str
    source_words: tuple[str, ...]
    target_words: tuple[str, ...]


@dataclass(frozen=True)
class Edit:
    """An intervention: labels to remove and labels to add, or a pair of free texts (`Edit.text`)."""

    remove: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    source: str = ""
    target: str = ""
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if {type(self.remove), type(self.add)} != {tuple}:
            raise ValueError(f"remove and add take tuples of labels: {self}")
        if both := set(self.remove) & set(self.add):
            raise ValueError(f"contradictory edit: {_listed(both)} both removed and added")
        if NO_FINDING in (*self.remove, *self.add):
            raise ValueError(f"{NO_FINDING!r} cannot be edited: name the findings to remove or add")
        if bool(self.source) != bool(self.target):
            raise ValueError(f"a text edit needs both prompts, got {self.source!r} and {self.target!r}")
        if self.source and (self.remove or self.add):
            raise ValueError(f"an edit has either labels or free text, not both: {self}")

    @classmethod
    def text(cls, source: str, target: str, words: Sequence[str] = ()) -> Edit:
        """An edit between two prompts in the user's own words.

        `words` are the phrases that the edit is about ("medical devices"); by default those that differ.
        """
        if not source.strip() or not target.strip():
            raise ValueError(f"a text edit needs both prompts, got {source!r} and {target!r}")
        source, target = " ".join(source.split()), " ".join(target.split())
        for phrase in words:
            if not (_says(source, phrase) or _says(target, phrase)):
                raise ValueError(f"{phrase!r} is in neither prompt: {source!r}, {target!r}")
        return cls(source=source, target=target, words=tuple(words))

    @classmethod
    def from_key(cls, key: str, vocab: Vocabulary = CHEST) -> Edit:
        """The edit of a key such as "remove_support_devices" or "remove_edema_and_add_fracture"."""
        changes: dict[str, list[str]] = {"remove": [], "add": []}
        for part in [] if key == "unchanged" else re.split(r"_and_(?=remove_|add_)", key):
            verb, _, name = part.partition("_")
            if verb not in changes:
                raise ValueError(f"unknown edit {key!r}: {part!r} does not start with remove_ or add_")
            changes[verb].append(vocab.label(name))
        return cls(tuple(changes["remove"]), tuple(changes["add"]))

    @property
    def key(self) -> str:
        """A name for files and records; that of free text ends in a hash, so that no two texts collide."""
        if self.source:
            digest = hashlib.sha256(f"{self.source}\n{self.target}".encode()).hexdigest()[:8]
            return f"text_{snake_case(self.target)[:48]}_{digest}"
        parts = [f"remove_{snake_case(label)}" for label in self.remove]
        parts += [f"add_{snake_case(label)}" for label in self.add]
        return "_and_".join(parts) or "unchanged"

    @property
    def attributes(self) -> dict[str, float]:
        """What the edit sets in a causal model: {"support_devices": 0.0} for their removal."""
        changes = dict.fromkeys(self.remove, 0.0) | dict.fromkeys(self.add, 1.0)
        return {snake_case(label): value for label, value in changes.items()}

    def check(self, labels: Labels, vocab: Vocabulary = CHEST) -> None:
        """Raise ValueError if a label is unknown, a removed one labelled absent or an added one present."""
        for label in (*self.remove, *self.add):
            if label not in vocab.phrases:
                raise ValueError(f"unknown label {label!r} in an edit; known: {', '.join(vocab.phrases)}")
        if absent := [label for label in self.remove if label_state(label, labels.get(label)) is False]:
            raise ValueError(f"contradictory edit {self.key}: {_listed(absent)} already labelled absent")
        if present := [label for label in self.add if label_state(label, labels.get(label))]:
            raise ValueError(f"contradictory edit {self.key}: {_listed(present)} already labelled present")

    def apply(self, labels: Labels) -> dict[str, float | None]:
        """The labels the counterfactual should have; "No Finding", where given, follows from the others."""
        edited = dict(labels) | dict.fromkeys(self.remove, 0) | dict.fromkeys(self.add, 1)
        if NO_FINDING in labels and (self.remove or self.add):
            edited[NO_FINDING] = _no_finding(edited)
        return edited

    def prompts(self, labels: Labels, vocab: Vocabulary = CHEST) -> PromptPair:
        """Source and target prompt for an image with `labels`, equal but for "with" <-> "without"."""
        self.check(labels, vocab)
        if self.source:
            return PromptPair(self.source, self.target, *self._text_words())
        changed = (*self.remove, *self.add)
        before = dict(labels) | dict.fromkeys(self.remove, 1) | dict.fromkeys(self.add, 0)
        source, target = (_explicit(_statement(x, vocab, changed)) for x in (before, self.apply(before)))
        words = tuple(vocab.phrases[label] for label in changed)
        return PromptPair(source, target, words, words)

    def _text_words(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if not self.words:
            return _differing_phrases(self.source, self.target)
        source, target = (tuple(w for w in self.words if _says(p, w)) for p in (self.source, self.target))
        return source, target


def _no_finding(labels: Labels) -> float | None:
    """0 if a disease among `labels` is present, 1 if all of them are known to be absent, else None."""
    diseases = [label for label in CHEST.phrases if label in labels and label not in NOT_A_DISEASE]
    states = [label_state(label, labels[label]) for label in diseases]
    if any(states):
        return 0
    return 1 if states and None not in states else None


def _differing_phrases(source: str, target: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The runs of words in which two texts differ: those of the source, and those of the target."""
    texts = source.split(), target.split()
    ours, theirs = ([word.strip(_PUNCTUATION).lower() for word in text] for text in texts)
    matcher = difflib.SequenceMatcher(a=ours, b=theirs, autojunk=False)
    changes = [(slice(i, j), slice(k, m)) for op, i, j, k, m in matcher.get_opcodes() if op != "equal"]
    removed, added = (
        tuple(filter(None, (" ".join(text[change[side]]).strip(_PUNCTUATION) for change in changes)))
        for side, text in enumerate(texts)
    )
    return removed, added


def _says(text: str, phrase: str) -> bool:
    """Whether a phrase occurs in a text as whole words, whatever its case."""
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    return bool(pattern) and re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) is not None


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(repr(label) for label in sorted(labels)) + " is"
