"""Captions say only what is known, and an edit's two prompts differ only in what the edit is about."""

import random
from dataclasses import replace

import pytest

from prism_lib.data.chest import ARCHIVES
from prism_lib.language.captions import DETAILED_SHARE, TEMPLATES, caption, corpus, sample_caption, unseen_words
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.language.labels import CHEST, PHANTOM, SIDES, SKIN, VOCABULARIES, snake_case, vocabulary

NAN = float("nan")
SICK = {"No Finding": 0, "Cardiomegaly": 1, "Pleural Effusion": 0, "Support Devices": 1}
EVERY_STATE = [
    {"No Finding": 0, "Cardiomegaly": heart, "Pleural Effusion": fluid, "Support Devices": devices}
    for heart in (0, 1)
    for fluid in (0, 1)
    for devices in (0, 1)
]
PHANTOM_EDITS = [f"{verb}_{snake_case(label)}" for verb in ("remove", "add") for label in PHANTOM.phrases]
NEGATIONS = ("without", "no")


def possible(key: str) -> list[dict[str, float | None]]:
    """The states of the phantom to which an edit can be applied."""
    edit = Edit.from_key(key)
    return [s for s in EVERY_STATE if all(s[x] for x in edit.remove) and not any(s[x] for x in edit.add)]


def sampled_captions(explicit_share: float, labels: dict[str, float | None] = SICK) -> list[str]:
    rng = random.Random(0)
    return [sample_caption(labels, rng, PHANTOM, explicit_share, {}) for _ in range(200)]


# --- captions


@pytest.mark.parametrize("vocab", [CHEST, PHANTOM], ids=["chest", "phantom"])
def test_explicit_caption_states_every_known_label_in_order(vocab):
    expected = "chest x-ray with cardiomegaly, without pleural effusion, with support devices"
    assert caption(SICK, "explicit", vocab) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("unknown", [None, NAN, -1, "missing"])
def test_what_is_not_known_is_not_said(template, unknown):
    labels = {"Cardiomegaly": 1} if unknown == "missing" else {"Cardiomegaly": 1, "Pleural Effusion": unknown}
    text = caption(labels, template, PHANTOM).lower()
    assert "effusion" not in text
    assert not set(text.split()) & {*NEGATIONS, "normal"}


def test_prism_templates_word_for_word():
    assert caption(SICK, "prism") == "Chest X-ray showing Cardiomegaly, Support Devices"
    assert caption({"No Finding": 1}, "prism") == "Normal chest X-ray with no significant findings"
    assert caption({"No Finding": 1, "Support Devices": 1}, "prism") == "Chest X-ray showing Support Devices"
    assert caption({}, "prism") == "Chest X-ray"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("present", "chest x-ray with cardiomegaly and support devices"),
        ("absent", "chest x-ray without pleural effusion"),
        ("negated", "chest x-ray showing cardiomegaly, no pleural effusion, showing support devices"),
        (
            "report",
            "there is evidence of cardiomegaly. there is no pleural effusion. there is evidence of support devices.",
        ),
        (
            "patient",
            "chest x-ray of a patient with cardiomegaly, without pleural effusion, with support devices",
        ),
    ],
)
def test_natural_templates(template, expected):
    assert caption(SICK, template, PHANTOM) == expected


def test_three_absences_are_enumerated():
    healthy = dict.fromkeys(PHANTOM.phrases, 0)
    expected = "chest x-ray without cardiomegaly, pleural effusion or support devices"
    assert caption(healthy, "absent", PHANTOM) == expected


def test_no_finding_is_never_a_clause():
    texts = [caption({"No Finding": value}, name) for name in TEMPLATES for value in (0, 1)]
    assert not any("no finding" in text.lower() for text in texts)


def test_explicit_caption_of_all_labels_stays_short():
    # Within CLIP's 77 tokens at two and a half tokens a word, its tokenizer's rate on findings.
    absent = dict.fromkeys(CHEST.labels, 0)
    assert len(caption(absent, "explicit", CHEST).split()) <= 20
    five = absent | dict.fromkeys([*ARCHIVES["nih"].labels][1:6], 1)
    assert len(caption(five, "explicit", CHEST).split()) <= 24


@pytest.mark.parametrize("value", [2, 0.5, "1", -2])
def test_unknown_label_value_is_named(value):
    with pytest.raises(ValueError, match="'Cardiomegaly' is"):
        caption({"Cardiomegaly": value})


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="known: explicit, prism"):
        caption(SICK, "haiku")
    with pytest.raises(ValueError, match="known: chest, films, phantom, skin"):
        vocabulary("brain")


# --- sampled captions


