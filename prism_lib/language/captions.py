"""Labels become captions: the text of training and of an edit's prompts. What is uncertain is never called absent."""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from prism_lib.language.labels import CHEST, NO_FINDING, Labels, Vocabulary, label_state

MOST_CLAUSES = 7  # of a free caption: more would overflow CLIP's 77 tokens in the wordier templates
DETAILED_SHARE = 0.4  # of the explicit captions say details where they are known, as an edit may


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
    title: str = CHEST.title


def explicit(said: Statement, yes: str = "with", no: str = "without") -> str:
    """chest x-ray with cardiomegaly, without pleural effusion, with support devices"""
    clauses = [f"{yes if clause.present else no} {clause.phrase}" for clause in said.clauses]
    return f"{said.subject} {', '.join(clauses)}".strip()


def _prism(said: Statement) -> str:
    """PRISM's own two: 'Chest X-ray showing A, B' and 'Normal chest X-ray with no significant findings'"""
    present = [clause.label for clause in said.clauses if clause.present]
    if present:
        return f"{said.title} showing {', '.join(present)}"
    # Only what is labelled normal is called normal; PRISM's code says it of every film without a label.
    title = said.title[:1].lower() + said.title[1:]
    return f"Normal {title} with no significant findings" if said.normal else said.title


def _only(said: Statement, present: bool, word: str, conjunction: str) -> str:
    """chest x-ray with cardiomegaly and support devices"""
    phrases = [clause.phrase for clause in said.clauses if clause.present == present]
    listed = f" {conjunction} ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]]))
    return f"{said.subject} {word} {listed}" if phrases else said.subject


def _report(said: Statement) -> str:
    """there is evidence of cardiomegaly. there is no pleural effusion."""
    sentences = [f"there is {'evidence of' if c.present else 'no'} {c.phrase}." for c in said.clauses]
    return " ".join(sentences) or said.subject


TEMPLATES: Mapping[str, Callable[[Statement], str]] = {
    "explicit": explicit,
    "prism": _prism,
    "present": lambda said: _only(said, True, "with", "and"),
    "absent": lambda said: _only(said, False, "without", "or"),
    "negated": lambda said: explicit(said, "showing", "no"),
    "report": _report,
    "patient": lambda said: explicit(replace(said, subject=f"{said.subject} of a patient")),
}


def caption(labels: Labels, template: str = "explicit", vocab: Vocabulary = CHEST) -> str:
    """The caption of `labels` in one of TEMPLATES: plain phrases in the vocabulary's order."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown caption template {template!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[template](statement(labels, vocab))


def sample_caption(
    labels: Labels, rng: random.Random, vocab: Vocabulary, explicit_share: float, details: Mapping[str, str]
) -> str:
    """A training caption: the explicit one with probability `explicit_share`, else any other template.

    The others shuffle their clauses, leave out absences beyond `MOST_CLAUSES`, and may say a synonym, or for a present
    label its entry in `details`: {"Pleural Effusion": "left pleural effusion", "Support Devices": "pacemaker"}.
    """
    said = statement(labels, vocab)
    detailed = [replace(c, phrase=details.get(c.label, c.phrase)) if c.present else c for c in said.clauses]
    if rng.random() < explicit_share:
        return explicit(replace(said, clauses=tuple(detailed)) if details and rng.random() < DETAILED_SHARE else said)
    clauses = []
    for clause in said.clauses:
        phrases = [clause.phrase, *vocab.synonyms.get(clause.label, ())]
        if clause.present and clause.label in details:
            phrases.append(details[clause.label])
        clauses.append(replace(clause, phrase=rng.choice(phrases)))
    rng.shuffle(clauses)
    if len(clauses) > MOST_CLAUSES:
        clauses = sorted(clauses, key=lambda clause: not clause.present)[:MOST_CLAUSES]
        rng.shuffle(clauses)
    template = rng.choice([name for name in TEMPLATES if name != "explicit"])
    return TEMPLATES[template](replace(said, clauses=tuple(clauses)))


def corpus(vocab: Vocabulary = CHEST, details: bool = True) -> list[str]:
    """Every phrase of a vocabulary in every template, present and absent: text to train a tokenizer on."""
    texts = [caption({NO_FINDING: 1}, template, vocab) for template in TEMPLATES]
    for label, phrase in vocab.phrases.items():
        wordings = (phrase, *vocab.synonyms.get(label, ()), *(vocab.details.get(label, ()) if details else ()))
        clauses = [Clause(label, wording, present) for wording in wordings for present in (True, False)]
        statements = [Statement(vocab.subject, (clause, clause), False, vocab.title) for clause in clauses]
        texts += [template(said) for said in statements for template in TEMPLATES.values()]
    return texts


def unseen_words(prompts: Iterable[str], captions: Iterable[str]) -> tuple[str, ...]:
    """The words of `prompts` that no caption has, sorted: a model cannot follow what it never read."""
    texts = (" ".join(each).lower() for each in (prompts, captions))
    said, seen = (set(re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text)) for text in texts)
    return tuple(sorted(said - seen))


def statement(labels: Labels, vocab: Vocabulary, also: Sequence[str] = ()) -> Statement:
    """All that is present, and the known absences among `vocab.stated` and `also`; details in `also` replace labels."""
    clauses = []
    for label in vocab.phrases:
        details = [detail for detail, owner in vocab.owners.items() if owner == label and detail in also]
        for name in details or [label]:
            state = label_state(name, labels.get(name))
            if state or (state is False and (name in vocab.stated or name in also)):
                clauses.append(Clause(label, vocab.phrase(name), state))
    normal = label_state(NO_FINDING, labels.get(NO_FINDING)) is True
    return Statement(vocab.subject, tuple(clauses), normal, vocab.title)
