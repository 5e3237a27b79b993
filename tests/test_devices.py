"""Whatever runs a model runs on a device other than the CPU, and gives there what the CPU gives."""

import copy
import shutil
from dataclasses import replace

import accelerate
import pytest
import torch

from prism_lib import devices
from prism_lib.editing.counterfactuals import edit, stack
from prism_lib.editing.inversion import invert
from prism_lib.editing.methods import METHODS, InversionConfig
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation import novelty
from prism_lib.evaluation.evaluate import choose_cases, evaluate_edits, load_judge, summarise
from prism_lib.evaluation.selection import GuideScorer, SimilarityScorer
from prism_lib.language.edits import Edit
from prism_lib.models import classifier
from prism_lib.models.classifier import Classifier
from prism_lib.models.image_text import ImageTextModel
from prism_lib.models.pipeline import (
    build_pipeline,
    encode_prompts,
    fingerprint,
    load_pipeline,
    sample_images,
)
from prism_lib.studies import ganterfactual
from prism_lib.studies.editors import PLAIN, Imagic, LEdits, PromptToPrompt, SDEdit, TwoMasks
from prism_lib.training import autoencoder
from prism_lib.training.clip import train_clip
from prism_lib.training.config import FinetuneConfig
from prism_lib.training.finetuning import finetune
from tests.elsewhere import DEVICE, Remote, elsewhere
from tests.evaluation.test_selection import clip_model
from tests.tiny import REMOVE, tiny_config, tiny_images, tiny_pipeline
from tests.training.test_autoencoder import TINY_CLIP, TINY_VAE

CHANGE = Edit(remove=("Support Devices",))
NETWORK = classifier.ClassifierConfig(blocks=(1, 1), growth=4, features=8, steps=2, batch_size=4)
EDITS = {
    "default": EditConfig(),
    "blend": EditConfig(local_blend=True, local_blend_start=0.0, word_weight=2.0),
    "empty": EditConfig(negative="empty", confine=0.2, protect_text=False),
    "alone": EditConfig(cross_replace_steps=1.0, self_replace_steps=0.0, correct_drift=False, batch_size=1),
}
EDITORS = {
    "ours": PromptToPrompt(num_inference_steps=2),
    "plain": PromptToPrompt("ddim", 2, PLAIN, "off"),
    "two masks": TwoMasks(num_inference_steps=3, margin=1),
    "sdedit": SDEdit(num_inference_steps=4),
    "ledits": LEdits(num_inference_steps=4, intersect=False),
    "imagic": Imagic(embedding_steps=2, unet_steps=2, num_inference_steps=2, batch_size=2),
}


@pytest.fixture
def device(monkeypatch):
    """The pretended device, chosen by the variable that users have."""
    monkeypatch.setenv("PRISM_DEVICE", DEVICE.type)
    with elsewhere() as there:
        yield there


def moved(double=True):
    """The tiny pipeline on the device; float64 leaves no rounding to speak of."""
    return copy.deepcopy(tiny_pipeline(double=double)).to(DEVICE)


def both(work, double=True):
    """What some work gives here and there."""
    return work(tiny_pipeline(double=double)), work(moved(double))


def same(here, there, tolerance=1e-5):
    assert not isinstance(there, Remote), "results come back to the CPU"
    assert here.shape == there.shape and float((here - there).abs().max()) <= tolerance


def test_the_pretended_device_is_as_strict_as_a_gpu(device):
    remote = torch.ones(2, 3).to(device)
    assert (
        remote.device == device
        and (remote + 1).device == device
        and torch.equal((remote + 1).cpu(), 2 * torch.ones(2, 3))
    )
    with pytest.raises(RuntimeError, match="on the CPU and on the device"):
        remote + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="on the CPU and on the device"):
        torch.nn.Linear(3, 3)(remote)
    with pytest.raises(RuntimeError, match="generator of the CPU"):
        torch.randn(2, device=device, generator=torch.Generator())
    with pytest.raises(RuntimeError):
        remote.numpy()