def test_sampling_follows_the_seed():
    assert sampled_captions(0.5) == sampled_captions(0.5)
    assert len(set(sampled_captions(0.5))) > 10


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_explicit_share_is_kept(share):
    exact = caption(SICK, "explicit", PHANTOM)
    assert sampled_captions(share).count(exact) / 200 == pytest.approx(share, abs=0.08)


def test_sampled_captions_never_contradict_the_labels():
    for text in sampled_captions(0.0):
        said = text.lower().replace(".", "").replace(",", "")
        assert "no cardiomegaly" not in said
        assert "without cardiomegaly" not in said
        assert "effusion" not in said or "no pleural effusion" in said or "without pleural effusion" in said


def test_details_are_said_for_present_labels_only():
    details = {"Support Devices": "pacemaker", "Pleural Effusion": "left pleural effusion"}
    rng = random.Random(0)
    texts = [sample_caption(SICK, rng, PHANTOM, 0.0, details) for _ in range(200)]
    assert any("pacemaker" in text for text in texts)
    assert not any("left" in text for text in texts)


def test_some_explicit_captions_say_the_details_as_the_prompts_of_an_edit_do():
    details = {"Support Devices": "pacemaker"}
    rng = random.Random(0)
    texts = [sample_caption(SICK, rng, PHANTOM, 1.0, details) for _ in range(400)]
    plain = caption(SICK, "explicit", PHANTOM)
    detailed = Edit(add=("pacemaker",)).prompts(SICK | {"Support Devices": 0}, PHANTOM).target
    assert set(texts) == {plain, detailed}
    assert texts.count(detailed) / 400 == pytest.approx(DETAILED_SHARE, abs=0.06)


def test_words_of_edit_prompts_occur_in_sampled_captions():
    rng = random.Random(0)
    captions = [sample_caption(labels, rng, PHANTOM, 0.5, {}) for labels in EVERY_STATE]
    pairs = [Edit.from_key(key).prompts(labels, PHANTOM) for key in PHANTOM_EDITS for labels in possible(key)]
    texts = [text for pair in pairs for text in (pair.source, pair.target)]
    assert unseen_words(texts, captions) == ()
    assert unseen_words(["Chest X-ray with Zeppelin."], captions) == ("zeppelin",)


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_corpus_holds_every_word_that_a_caption_can_say(vocab):
    rng = random.Random(0)
    texts = [
        sample_caption({label: value}, rng, vocab, 0.2, {label: detail})
        for label in vocab.labels
        for value in (0, 1)
        for detail in vocab.details.get(label, ("",))
        for _ in range(50)
    ]
    texts += [caption(SICK, template, vocab) for template in TEMPLATES]
    assert unseen_words(texts, corpus(vocab)) == ()


# --- edits


def test_where_a_label_is_absent_the_source_of_a_detail_says_the_label_as_captions_do():
    bare = SICK | {"Support Devices": 0}
    pair = Edit(add=("pacemaker", "ecg leads")).prompts(bare, PHANTOM)
    assert pair.source == caption(bare, "explicit", PHANTOM)
    assert pair.target == "chest x-ray with cardiomegaly, without pleural effusion, with pacemaker, with ecg leads"
    assert (set(pair.source_words), pair.target_words) == ({"support devices"}, ("pacemaker", "ecg leads"))
    another = Edit(add=("pacemaker",)).prompts(SICK, PHANTOM)  # beside the devices that are there
    assert "without pacemaker" in another.source and "with pacemaker" in another.target


def test_a_side_that_captions_do_not_say_is_no_word_of_the_prompts():
    bare = SICK | {"Support Devices": 0}
    plain = Edit(add=("pacemaker",)).prompts(bare, PHANTOM)
    for side in SIDES:
        edit = Edit.from_key(f"add_{side}_pacemaker", PHANTOM)
        assert edit == Edit.parse(f"add a pacemaker on the {side}", PHANTOM)
        assert edit.prompts(bare, PHANTOM) == replace(plain, side=side) != plain
        assert edit.apply(bare, PHANTOM)["Support Devices"] == 1
    assert Edit(add=("left pleural effusion",)).prompts({"Pleural Effusion": 0}, PHANTOM).side == ""
    for other in ("Cardiomegaly", "right pacemaker"):
        with pytest.raises(ValueError, match=r"for the (left|right) side and for something else"):
            Edit(add=(other, "left pacemaker")).prompts(bare | {"Cardiomegaly": 0}, PHANTOM)


