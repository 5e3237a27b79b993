"""An edit of labels becomes a pair of prompts for prompt-to-prompt: captions in the "explicit" template.

They differ only in "with" -> "without", so that no padding token inherits the attention map of a removed word.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from prism_lib.language import grammar
from prism_lib.language.captions import explicit, statement
from prism_lib.language.labels import CHEST, NO_FINDING, Labels, Vocabulary, label_state, snake_case

_PUNCTUATION = ".,;:!?()\"'"
_DENYING = {"without", "no", "not", "absence", "normal"}
_AFFIRMING = {"with", "showing", "shows", "but"}
_ARTICLES = {"a", "an", "the", "and", "or"}
_VERBS = ("remove", "add", "keep")


@dataclass(frozen=True)
class PromptPair:
    """Source and target prompt, with the phrases of each that are edited (for alignment and masks)."""

    source: str
    target: str
    source_words: tuple[str, ...]
    target_words: tuple[str, ...]
    side: str = ""  # of the patient, on which alone the edit may act: "left", "right", or "" for both

    @cached_property
    def adds(self) -> bool:
        """Whether the target affirms something that the source does not."""
        return bool(affirmed(self.target) - affirmed(self.source))

    @cached_property
    def lost(self) -> set[str]:
        """Words that the source affirms and the target does not."""
        return affirmed(self.source) - affirmed(self.target)


Pairs = Sequence[PromptPair]  # one for each image of a batch
NO_EDIT = PromptPair("", "", (), ())


@dataclass(frozen=True)
class Edit:
    """An intervention: labels to remove and labels to add, or a pair of free texts (`Edit.text`).

    A detail ("pacemaker") may stand for its label. Labels in `keep` are present and must stay: both prompts say so.
    """

    remove: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    source: str = ""
    target: str = ""
    words: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    note: str = field(default="", compare=False)  # of a sentence: which of its words have no effect, or a wider one

    def __post_init__(self) -> None:
        if {type(self.remove), type(self.add), type(self.keep)} != {tuple}:
            raise ValueError(f"remove, add and keep take tuples of labels: {self}")
        if both := set(self.remove) & set(self.add):
            raise ValueError(f"contradictory edit: {_listed(both)} both removed and added")
        if both := set(self.keep) & {*self.remove, *self.add}:
            raise ValueError(f"contradictory edit: {_listed(both)} both kept and changed")
        if NO_FINDING in (*self.remove, *self.add, *self.keep):
            raise ValueError(f"{NO_FINDING!r} cannot be edited: name the findings to remove or add")
        if self.source and (self.remove or self.add or self.keep):
            raise ValueError(f"an edit has either labels or free text, not both: {self}")

    @classmethod
    def text(cls, source: str, target: str, words: Sequence[str] = ()) -> "Edit":
        """An edit between two prompts; `words` are the edited phrases, by default those that differ."""
        source, target = " ".join(source.split()), " ".join(target.split())
        if not source or not target:
            raise ValueError(f"a text edit needs both prompts, got {source!r} and {target!r}")
        for phrase in words:
            if not (find_phrase(source, phrase) or find_phrase(target, phrase)):
                raise ValueError(f"{phrase!r} is in neither prompt: {source!r}, {target!r}")
        return cls(source=source, target=target, words=tuple(words))

    @classmethod
    def parse(cls, text: str, vocab: Vocabulary = CHEST, labels: Labels | None = None) -> "Edit":
        """The edit of a sentence (see `grammar`); "everything" is what `labels` call present, else `vocab.stated`."""
        asked, note = grammar.parse(text, vocab, labels)
        remove, add, keep = (tuple(name for name in asked if asked[name] == verb) for verb in _VERBS)
        edit = cls(remove, add, keep=keep, note=note)
        edit._check_names(vocab)
        return edit

    @classmethod
    def read(cls, text: str, vocab: Vocabulary = CHEST, labels: Labels | None = None) -> "Edit":
        """The edit of a key, of a sentence, or of "source prompt -> target prompt", whichever `text` is."""
        text = text.strip()
        source, arrow, target = text.partition("->")
        after = re.split(r"[,;.!]| and | but |$", target.strip().lower(), maxsplit=1)[0].strip()
        if arrow and after not in grammar.AFTER:  # "pacemaker -> none, keep the leads" is a sentence
            return cls.text(source, target)
        is_key = text == "unchanged" or (" " not in text and text.startswith(("remove_", "add_")))
        return cls.from_key(text, vocab) if is_key else cls.parse(text, vocab, labels)

    @classmethod
    def from_key(cls, key: str, vocab: Vocabulary = CHEST) -> "Edit":
        """The edit of a key such as "remove_support_devices" or "remove_edema_and_add_fracture"."""
        changes: dict[str, tuple[str, ...]] = {}
        for part in [] if key == "unchanged" else re.split(r"_and_(?=remove_|add_|keep_)", key):
            verb, _, name = part.partition("_")
            if verb not in _VERBS:
                raise ValueError(f"unknown edit {key!r}: {part!r} does not start with remove_ or add_")
            changes[verb] = (*changes.get(verb, ()), vocab.label(name))
        return cls(changes.get("remove", ()), changes.get("add", ()), keep=changes.get("keep", ()))

    @property
    def key(self) -> str:
        """A name for files and records; the key of free text ends in a hash, so that no two texts collide."""
        if self.source:
            digest = hashlib.sha256(f"{self.source}\n{self.target}".encode()).hexdigest()[:8]
            return f"text_{snake_case(self.target)[:48]}_{digest}"
        named = zip(_VERBS, (self.remove, self.add, self.keep), strict=True)
        return "_and_".join(f"{verb}_{snake_case(name)}" for verb, names in named for name in names) or "unchanged"

    @property
    def attributes(self) -> dict[str, float]:
        """The intervention in a causal model: {"support_devices": 0.0} for their removal."""
        return {snake_case(name): value for names, value in ((self.remove, 0.0), (self.add, 1.0)) for name in names}

    def check(self, labels: Labels, vocab: Vocabulary = CHEST) -> None:
        """ValueError if a label is unknown, a removed or kept one labelled absent, or an added one labelled present."""
        self._check_names(vocab)
        owners = vocab.owners
        for names, verb in ((self.remove, ""), (self.keep, " and cannot be kept")):
            if absent := [n for n in names if label_state(owners.get(n, n), labels.get(owners.get(n, n))) is False]:
                raise ValueError(f"contradictory edit {self.key}: {_listed(absent)} already labelled absent{verb}")
        if present := [name for name in self.add if label_state(name, labels.get(name))]:
            raise ValueError(f"contradictory edit {self.key}: {_listed(present)} already labelled present")

    def _check_names(self, vocab: Vocabulary) -> None:
        """ValueError for an unknown name, and for a label together with one of its own details."""
        names, owners = (*self.remove, *self.add, *self.keep), vocab.owners
        for name in names:
            if name not in vocab.phrases and name not in owners:
                raise ValueError(f"unknown label {name!r} in an edit; known: {', '.join((*vocab.phrases, *owners))}")
        wider = [(name, of) for name in names for of in (owners.get(name), vocab.phrase(name)) if of != name]
        if both := [(name, of) for name, of in wider if of in names]:
            raise ValueError(f"contradictory edit {self.key}: {both[0][0]!r} is part of {both[0][1]!r}: name one")

    def apply(self, labels: Labels, vocab: Vocabulary = CHEST) -> dict[str, float | None]:
        """The labels the counterfactual should have; "No Finding", where given, follows from the others.

        With one detail removed, whether its label is still present is unknown: there may be other devices.
        """
        owners = vocab.owners
        edited = dict(labels) | {owners.get(name, name): None if name in owners else 0 for name in self.remove}
        edited |= dict.fromkeys((owners.get(name, name) for name in (*self.add, *self.keep)), 1)
        if NO_FINDING in labels and (self.remove or self.add):
            states = [label_state(n, edited[n]) for n in vocab.phrases if n in edited and n not in vocab.foreign]
            all_absent = 1 if states and None not in states else None  # None where one is not known
            edited[NO_FINDING] = 0 if any(states) else all_absent
        return edited

    def prompts(self, labels: Labels, vocab: Vocabulary = CHEST) -> PromptPair:
        """Source and target prompt for an image with `labels`, equal but for "with" <-> "without"."""
        self.check(labels, vocab)
        if self.source:
            both = self.source, self.target
            named = (tuple(w for w in self.words if find_phrase(text, w)) for text in both)
            return PromptPair(*both, *(named if self.words else _differing_phrases(*both)))
        changed, known = (*self.remove, *self.add), dict(labels) | dict.fromkeys(self.keep, 1)
        before = known | dict.fromkeys(self.remove, 1) | dict.fromkeys(self.add, 0)
        after = known | dict.fromkeys(self.remove, 0) | dict.fromkeys(self.add, 1)
        # Where a label is absent so are its details, and captions say the label: "without support devices".
        owners = {n: vocab.owners[n] for n in self.add if n in vocab.owners}
        absent = {n: owner for n, owner in owners.items() if label_state(owner, labels.get(owner)) is False}
        said = tuple(absent.get(name, name) for name in changed)
        before_words, after_words = (tuple(map(vocab.phrase, names)) for names in (said, changed))
        # The edit's own side keeps one of the other side: captions, which say no side, would contradict themselves.
        keep = {vocab.phrase(name): name for name in self.keep if vocab.phrase(name) not in after_words}.values()
        source = explicit(statement(before, vocab, (*said, *keep)))
        target = explicit(statement(after, vocab, (*changed, *keep)))
        side, *others = sorted({vocab.side(name) for name in changed}) or [""]
        if others:
            raise ValueError(f"{self.key} asks for the {others[-1]} side and for something else: make two edits of it")
        return PromptPair(source, target, before_words, after_words, side)


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


def affirmed(text: str) -> set[str]:
    """The words of a text that no word before them in their clause denies."""
    words: set[str] = set()
    for clause in re.split(r"[.,;:!?()]", text.lower()):
        denied = False
        for word in clause.split():
            if word in _DENYING | _AFFIRMING:
                denied = word in _DENYING
            elif not denied and word not in _ARTICLES:
                words.add(word)
    return words


def find_phrase(text: str, phrase: str) -> list[re.Match[str]]:
    """The places of a text where a phrase occurs as whole words, whatever its case."""
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    return list(re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)) if pattern else []


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(repr(label) for label in sorted(labels)) + " is"
