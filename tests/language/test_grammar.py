"""A sentence means exactly one edit, or it is said which of its words means nothing."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from prism_lib.language import grammar
from prism_lib.language.edits import Edit
from prism_lib.language.labels import CHEST, PHANTOM, VOCABULARIES

SICK = {"Cardiomegaly": 0, "Pleural Effusion": 1, "Support Devices": 1}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("remove the pacemaker, keep the effusion", "remove_pacemaker_and_keep_pleural_effusion"),
        ("Please remove all the support devices.", "remove_support_devices"),
        ("no devices", "remove_support_devices"),
        ("without medical hardware", "remove_support_devices"),
        ("take out the ECG leads and the central line", "remove_ecg_leads_and_remove_central_venous_catheter"),
        ("add an enlarged heart", "add_cardiomegaly"),
        ("enlarge the heart", "add_cardiomegaly"),
        ("make the heart bigger", "add_cardiomegaly"),
        ("Make the patient's heart normal in size!", "remove_cardiomegaly"),
        ("with effusion; without devices", "remove_support_devices_and_add_pleural_effusion"),
        ("add a left-sided effusion", "add_left_pleural_effusion"),
        ("remove the fluid on the right side", "remove_right_pleural_effusion"),
        ("add bilateral pleural effusions", "add_bilateral_pleural_effusion"),
        ("replace the pacemaker with ECG leads", "remove_pacemaker_and_add_ecg_leads"),
        ("remove devices, keep everything else", "remove_support_devices"),
        ("remove devices without touching the effusion", "remove_support_devices_and_keep_pleural_effusion"),
        ("remove devices, don't change the effusion", "remove_support_devices_and_keep_pleural_effusion"),
        ("remove devices and remove devices", "remove_support_devices"),
    ],
)
def test_a_sentence_is_an_edit(text, key):
    assert Edit.parse(text, PHANTOM).key == key
    assert Edit.from_key(key, PHANTOM) == Edit.parse(text, PHANTOM)


@pytest.mark.parametrize("text", ["unchanged", " remove_pacemaker_and_keep_pleural_effusion", "remove the pacemaker"])
def test_a_key_and_a_sentence_are_told_apart(text):
    known = {"unchanged": Edit(), "remove the pacemaker": Edit(remove=("pacemaker",))}
    expected = known.get(text, Edit(remove=("pacemaker",), keep=("Pleural Effusion",)))
    assert Edit.read(text, PHANTOM) == expected


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_every_word_for_a_label_is_read_singular_and_plural(vocab):
    for name in (*vocab.phrases, *vocab.owners):
        said = () if vocab.side(name) else (vocab.phrase(name),)  # captions do not say a side
        for words in (name, *said, *vocab.synonyms.get(name, ()), *vocab.aliases.get(name, ())):
            assert grammar.parse(f"remove the {words}", vocab)[0] == {name: "remove"}, words
            if not words.lower().endswith("s"):
                assert grammar.parse(f"add {words}s", vocab)[0] == {name: "add"}, words


@pytest.mark.parametrize("kind", grammar.KINDS)
def test_every_word_for_a_kind_of_device_is_read_as_the_broader_term(kind):
    broader, words = grammar.KINDS[kind]
    for word in (kind, *words):
        asked, note = grammar.parse(f"remove the {word}", CHEST)
        assert asked == {broader: "remove"} and f"is read as {broader!r}" in note, word


def test_everything_is_what_the_image_has():
    known = {"Cardiomegaly": 0, "Pleural Effusion": 1, "Support Devices": 1}
    assert Edit.parse("remove everything", PHANTOM, known).remove == ("Pleural Effusion", "Support Devices")
    assert Edit.parse("make it normal", PHANTOM, known).remove == ("Pleural Effusion",)
    assert Edit.parse("remove everything except the pacemaker", PHANTOM, known).remove == ("Pleural Effusion",)
    with pytest.raises(ValueError, match="asks for no change: none of Cardiomegaly, Pleural Effusion is labelled"):
        Edit.parse("healthy patient", PHANTOM, known | {"Pleural Effusion": 0})


def test_a_severity_that_captions_have_is_understood():
    details = {"Pleural Effusion": ("mild pleural effusion",)}
    edit = Edit.parse("add a mild pleural effusion", replace(PHANTOM, details=details, sided=()))
    assert (edit.add, edit.note) == (("mild pleural effusion",), "")


@pytest.mark.parametrize("word", ["everything", "not", "make", "it", "lines", "pacemaker", "removing"])
def test_no_word_is_answered_by_itself(word):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - any refusal but one
        Edit.parse(word, PHANTOM)
    assert f"did you mean {word!r}" not in str(refusal.value)


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_no_run_of_words_means_two_things(vocab):
    meanings = {}
    for name in (*vocab.phrases, *vocab.owners):
        said = name if vocab.side(name) else vocab.phrase(name)  # captions do not say a side
        for words in (said, *vocab.synonyms.get(name, ()), *vocab.aliases.get(name, ())):
            assert meanings.setdefault(words.lower(), name) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("remove the zeppelin and the cat", "'zeppelin' is not understood; 'cat' is not understood"),
        ("remove cardiomegally", "'cardiomegally' is not understood; did you mean 'cardiomegaly'"),
        ("remove the left pneumothorax", "'left' alone is not understood, as it is in 'left pleural effusion'"),
        ("effusion", "does not say what to do with 'effusion'"),
        ("add the effusion and remove", "'remove' has nothing to act on"),
        ("remove add the effusion", "'remove' has nothing to act on"),
        ("keep the effusion", "asks for no change"),
        ("", "asks for no change"),
        ("remove the effusion, add the effusion", "remove and add 'Pleural Effusion'"),
        ("remove the effusion, keep the effusion", "remove and keep 'Pleural Effusion'"),
        ("remove the effusion but keep the left effusion", "'left pleural effusion' is part of 'Pleural Effusion'"),
        ("remove the normal heart", "'normal heart' is a state"),
        ("remove everything else", "can only be kept"),
    ],
)
def test_what_is_not_understood_is_named(text, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        Edit.parse(text, CHEST)


def test_words_of_another_vocabulary_are_unknown():
    assert Edit.parse("remove the edema", CHEST).remove == ("Edema",)
    with pytest.raises(ValueError, match="'edema' has no label in the vocabulary 'phantom'"):
        Edit.parse("remove the edema", PHANTOM)


def test_prompts_say_the_detail_in_place_of_its_label():
    pair = Edit.parse("remove the pacemaker, keep the effusion").prompts({"Support Devices": 1}, PHANTOM)
    assert pair.source == "chest x-ray with pleural effusion, with pacemaker"
    assert pair.target == "chest x-ray with pleural effusion, without pacemaker"
    assert pair.source_words == pair.target_words == ("pacemaker",)


def test_labels_after_a_detail():
    assert Edit.parse("remove the pacemaker").apply(SICK)["Support Devices"] is None
    assert Edit.parse("replace the pacemaker with ecg leads").apply(SICK)["Support Devices"] == 1
    assert Edit.parse("add a pacemaker").apply({"Support Devices": 0, "No Finding": 1}) == {
        "Support Devices": 1,
        "No Finding": None,
    }


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        ("remove the pacemaker", {"Support Devices": 0}, "'pacemaker' is already labelled absent"),
        ("remove devices, keep the effusion", {"Pleural Effusion": 0}, "'Pleural Effusion' is already labelled absent"),
        ("enlarge the heart", {"Cardiomegaly": 1}, "'Cardiomegaly' is already labelled present"),
    ],
)
def test_an_edit_that_the_labels_contradict_is_refused(text, labels, message):
    with pytest.raises(ValueError, match=message):
        Edit.parse(text).prompts(labels)


def test_a_device_may_join_others():
    pair = Edit.parse("add ecg leads").prompts({"Support Devices": 1}, PHANTOM)
    assert (pair.source, pair.target) == ("chest x-ray without ecg leads", "chest x-ray with ecg leads")


with Path(__file__).with_name("sentences.csv").open(encoding="utf-8", newline="") as file:
    SENTENCES = list(csv.DictReader(file))


def test_the_table_of_sentences_is_varied():
    assert len({(row["sentence"], row["vocabulary"]) for row in SENTENCES}) == len(SENTENCES) >= 120
    assert {row["vocabulary"] for row in SENTENCES} == VOCABULARIES.keys()


@pytest.mark.parametrize("row", SENTENCES, ids=[f"{row['vocabulary']}: {row['sentence']}" for row in SENTENCES])
def test_a_sentence_means_what_the_table_says(row):
    vocab = VOCABULARIES[row["vocabulary"]]
    if row["means"] == "refused":
        with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is looked at below
            Edit.read(row["sentence"], vocab)
        assert row["says"] in str(refusal.value)
        return
    edit = Edit.read(row["sentence"], vocab)
    asked = {(verb, name) for verb in ("remove", "add", "keep") for name in getattr(edit, verb)}
    assert asked == {tuple(part.split(" ", 1)) for part in row["means"].split("; ")}
    assert row["says"] in edit.note