def test_a_side_that_is_kept_does_not_contradict_the_side_that_is_edited():
    one = Edit.parse("remove the left pacemaker", PHANTOM).prompts(SICK, PHANTOM)
    assert Edit.parse("remove the left pacemaker, keep the right pacemaker", PHANTOM).prompts(SICK, PHANTOM) == one
    both = Edit.from_key("remove_cardiomegaly_and_keep_left_pacemaker_and_keep_right_pacemaker", PHANTOM)
    assert both.prompts(SICK, PHANTOM).target.count("pacemaker") == 1
    for text in ("remove the pacemaker, keep the left pacemaker", "remove the left pacemaker, keep the pacemaker"):
        with pytest.raises(ValueError, match="'left pacemaker' is part of 'pacemaker': name one"):
            Edit.parse(text, PHANTOM)


@pytest.mark.parametrize("key", PHANTOM_EDITS)
def test_prompts_differ_in_one_word_and_match_the_captions(key):
    edit = Edit.from_key(key)
    assert len(possible(key)) == 4
    for labels in possible(key):
        pair = edit.prompts(labels, PHANTOM)
        words = zip(pair.source.split(), pair.target.split(), strict=True)
        expected = ("with", "without") if edit.remove else ("without", "with")
        assert [(a, b) for a, b in words if a != b] == [expected]
        # The pair is exactly what the model reads in training for either state.
        assert pair.source == caption(labels, "explicit", PHANTOM)
        assert pair.target == caption(edit.apply(labels), "explicit", PHANTOM)
        assert pair.source_words == pair.target_words
        assert all(word in pair.source and word in pair.target for word in pair.source_words)


@pytest.mark.parametrize("key", PHANTOM_EDITS)
def test_undoing_an_edit_swaps_the_prompts_and_restores_the_labels(key):
    verb, other = ("remove", "add") if key.startswith("remove") else ("add", "remove")
    edit, undo = Edit.from_key(key), Edit.from_key(key.replace(verb, other))
    for labels in possible(key):
        there, back = edit.prompts(labels), undo.prompts(edit.apply(labels))
        assert (there.source, there.target) == (back.target, back.source)
        findings = PHANTOM.phrases
        assert {x: undo.apply(edit.apply(labels))[x] for x in findings} == {x: labels[x] for x in findings}


def test_edit_of_an_unmentioned_label_states_it_in_both_prompts():
    pair = Edit(remove=("Support Devices",)).prompts({"Cardiomegaly": 1, "Support Devices": NAN})
    assert pair.source == "chest x-ray with cardiomegaly, with support devices"
    assert pair.target == "chest x-ray with cardiomegaly, without support devices"


def test_edit_of_a_label_whose_absence_is_not_usually_stated():
    pair = Edit(add=("Hernia",)).prompts({"Hernia": 0})
    assert (pair.source, pair.target) == ("chest x-ray without hernia", "chest x-ray with hernia")


@pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES)
def test_keys_round_trip(vocab):
    findings = list(vocab.phrases)
    edits = [Edit(remove=(x,)) for x in findings] + [Edit(add=(x,)) for x in findings]
    edits += [Edit(remove=(findings[0],), add=tuple(findings[1:3])), Edit()]
    assert [Edit.from_key(edit.key, vocab) for edit in edits] == edits
    assert len({edit.key for edit in edits}) == len(edits)


def test_key_is_the_name_that_records_use():
    assert Edit(remove=("Support Devices",)).key == "remove_support_devices"
    assert Edit(add=("Pleural Effusion",)).key == "add_pleural_effusion"


def test_null_edit_changes_nothing():
    pair = Edit().prompts(SICK, PHANTOM)
    assert pair.source == pair.target == caption(SICK, "explicit", PHANTOM)
    assert Edit().apply(SICK) == SICK


@pytest.mark.parametrize(
    ("key", "labels", "no_finding"),
    [
        ("remove_cardiomegaly", SICK, 1),  # devices alone are no disease
        ("remove_support_devices", SICK, 0),
        ("add_pleural_effusion", {"No Finding": 1, "Cardiomegaly": 0, "Pleural Effusion": 0}, 0),
        ("remove_cardiomegaly", {"No Finding": 0, "Cardiomegaly": 1, "Pleural Effusion": None}, None),
        ("remove_support_devices", {"No Finding": 0, "Support Devices": 1}, None),
    ],
)
def test_no_finding_follows_from_the_other_labels(key, labels, no_finding):
    assert Edit.from_key(key).apply(labels)["No Finding"] == no_finding


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Edit(remove=("Cardiomegaly",), add=("Cardiomegaly",)), "both removed and added"),
        (lambda: Edit(remove="Cardiomegaly"), "tuples of labels"),
        (lambda: Edit(add=("No Finding",)), "cannot be edited"),
        (lambda: Edit(add=("Zeppelin",)).prompts(SICK), "unknown label 'Zeppelin'"),
        (lambda: Edit(add=("Edema",)).prompts(SICK, PHANTOM), "unknown label 'Edema'"),
        (lambda: Edit(remove=("Pleural Effusion",)).prompts(SICK), "'Pleural Effusion' is already .* absent"),
        (lambda: Edit(add=("Cardiomegaly",)).prompts(SICK), "'Cardiomegaly' is already labelled present"),
        (lambda: Edit.from_key("remove_zeppelin"), "unknown label 'zeppelin'"),
        (lambda: Edit.from_key("erase_cardiomegaly"), "does not start with remove_ or add_"),
        (lambda: Edit.text("", "chest x-ray"), "needs both prompts"),
        (lambda: Edit.text("with tubes", "without tubes", ("leads",)), "'leads' is in neither prompt"),
        (lambda: Edit(source="a", target="b", add=("Edema",)), "not both"),
    ],
)
def test_bad_edits_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_free_text_edit_names_the_words_that_differ():
    source = "Chest xray of the patient, with lots of medical devices"
    edit = Edit.text(source, "chest xray of the patient without medical devices.")
    assert edit.prompts(SICK) == PromptPair(edit.source, edit.target, ("with lots of",), ("without",))
    assert edit.apply(SICK) == SICK