@pytest.mark.parametrize("method", METHODS)
def test_every_inversion_and_its_edit(device, method):
    images, config = tiny_images(2), InversionConfig(inner_steps=2)

    def work(pipe):
        inverted = invert(pipe, images, [REMOVE.source] * 2, method, num_inference_steps=3, config=config)
        edited = edit(pipe, inverted, [REMOVE] * 2)
        return stack(edited), stack(edited, "reconstruction")

    here, there = both(work)
    same(here[0], there[0])
    same(here[1], there[1])


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("mask", ["auto", "off", "own"])
def test_every_setting_of_an_edit(device, name, mask):
    images = tiny_images(2)
    own = torch.zeros(2, 1, 32, 32)
    own[:, :, 4:20, 4:20] = 1
    own[:, :, 8:12] = 0
    area = own if mask == "own" else mask

    def work(pipe):
        inverted = invert(pipe, images, [REMOVE.source] * 2, num_inference_steps=3)
        return edit(pipe, inverted, [REMOVE] * 2, EDITS[name], mask=area)

    here, there = both(work)
    for part in ("image", "raw", "reconstruction", "mask"):
        same(stack(here, part), stack(there, part))


@pytest.mark.parametrize("name", EDITORS)
def test_every_baseline(device, name):
    images = tiny_images(2)
    here, there = both(lambda pipe: EDITORS[name](pipe, images, [REMOVE] * 2, CHANGE), double=False)
    same(stack(here), stack(there), 2e-3)  # float32, and a tiny model that exaggerates


def test_models_are_loaded_to_the_device(device):
    pipe = load_pipeline()
    assert {part.device for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {device}
    assert load_pipeline(device="cpu").device.type == "cpu"
    judge = load_judge("phantom-judge")
    assert {parameter.device for parameter in judge.network.parameters()} == {device}


def test_reading_scoring_and_sampling(device, tmp_path):
    images = tiny_images(4)
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]] * 2)
    reader = classifier.train_classifier(images, labels, NETWORK, groups=torch.tensor([0, 1, 0, 1]))
    assert next(reader.parameters()).device == device
    probabilities = Classifier(reader, NETWORK.labels).read(images)
    assert not isinstance(probabilities, Remote)
    same(Classifier(copy.deepcopy(reader).to("cpu"), NETWORK.labels).read(images), probabilities)
    classifier.save_classifier(reader, NETWORK, tmp_path / "reader")
    same(Classifier.load(tmp_path / "reader").read(images), probabilities, 1e-2)
    pipe = moved(double=False)
    results = edit(pipe, invert(pipe, images[:1], [REMOVE.source], num_inference_steps=2), [REMOVE])
    encoder = ImageTextModel(clip_model().to(device), pipe.tokenizer)
    scores = (
        SimilarityScorer(encoder).scores(results)[0]
        | GuideScorer(Classifier(reader, NETWORK.labels), CHANGE).scores(results)[0]
    )
    assert all(isinstance(value, float) for value in scores.values())
    same(*(autoencoder.reconstruction_psnr(p.vae, images) for p in (tiny_pipeline(), pipe)), 1e-2)
    same(novelty.layout(images), novelty.layout(images.to(device)))
    embeddings = encode_prompts(pipe, [REMOVE.source, ""])
    sample = sample_images(pipe, embeddings[:1], embeddings[1:], num_inference_steps=2)
    assert sample.shape == (1, 1, 32, 32)


def test_a_gan_is_trained_and_used(device, phantom_folder, tmp_path):
    guide = Classifier(classifier.build_classifier(NETWORK).eval().to(device), NETWORK.labels)
    config = ganterfactual.GanConfig(steps=2, filters=4, checkpoint_every=1)
    folder = ganterfactual.train_gan(phantom_folder, "Support Devices", guide, tmp_path, config)
    editor = ganterfactual.Ganterfactual(folder.parent)
    assert not isinstance(editor(moved(), tiny_images(1), [REMOVE], CHANGE)[0].image, Remote)
    more, fewer = tmp_path / "more", replace(config, steps=1)
    assert ganterfactual.train_gan(phantom_folder, "Support Devices", guide, more, fewer).is_dir()


def test_an_evaluation_of_a_prepared_folder(device, phantom_folder):
    judge = Classifier(classifier.build_classifier(NETWORK).eval().to(device), NETWORK.labels)
    cases = choose_cases(phantom_folder, CHANGE, 2)
    editor = PromptToPrompt(num_inference_steps=2, settings=EditConfig())
    (result,) = evaluate_edits(moved(double=False), phantom_folder, {CHANGE: cases}, editor, judge=judge)
    assert summarise(result)["changed_outside_mask"] == 0


