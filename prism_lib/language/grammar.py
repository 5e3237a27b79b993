"""What a sentence changes: "remove the pacemaker and the leads, keep the effusion".

    sentence  ::=  (verb finding* | finding* after | state)*      a verb holds until the next one
    after     ::=  removed, "-> none", unchanged, ...
    state     ::=  "make the heart normal", "healthy patient", "clear lungs", ...
    finding   ::=  a word for a label, a detail, a kind of device, or several labels ("everything")

All words are in `words.yaml`. A ValueError names what cannot be read, with the nearest known term.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from typing import NamedTuple

from prism_lib.language.labels import CHEST, VOCABULARIES, WORDS, Labels, Vocabulary, label_state

SIGNS = [(kind, change, words) for kind, table in WORDS["signs"].items() for change, words in table.items()]
AFTER = {words for kind, _, listed in SIGNS for words in listed if kind == "after"}
KINDS = {kind: (broader, words) for kind, broader, *words in WORDS["kinds"]}
TURNED = {"remove": "keep", "keep": "remove", "add": ""}  # "do not add" asks for nothing


class _Sign(NamedTuple):
    kind: str  # verb, weak, after, finding, state, rest, joint or link (without effect); "wrong" has a refusal as note
    change: str = ""
    names: tuple[str, ...] = ()  # several: those of them that are present
    note: str = ""


@dataclass
class _Clause:
    change: str = ""
    said: str = ""  # its verb
    weak: bool = False  # gives way to another verb, and to a word after the findings
    ended: bool = False
    things: list[tuple[str, _Sign]] = field(default_factory=list)


def parse(text: str, vocab: Vocabulary, labels: Labels | None = None) -> tuple[dict[str, str], str]:
    """What `text` asks for: label or detail -> remove, add or keep; and a note. `labels` say what "everything" is."""
    read = list(_read(text, vocab))
    if wrong := [sign.note for _, sign in read if sign.kind == "wrong"]:
        known = f"{vocab.name!r} has {', '.join(vocab.phrases.values())}"
        raise ValueError(f"cannot read {text!r}: {'; '.join(dict.fromkeys(wrong))}. {known}")
    asked: dict[str, str] = {}
    groups: list[tuple[str, _Sign]] = []
    for clause, words, sign in ((each, *thing) for each in _clauses(text, read) for thing in each.things):
        change, several = sign.change or clause.change, len(sign.names) > 1
        if sign.kind == "finding" and not clause.said:
            raise ValueError(f"cannot read {text!r}: it does not say what to do with {words!r}")
        if sign.kind == "state" and clause.said and clause.change != "add" and not clause.weak:
            raise ValueError(f"cannot read {text!r}: {words!r} is a state and can only be added")
        if (several and change == "add") or (sign.kind == "rest" and change in ("remove", "add") and not clause.weak):
            raise ValueError(f"cannot read {text!r}: {words!r} can only be kept{' or removed' if several else ''}")
        if several and change == "remove":
            groups.append((words, sign))
        elif len(sign.names) == 1 and asked.setdefault(sign.names[0], change) != change:
            raise ValueError(f"contradictory edit {text!r}: {asked[sign.names[0]]} and {change} {sign.names[0]!r}")
    states = {label: label_state(label, value) for label, value in (labels or {}).items()}
    if set(states.values()) <= {None}:
        states = dict.fromkeys(vocab.stated, True)
    for words, sign in groups:
        if not (present := [name for name in sign.names if states.get(name)]):
            raise ValueError(f"{words!r} asks for no change: none of {', '.join(sign.names)} is labelled present")
        named = {*asked, *(vocab.owners.get(name) for name in asked)}
        asked |= dict.fromkeys((name for name in present if name not in named), "remove")
    if not {"remove", "add"} & set(asked.values()):
        raise ValueError(f"{text!r} asks for no change: name what to remove or to add")
    notes = dict.fromkeys(sign.note for _, sign in read if sign.note)
    return {name: change for name, change in asked.items() if change}, " ".join(f"{note}." for note in notes)


def _clauses(text: str, signs: Sequence[tuple[str, _Sign]]) -> list[_Clause]:
    """The findings of a sentence, grouped by the verb before or after them."""
    clauses = [_Clause()]
    for words, sign in signs:
        last = clauses[-1]
        if sign.kind in ("verb", "weak") or (sign.kind == "after" and not last.things):
            clauses.append(_Clause(sign.change, words, sign.kind == "weak"))
        elif sign.kind == "joint":
            last.ended = bool(last.things)
        elif sign.kind == "after":
            if last.change != sign.change and last.said and not last.weak:
                raise ValueError(f"contradictory edit {text!r}: {last.said!r} and {words!r}")
            last.said = ""
            _settle(clauses, sign.change, words)
            clauses.append(_Clause())
        elif sign.kind in ("finding", "state", "rest"):
            if last.ended:
                clauses.append(last := _Clause(last.change, last.said, weak=True))
            last.things.append((words, sign))
    for number, clause in enumerate(clauses):
        idle = clause.said and not clause.things and not _settle(clauses[:number], clause.change, clause.said)
        if idle and not clause.weak:
            raise ValueError(f"cannot read {text!r}: {clause.said!r} has nothing to act on")
    return clauses


def _settle(clauses: Sequence[_Clause], change: str, said: str) -> bool:
    """Give the last clauses, those without a verb, a change; whether they name anything: "pacemaker, leads: remove"."""
    last = [clause for clause in takewhile(lambda clause: not clause.said, reversed(clauses)) if clause.things]
    for clause in last:
        clause.change, clause.said, clause.weak = change, said, False
    return bool(last)


def _read(text: str, vocab: Vocabulary) -> Iterator[tuple[str, _Sign]]:
    """The words of a text with their meaning, by longest match; those that have none with a refusal."""
    lexicon, words, at = _lexicon(vocab), _words(text), 0
    longest = max(map(len, lexicon))
    while at < len(words):
        runs = [tuple(word[0] for word in words[at : at + n]) for n in range(longest, 0, -1)]
        run = next((run for run in runs if run in lexicon), runs[-1])
        said = words[at].string[words[at].start() : words[at + len(run) - 1].end()]
        sign = lexicon.get(run) or _Sign("wrong", note=_not_understood(said, lexicon))
        yield said, sign._replace(note=sign.note.replace("{words}", said))
        at += len(run)


def _words(text: str) -> list[re.Match[str]]:
    """Words and separators of a text as `words.yaml` spells it, without fillers."""
    text = text.lower()
    for pattern, replacement in WORDS["spelling"]:
        text = re.sub(pattern, replacement, text)
    return [word for word in re.finditer(r"[^\s,;.!?]+|[,;.!?]", text) if word[0] not in WORDS["fillers"]]


@cache
def _lexicon(vocab: Vocabulary) -> dict[tuple[str, ...], _Sign]:
    """Every run of words that means something with this vocabulary; what is entered first holds."""
    lexicon: dict[tuple[str, ...], _Sign] = {}
    none = _Sign("wrong", note=f"'{{words}}' has no label in the vocabulary {vocab.name!r}")

    def enter(phrases: Sequence[str], sign: _Sign) -> None:
        for phrase in phrases:
            if not (words := [word[0] for word in _words(phrase)]):
                continue  # a label such as "A" is all fillers: its key names it
            *first, noun = words
            lexicon.setdefault((*first, noun), sign)
            # The plural of a singular noun and the other way round.
            other = noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else f"{noun}s"
            if sign.kind in ("finding", "wrong", "rest"):
                lexicon.setdefault((*first, other), sign)

    def found(name: str, kind: str = "finding", change: str = "") -> _Sign:
        own = name
        while own and own not in vocab.phrases and own not in vocab.owners:  # a chest drain is a support device
            own = KINDS[own][0] if own in KINDS else CHEST.owners.get(own, "")
        read_as = f"'{{words}}' is read as {own!r}: captions do not tell them apart" if own != name else ""
        return _Sign(kind, change, (own,), read_as) if own else none

    for name, changes in WORDS["states"].items():
        for change, phrases in changes.items():
            enter(phrases, found(name, "state", change))
    for group in WORDS["groups"].values():
        only, but = group.get("only", vocab.phrases), vocab.foreign if "but" in group else ()
        names = tuple(name for name in vocab.phrases if name in only and name not in but)
        for kind, change in (("state", "remove"), ("finding", "")):
            enter(group.get(kind, ()), _Sign(kind, change, names) if names else none)
    for kind, change, phrases in SIGNS:
        enter(phrases, _Sign(kind, change))
    for kind, change, phrases in SIGNS:
        if kind in ("verb", "weak", "after"):
            turned = _Sign("after" if kind == "after" else "verb", TURNED[change])
            enter([f"{no} {words}" for no in WORDS["negators"] for words in phrases], turned)
    for known in (vocab, *VOCABULARIES.values()):
        for name in (*known.phrases, *known.owners):
            words = known.phrase(name), *known.synonyms.get(name, ()), *known.aliases.get(name, ())
            enter((name, *words), found(name))
    for kind, (_, words) in KINDS.items():
        enter((kind, *words), found(kind))
    enter(WORDS["unlabelled"], none)
    for kind, sentences in (("wrong", WORDS["refused"]), ("link", WORDS["unheard"])):
        for sentence, phrases in sentences.items():
            enter(phrases, _Sign(kind, note=sentence))
    return lexicon


def _not_understood(word: str, lexicon: dict[tuple[str, ...], _Sign]) -> str:
    terms = {part: run for run, sign in reversed(lexicon.items()) if sign.kind in ("verb", "finding") for part in run}
    if word in terms and lexicon[terms[word]].kind == "finding":
        return f"{word!r} alone is not understood, as it is in {' '.join(terms[word])!r}"
    near = difflib.get_close_matches(word, sorted(terms.keys() - {word}), n=1, cutoff=0.7)
    return f"{word!r} is not understood" + (f"; did you mean {' '.join(terms[near[0]])!r}?" if near else "")
