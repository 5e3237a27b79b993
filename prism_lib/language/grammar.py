"""What a sentence changes: "remove the pacemaker and the leads, keep the effusion".

    sentence  ::=  clause (("," | ";" | "." | "and" | "but" | "then") clause)*
    clause    ::=  verb finding (("," | "and" | "or") finding)*      the verb holds until the next one
                |  "replace" finding "with" finding
                |  "enlarge the heart", "make the heart normal", ...  (`STATES`)
                |  "keep everything else"                            always true here
    verb      ::=  remove, without, no, ... | add, with, ... | keep, do not change, ...  (`VERBS`)
    finding   ::=  a label, phrase, synonym, detail or alias of the vocabulary, singular or plural

Case, hyphens, articles and "please" make no difference. Anything else is named in a ValueError, with the nearest known
word; so are a verb without a finding, a finding without a verb, and a contradiction.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

from prism_lib.language.labels import Vocabulary

# The first word of each row is the change that the others mean too.
VERBS: dict[str, tuple[str, ...]] = {
    "remove": (
        "remove", "delete", "erase", "eliminate", "drop", "clear", "take out", "take away", "get rid of",
        "without", "no", "replace", "exchange", "swap",
    ),
    "add": ("add", "insert", "introduce", "place", "put in", "give", "show", "with", "plus", "by", "for"),
    "keep": (
        "keep", "preserve", "retain", "leave", "maintain", "do not change", "do not remove", "do not touch",
        "without changing", "without touching", "without removing",
    ),
}  # fmt: skip
STATES: dict[str, dict[str, tuple[str, ...]]] = {
    "Cardiomegaly": {
        "add": ("enlarge heart", *(f"make heart {size}" for size in ("bigger", "larger", "big", "large", "enlarged"))),
        "remove": (
            "make heart normal", "make heart smaller", "make heart normal size", "make heart normal in size",
            "make heart normal sized", "shrink heart", "normalize heart", "normalise heart", "normal heart",
            "normal heart size", "normal sized heart",
        ),
    },
}  # fmt: skip
FILLERS = {"the", "a", "an", "any", "all", "please", "patient", "patient's", "its", "their", "his", "her", "of"}
JOINTS = {",", ";", ".", "!", "and", "or", "but", "then", "also"}
REST = ("everything else", "all else", "rest", "everything else unchanged", "rest unchanged", "rest as it is")


class _Sign(NamedTuple):
    kind: str  # "verb", "finding", "state" (a finding with its change) or "rest"
    change: str = ""
    finding: str = ""


def parse(text: str, vocab: Vocabulary) -> dict[str, str]:
    """The labels and details that `text` names, in its order, each with "remove", "add" or "keep"."""
    signs, unknown = _read(text, vocab)
    if unknown:
        raise ValueError(f"cannot read {text!r}: {'; '.join(unknown)}")
    asked: dict[str, str] = {}
    verb, said, used = "", "", True
    for words, sign in [*signs, ("", _Sign("verb"))]:
        if sign.kind == "verb":
            if not used:
                raise ValueError(f"cannot read {text!r}: {said!r} has nothing to act on")
            verb, said, used = sign.change, words, False
            continue
        if sign.kind == "rest":
            if verb != "keep":
                raise ValueError(f"cannot read {text!r}: {words!r} can only be kept")
            used = True
            continue
        if sign.kind == "finding" and not verb:
            raise ValueError(f"cannot read {text!r}: it does not say what to do with {words!r}")
        if sign.kind == "state" and verb == "remove":
            raise ValueError(f"cannot read {text!r}: {words!r} is a state and cannot be removed; say what to add")
        used, change = True, sign.change or verb
        if asked.setdefault(sign.finding, change) != change:
            raise ValueError(f"contradictory edit {text!r}: {asked[sign.finding]} and {change} {sign.finding!r}")
    if not {"remove", "add"} & set(asked.values()):
        raise ValueError(f"{text!r} asks for no change: name what to remove or to add")
    return asked


def _read(text: str, vocab: Vocabulary) -> tuple[list[tuple[str, _Sign]], list[str]]:
    """The signs of a text with the words that made them, by longest match, and what could not be read."""
    lexicon = _lexicon(vocab)
    longest = max(map(len, lexicon))
    words = list(_words(text))
    signs: list[tuple[str, _Sign]] = []
    unknown: list[str] = []
    at = 0
    while at < len(words):
        lengths = range(min(longest, len(words) - at), 0, -1)
        length = next((n for n in lengths if tuple(words[at : at + n]) in lexicon), 0)
        run = tuple(words[at : at + length])
        if length:
            signs.append((" ".join(run), lexicon[run]))
        elif words[at] not in JOINTS:
            unknown.append(_not_understood(words[at], lexicon))
        at += max(length, 1)
    return signs, unknown


def _words(text: str) -> Iterator[str]:
    """Lower-case words and separators without fillers; hyphens part words and "don't" is two."""
    spelled = text.lower().replace("’", "'").replace("don't", "do not").replace("-", " ").replace("_", " ")
    for word in re.findall(r"[^\s,;.!]+|[,;.!]", spelled):
        if word not in FILLERS:
            yield word


def _lexicon(vocab: Vocabulary) -> dict[tuple[str, ...], _Sign]:
    """Every run of words that means something with this vocabulary."""
    lexicon = {tuple(words.split()): _Sign("rest") for words in REST}
    for change, verbs in VERBS.items():
        lexicon |= {tuple(words.split()): _Sign("verb", change) for words in verbs}
    for label, changes in STATES.items():
        for change, phrases in changes.items() if label in vocab.phrases else ():
            lexicon |= {tuple(words.split()): _Sign("state", change, label) for words in phrases}
    for name in (*vocab.phrases, *vocab.owners):
        for words in (name, vocab.phrase(name), *vocab.synonyms.get(name, ()), *vocab.aliases.get(name, ())):
            *first, noun = _words(words)
            lexicon[*first, noun] = sign = _Sign("finding", finding=name)
            # The plural of a singular noun and the other way round.
            other = noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else f"{noun}s"
            lexicon.setdefault((*first, other), sign)
    return lexicon


def _not_understood(word: str, lexicon: dict[tuple[str, ...], _Sign]) -> str:
    longer = [" ".join(run) for run, sign in lexicon.items() if word in run and sign.kind == "finding"]
    if longer:
        return f"{word!r} alone is not understood, as it is in {longer[0]!r}"
    near = difflib.get_close_matches(word, sorted({part for run in lexicon for part in run}), n=1)
    return f"{word!r} is not understood" + (f"; did you mean {near[0]!r}?" if near else "")