def test_the_default_is_the_cpu_without_a_gpu_and_a_wrong_name_is_said(monkeypatch):
    monkeypatch.delenv("PRISM_DEVICE", raising=False)
    monkeypatch.setattr(devices, "is_cuda_available", lambda: False)
    assert devices.default_device() == torch.device("cpu")
    monkeypatch.setattr(devices, "is_cuda_available", lambda: True)
    assert devices.default_device() == torch.device("cuda")
    monkeypatch.setenv("PRISM_DEVICE", "gpu")
    with pytest.raises(ValueError, match="PRISM_DEVICE='gpu' is no device"):
        devices.default_device()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_the_models_alone(precision):
    dtype, images = devices.dtype_of(precision), tiny_images(2)
    half = copy.deepcopy(tiny_pipeline()).to(dtype=dtype)
    config = EditConfig(guidance_scale=1.5)

    def work(pipe):
        inverted = invert(pipe, images, [REMOVE.source] * 2, num_inference_steps=3)
        return inverted, edit(pipe, inverted, [REMOVE] * 2, config)

    (full, expected), (inverted, results) = work(tiny_pipeline()), work(half)
    assert half.unet.dtype == dtype and inverted.latents.dtype == torch.float32
    error = (inverted.latents - full.latents).abs().mean() / full.latents.abs().mean()
    assert 0 < float(error) < 5 * torch.finfo(dtype).eps
    for result, whole in zip(results, expected, strict=True):
        assert result.image.dtype == torch.float32 and bool(result.image.isfinite().all())
        assert torch.equal(result.image[result.mask == 0], result.factual[result.mask == 0])
        # Untrained weights and guidance exaggerate what rounding there is.
        assert float((result.raw - whole.raw).abs().mean()) < 10 * torch.finfo(dtype).eps


def test_a_pipeline_is_loaded_in_the_precision_asked_for_and_known_by_it():
    full, half = load_pipeline(), load_pipeline(dtype="bf16")
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}
    assert fingerprint(full) != fingerprint(half), "files of both never share a name"
    states = encode_prompts(half, ["chest x-ray"] * 2)
    sample = sample_images(half, states[:1], states[1:], num_inference_steps=2)
    assert sample.dtype == torch.float32 and bool(sample.isfinite().all())
    with pytest.raises(ValueError, match="precision is 'half'; expected one of no, fp16, bf16"):
        load_pipeline(dtype="half")


def test_training_from_scratch(device, phantom_folder, tmp_path, monkeypatch):
    adamw = torch.optim.AdamW
    # Fused steps are for devices that PyTorch has kernels for.
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, **more: adamw(*given, **more))
    vae = build_pipeline(tiny_config(), seed=0).vae
    history = autoencoder.train_vae(vae, TINY_VAE, tmp_path / "vae")
    assert vae.device.type == "cpu" and not history
    again = build_pipeline(tiny_config(), seed=0).vae
    autoencoder.train_vae(again, replace(TINY_VAE, steps=4), tmp_path / "vae")  # from the checkpoint
    assert all(torch.equal(one, other) for one, other in zip(vae.parameters(), again.parameters(), strict=True))
    clip = train_clip(copy.deepcopy(tiny_pipeline()), phantom_folder, TINY_CLIP)
    assert clip.device.type == "cpu"


def test_fine_tuning_and_going_on(device, phantom_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda _: device))
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, **more: adamw(*given, **more))
    build_pipeline(tiny_config(), seed=0).save_pretrained(tmp_path / "start")
    config = FinetuneConfig(
        str(phantom_folder), str(tmp_path / "run"), str(tmp_path / "start"), steps=2, batch_size=2,
        validation_every=1, sample_every=2, checkpoint_every=1,
    )  # fmt: skip
    whole = finetune(config)
    shutil.copytree(tmp_path / "run" / "step-00000001", tmp_path / "more" / "step-00000001")
    resumed = finetune(replace(config, output=str(tmp_path / "more")))
    one, other = (load_pipeline(folder, device="cpu").unet.state_dict() for folder in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = load_pipeline(tmp_path / "start", device="cpu").unet.state_dict()
    assert not torch.equal(one["conv_in.weight"], start["conv_in.weight"])
