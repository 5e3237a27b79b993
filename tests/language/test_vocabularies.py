"""Vocabularies as YAML files: the words of the shipped ones, files of users, and a table's own label names."""

import hashlib
import inspect
import random

import pytest

from prism_lib.language.captions import TEMPLATES, caption, corpus, sample_caption, unseen_words
from prism_lib.language.edits import Edit
from prism_lib.language.labels import CHEXPERT_LABELS, NO_FINDING, SKIN, VOCABULARIES, snake_case, vocabulary

# SHA-256 over corpus and captions as they were before vocabularies were files: a model was trained on these words.
CAPTIONS = {"chest": "ee485a7c6cb4786a", "phantom": "ccd7c5257ca71f1f", "skin": "e3de108e5fcfb268"}
KNEE = """\
subject: knee x-ray
phrases: {Osteophytes: osteophytes, Joint Space Narrowing: narrow joint space, Fracture: fracture}
synonyms: {Osteophytes: [bone spurs]}
details: {Fracture: [patella fracture]}
aliases: {Joint Space Narrowing: [lost cartilage], patella fracture: [broken kneecap]}
"""


@pytest.fixture
def knee(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_DATA", str(tmp_path))
    (tmp_path / "knee.yaml").write_text(KNEE)
    return vocabulary("knee.yaml")


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_of_shipped_vocabularies_have_not_changed(name):
    vocab, rng = VOCABULARIES[name], random.Random(0)
    texts = list(corpus(vocab))
    for seed in range(300):
        labels = {label: rng.choice((1, 0, -1, None)) for label in vocab.labels}
        details = {label: rng.choice(many) for label, many in vocab.details.items()}
        texts += [caption(labels, template, vocab) for template in TEMPLATES]
        texts += [sample_caption(labels, random.Random(seed), vocab, share, details) for share in (0.0, 0.5, 1.0)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == CAPTIONS[name]


def test_columns_of_data_sets_follow_from_the_order_of_labels():
    assert CHEXPERT_LABELS[0] == NO_FINDING and CHEXPERT_LABELS[-1] == "Support Devices" and len(CHEXPERT_LABELS) == 14
    assert [snake_case(label) for label in SKIN.foreign] == [
        "ruler",
        "ink",
        "hair",
        "dark_corner",
        "gel_border",
        "gel_bubble",
        "patches",
    ]


def test_a_file_of_a_user(knee):
    labels = {"Osteophytes": 1, "Joint Space Narrowing": 0, "Fracture": -1}
    assert (knee.name, knee.title, knee.stated) == ("knee", "Knee x-ray", tuple(labels))
    assert caption(labels, "explicit", knee) == "knee x-ray with osteophytes, without narrow joint space"
    assert caption(labels, "prism", knee) == "Knee x-ray showing Osteophytes"
    assert Edit.parse("add lost cartilage, keep the bone spurs", knee).add == ("Joint Space Narrowing",)
    assert Edit.parse("add a broken kneecap", knee).add == ("patella fracture",)
    assert vocabulary("knee.yaml") is knee, "read once, and what `grammar` made of it is kept"
    pair = Edit.from_key("remove_osteophytes", knee).prompts(labels, knee)
    assert unseen_words((pair.source, pair.target), corpus(knee)) == ()


def test_a_file_extends_a_shipped_vocabulary(tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text("extends: chest\nphrases: {Chest Drain: chest drain}\nforeign: [Support Devices, Chest Drain]\n")
    vocab, chest = vocabulary(str(path)), VOCABULARIES["chest"]
    assert vocab.labels == (*chest.labels, "Chest Drain") and vocab.name == "devices"
    assert vocab.synonyms == chest.synonyms and vocab.stated == chest.stated
    healthy = dict.fromkeys(vocab.labels, 0) | {"Edema": 1, "Chest Drain": 1}
    assert Edit(remove=("Edema",)).apply(healthy, vocab)[NO_FINDING] == 1, "a drain is no finding"
    assert caption(healthy, vocab=vocab).endswith("with chest drain")
    assert Edit.parse("remove the chest tube", chest).remove == ("Support Devices",)


def test_a_tables_own_names_are_a_vocabulary():
    names = ["Scoliosis", "tuberculosis", "DR_grade_3", NO_FINDING]
    vocab = vocabulary("labels", names, "fundus photograph")
    assert vocab.phrases == {"Scoliosis": "scoliosis", "tuberculosis": "tuberculosis", "DR_grade_3": "dr grade 3"}
    text = caption({"Scoliosis": 1, "tuberculosis": 0, "DR_grade_3": 1}, vocab=vocab)
    assert text == "fundus photograph with scoliosis, without tuberculosis, with dr grade 3"
    assert Edit.parse("remove scoliosis", vocab) == Edit.from_key("remove_scoliosis", vocab)
    assert Edit.read("add_dr_grade_3", vocab).add == ("DR_grade_3",)
    assert vocabulary("labels", names).subject == "image"
    many = vocabulary("labels", [f"finding {letter}" for letter in "bcdefghjkl"])
    assert many.stated == tuple(many.phrases)[:7], "all absences would have more than CLIP's 77 tokens"
    assert Edit.from_key("add_a", vocabulary("labels", ["A", "B"])).add == ("A",), "a filler of sentences"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("subject: [", r"own\.yaml is not YAML"),
        ("- subject", r"own\.yaml is no mapping"),
        ("subject: knee", r"own\.yaml: phrases is missing$"),
        ("phrases: {A: a}", r"own\.yaml: subject is missing$"),
        (
            "subject: knee\nphrases: {A: a}\nsynonym: {A: [b]}",
            "unknown setting 'synonym'; did you mean 'synonyms'",
        ),
        ("subject: knee\nphrases: {A: }", r"own\.yaml: phrases\.A is None: input should be a valid string$"),
        ("subject: knee\nphrases: {A: '-'}", r"own\.yaml: phrases\.A is '-': string should match"),
        (
            "subject: knee\nphrases: {A: a}\nsynonyms: {A: b}",
            r"own\.yaml: synonyms\.A is 'b': input should be a valid tu",
        ),
        (
            "subject: knee\nphrases: {A: a}\nstated: [B]",
            r"own\.yaml: stated names 'B', which is no label of phrases: A",
        ),
        ("subject: knee\nphrases: {A: a}\naliases: {b: [c]}", r"own\.yaml: aliases names 'b'"),
        ("subject: knee\nphrases: {A B: a, a_b: b}", r"own\.yaml: 'a_b' has the key 'a_b', .* that of another name"),
        ("subject: knee\nphrases: {A: a, B: A}", r"own\.yaml: 'A' stands for two labels, 'A' and 'B'$"),
        ("subject: knee\nphrases: {A: a, B: b}\nsynonyms: {B: [a]}", r"'a' stands for two labels, 'A' and 'B'$"),
        ("subject: knee\nphrases: {A: a, B: b}\ndetails: {A: [c], B: [c]}", r"'c' stands for two labels, 'A' and 'B'$"),
        (
            "subject: knee\nphrases: {A: a}\nsided: [A]",
            r"own\.yaml: sided names 'A', which is no detail: none",
        ),
        (
            "subject: knee\nphrases: {A: a}\ndetails: {A: [nail, left nail]}\nsided: [nail]",
            r"own\.yaml: 'left nail' has the key 'left_nail', .* that of another name",
        ),
        ("subject: knee\nphrases: {No Finding: a}", r"own\.yaml: 'No Finding' has the key 'no_finding'"),
        ("subject: knee\nphrases: {A: a}\ndetails: {A: [A]}", r"own\.yaml: 'A' has the key 'a'"),
        ("extends: knee\nphrases: {A: a}", r"own\.yaml: extends is 'knee', none of chest, films, phantom, skin"),
        (
            "extends: [chest]\nphrases: {A: a}",
            r"own\.yaml: extends is \['chest'\], none of chest, films, phantom, skin",
        ),
    ],
)
def test_a_faulty_file_is_refused_by_name_and_key(tmp_path, content, message):
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        vocabulary(str(tmp_path / "own.yaml"))


def test_a_vocabulary_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no vocabulary /.*/own\.yaml"):
        vocabulary(str(tmp_path / "own.yaml"))
    with pytest.raises(
        ValueError, match="unknown vocabulary 'brain'; known: chest, films, phantom, skin, labels, and YAML"
    ):
        vocabulary("brain")


def test_the_help_of_a_function_names_its_vocabulary():
    assert str(inspect.signature(Edit.parse)).count("Vocabulary('chest')") == 1
