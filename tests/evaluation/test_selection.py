"""Selection: scores against their definitions, and the argmax over everything that passes."""

import math
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from prism_lib import paths
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation import metrics, selection
from prism_lib.evaluation.selection import Criteria, GuideScorer, IdentityScorer, SimilarityScorer, select
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import ClassifierConfig, build_classifier, save_classifier
from prism_lib.models.image_text import ImageTextModel, load_image_text_model
from tests.tiny import REMOVE, SMALL_ENCODER, UNCHANGED, clip_model, tiny_images, tiny_pipeline


def siglip_model():
    text = SMALL_ENCODER | {"vocab_size": len(tiny_pipeline().tokenizer), "max_position_embeddings": 40}
    vision = SMALL_ENCODER | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()


@pytest.fixture(scope="module", params=[clip_model, siglip_model], ids=["clip", "siglip"])
def encoder(request):
    return ImageTextModel(request.param(), tiny_pipeline().tokenizer)


def candidates(count=3, pair=REMOVE):
    images = tiny_images(count + 1)
    return [
        Counterfactual(
            image, image, images[0], images[0], torch.ones(1, 32, 32), pair, {"mask_area": 1.0}, EditConfig()
        )
        for image in images[1:]
    ]


@dataclass(frozen=True)
class Fixed:
    """Scores that stand in a table."""

    values: tuple[float, ...]
    name: str = "directional"

    def scores(self, given):
        return [{self.name: value} for value in self.values[: len(given)]]


# --- scores ---------------------------------------------------------------------------------------


def test_similarities_are_their_definitions(encoder):
    tried = candidates()
    for candidate, scores in zip(tried, SimilarityScorer(encoder).scores(tried), strict=True):
        before, after = (encoder.embed_images(image[None])[0] for image in (candidate.factual, candidate.image))
        source, target = (encoder.embed_texts([text])[0] for text in (REMOVE.source, REMOVE.target))
        cosine = torch.nn.functional.cosine_similarity
        expected = {
            "image_image": cosine(before, after, dim=0),
            "image_text_source": cosine(before, source, dim=0),
            "image_text": cosine(after, target, dim=0),
            "directional": cosine(after - before, target - source, dim=0),
            "consistency": cosine(after, target, dim=0) - cosine(after, source, dim=0),
        }
        assert scores == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


def test_an_edit_that_stands_still_has_no_direction(encoder):
    tried = candidates(2, UNCHANGED)
    tried[1] = replace(tried[1], image=tried[1].factual)
    first, second = SimilarityScorer(encoder).scores(tried)
    assert first["directional"] == second["directional"] == first["consistency"] == 0
    assert second["image_image"] == pytest.approx(1)


def test_every_image_and_text_is_encoded_once(encoder, monkeypatch):
    counts = {"images": 0, "texts": 0}
    for name in counts:
        original = getattr(ImageTextModel, f"embed_{name}")

        def counted(self, inputs, original=original, name=name):
            counts[name] += len(inputs)
            return original(self, inputs)

        monkeypatch.setattr(ImageTextModel, f"embed_{name}", counted)
    SimilarityScorer(encoder).scores(candidates(5))
    assert counts == {"images": 6, "texts": 2}


def test_embeddings_agree_with_transformers():
    model = clip_model()
    encoder = ImageTextModel(model, tiny_pipeline().tokenizer, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    images = tiny_images(2, 3, 16)
    pixels = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    tokens = encoder.tokenizer([REMOVE.source, "leads"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, **tokens)
    torch.testing.assert_close(encoder.embed_images(images), output.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.embed_texts([REMOVE.source, "leads"]), output.text_embeds, atol=1e-5, rtol=0)


def test_a_folder_loads_with_its_normalisation(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path))
    clip_model().save_pretrained(tmp_path / "clip")
    tiny_pipeline().tokenizer.save_pretrained(tmp_path / "tokenizer")  # beside it, as in a pipeline folder
    encoder = load_image_text_model("clip")
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    tiny_pipeline().tokenizer.save_pretrained(tmp_path / "clip")
    again = load_image_text_model(tmp_path / "clip")
    assert again.mean == (0.1, 0.2, 0.3)
    assert torch.equal(again.embed_texts(["leads"]), encoder.embed_texts(["leads"]))


@pytest.mark.parametrize("name", ["./nothing", "a/b/c"])
def test_a_folder_that_is_none_is_named(name):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_image_text_model(name)


def test_a_model_of_images_alone_is_refused(tmp_path):
    clip_model().vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not embed both"):
        load_image_text_model(tmp_path)


def test_a_text_that_would_be_cut_is_refused(encoder):
    with pytest.raises(ValueError, match="text has 82 tokens, the image-text model reads"):
        encoder.embed_texts(["a " * 80])


def test_identity_is_the_metrics():
    tried = candidates()
    for candidate, scores in zip(tried, IdentityScorer().scores(tried), strict=True):
        one, other = candidate.image[None], candidate.factual[None]
        assert scores == {"ssim": float(metrics.ssim(one, other)), "identity_l1": float(metrics.l1(one, other))}


# --- the guide, which is never the judge ----------------------------------------------------------

LABELS = ("Cardiomegaly", "Support Devices")
TINY = ClassifierConfig(labels=LABELS, blocks=(1, 1), growth=4, features=4)


@pytest.fixture
def guides(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path))
    for name, seed in (("judge", 0), ("guide", 1)):
        config = replace(TINY, seed=seed)
        save_classifier(build_classifier(config), config, tmp_path / name)
    shutil.copytree(tmp_path / "judge", tmp_path / "copy")
    return tmp_path