def test_free_text_edit_about_given_words():
    edit = Edit.text("with a big heart", "with a small heart and tubes", ("heart", "tubes"))
    pair = edit.prompts({})
    assert (pair.source_words, pair.target_words) == (("heart",), ("heart", "tubes"))


@pytest.mark.parametrize(
    ("source", "target", "adds"),
    [
        ("x-ray without edema", "x-ray with edema", True),
        ("x-ray with edema", "x-ray without edema", False),
        ("There is no edema.", "There is evidence of edema.", True),
        ("there is evidence of edema.", "there is no edema.", False),
        ("x-ray", "x-ray with edema", True),
        ("x-ray", "x-ray without edema", False),
        ("x-ray with edema", "x-ray", False),
        ("with a heart and tubes", "with a heart", False),
        ("with a heart", "with a heart and tubes", True),
        ("Chest X-ray showing Edema", "Normal chest X-ray with no significant findings", False),
        ("Normal chest X-ray with no significant findings", "Chest X-ray showing Edema", True),
        ("x-ray without edema or tubes", "x-ray with tubes, without edema", True),
        ("with edema, without tubes", "without edema, with tubes", True),
        ("X-ray.", "x-ray", False),
    ],
)
def test_a_pair_adds_what_its_source_denies_or_does_not_say(source, target, adds):
    assert Edit.text(source, target).prompts({}).adds is adds


def test_edits_of_labels_add_what_they_say_they_add():
    assert Edit(add=("Pleural Effusion",)).prompts(SICK).adds
    assert not Edit(remove=("Cardiomegaly",)).prompts(SICK).adds
    assert Edit(remove=("Cardiomegaly",), add=("Pleural Effusion",)).prompts(SICK).adds


def test_free_text_keys_do_not_collide():
    keys = {Edit.text(source, "a heart").key for source in ("one", "two")}
    assert len(keys) == 2
    assert all(key.startswith("text_a_heart_") for key in keys)


def test_free_captions_of_many_labels_stay_short_and_keep_what_is_present():
    labels = dict.fromkeys(CHEST.stated, 0) | {"Fracture": 1, "Lung Lesion": 1, "Edema": 1}
    for seed in range(60):
        text = sample_caption(labels, random.Random(seed), CHEST, 0.0, {}).lower()
        said = [phrase for phrase in CHEST.phrases.values() if phrase in text]
        assert len(said) <= 7
        # Only the template of absences leaves out what is present.
        assert {"fracture", "lung lesion", "edema"} <= set(said) or text.startswith("chest x-ray without")


# --- skin

LESION = {"Melanoma": 1, "Melanocytic Nevus": 0, "Ruler": 1, "Ink": 0, "Hair": NAN}


def test_skin_is_said_in_the_words_of_skin():
    assert caption(LESION, "explicit", SKIN) == (
        "dermoscopic image with melanoma, without melanocytic nevus, with ruler, without ink marks"
    )
    assert caption(LESION, "prism", SKIN) == "Dermoscopic image showing Melanoma, Ruler"
    assert caption({}, "prism", SKIN) == "Dermoscopic image"
    pair = Edit.from_key("remove_ruler", SKIN).prompts(LESION, SKIN)
    assert pair.source == caption(LESION, "explicit", SKIN)
    assert pair.target == caption(LESION | {"Ruler": 0}, "explicit", SKIN)
    assert Edit.parse("remove the ruler", SKIN) == Edit(remove=("Ruler",))
    assert not any("x-ray" in text.lower() for text in corpus(SKIN))