@pytest.mark.parametrize("name", ["judge", "copy"])
def test_the_judge_may_not_select(guides, name):
    with pytest.raises(ValueError, match="must not select"):
        selection.load_guide(name, judge="judge")


def test_a_guide_reads_the_target_of_the_edit(guides):
    guide = selection.load_guide("guide", judge="judge")
    assert guide.labels == LABELS and paths.weights() == guides
    tried = candidates()
    edit = Edit(remove=("Support Devices",), add=("Cardiomegaly",))
    with torch.no_grad():
        after = guide.network(torch.stack([c.image for c in tried])).sigmoid()
        before = guide.network(tried[0].factual[None]).sigmoid()[0]
    for row, scores in enumerate(GuideScorer(guide, edit).scores(tried)):
        heart, devices = after[row, 0], 1 - after[row, 1]
        assert scores["guide"] == pytest.approx(float(min(heart, devices)), abs=1e-5)
        gains = heart - before[0], devices - (1 - before[1])
        assert scores["guide_gain"] == pytest.approx(float(min(gains)), abs=1e-5)


@pytest.mark.parametrize("edit", [Edit(add=("Edema",)), Edit.text("a", "b"), Edit(remove=("pacemaker",))])
def test_a_guide_that_cannot_read_the_edit_says_so(guides, edit):
    with pytest.raises(ValueError, match=r"does not read (Edema|pacemaker); it reads|names none"):
        GuideScorer(selection.load_guide("guide", judge="judge"), edit)


# --- the choice -----------------------------------------------------------------------------------


def test_the_best_of_all_that_pass_wins_wherever_it_stands():
    tried, bounds = candidates(4), Criteria(at_most={"cost": 1.0})
    for values, costs, winner in [
        ((0.9, 0.5, 0.1, 0.2), (0, 0, 0, 0), 0),  # a later, worse one never replaces it
        ((0.1, 0.5, 0.9, 0.2), (0, 0, 0, 0), 2),
        ((0.9, 0.5, 0.1, 0.2), (2, 1, 0, 0), 1),
        ((0.5, 0.5, 0.1, 0.5), (0, 0, 0, 0), 0),
        ((math.nan, 0.5, 0.1, math.inf), (0, 0, 0, 0), 1),
    ]:
        (chosen,) = select([tried], [Fixed(values), Fixed(costs, "cost")], bounds)
        assert chosen.winner == winner and chosen.best is tried[winner]
        assert [s["cost"] for s in chosen.scores] == list(costs)
        assert all(set(s) == {"mask_area", "directional", "cost"} for s in chosen.scores)


def test_that_nothing_passes_is_reported():
    (chosen,) = select([candidates(2)], [Fixed((0.1, math.nan))], Criteria(at_least={"directional": 0.2}))
    assert chosen.winner is None and chosen.best is None
    assert chosen.failures == (("directional 0.1 < 0.2",), ("directional is nan",))


def test_images_are_selected_one_by_one():
    tried = candidates(3)
    chosen = select([tried[:1], tried[1:]], [Fixed((0.1, 0.2))], Criteria())
    assert [s.winner for s in chosen] == [0, 1]
    assert [len(s.scores) for s in chosen] == [1, 2]
    assert select([], [], Criteria()) == []


@pytest.mark.parametrize(
    ("scorers", "criteria", "message"),
    [
        ([], Criteria(), "no score directional; the scorers give mask_area"),
        ([Fixed((1, 1))], Criteria(at_least={"ssim": 1}), "no score ssim"),
        ([Fixed((1, 1)), Fixed((1, 1))], Criteria(), "two scorers give directional"),
    ],
)
def test_scores_that_are_missing_or_double_are_named(scorers, criteria, message):
    with pytest.raises(ValueError, match=message):
        select([candidates(2)], scorers, criteria)


def test_no_candidates_and_infinite_bounds_are_errors():
    with pytest.raises(ValueError, match=r"images \[1\] have no candidates"):
        select([candidates(1), []], [], Criteria())
    with pytest.raises(ValueError, match=r"^at_least\.ssim is .*: input should be a finite number$"):
        Criteria(at_least={"ssim": math.nan})
