"""Mixed precision: arithmetic in bfloat16, while whatever is kept, optimised or looked at stays float32."""

import copy
from dataclasses import replace

import pytest
import torch

from prism_lib import devices
from prism_lib.editing.counterfactuals import edit, stack
from prism_lib.editing.inversion import invert
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation import metrics
from prism_lib.language.edits import Edit
from prism_lib.models import classifier
from prism_lib.models.classifier import Classifier, ClassifierConfig
from prism_lib.models.pipeline import encode_prompts, fingerprint, load_pipeline, mixed_calls, predict_noise
from prism_lib.studies import ganterfactual
from prism_lib.studies.editors import Edict, Imagic, LEdits, SDEdit
from tests.tiny import REMOVE, tiny_images, tiny_pipeline

CHANGE = Edit(remove=("Support Devices",))
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def mixed():
    pipe = copy.deepcopy(tiny_pipeline())
    pipe.unet.prism_arithmetic = torch.bfloat16
    return pipe


@pytest.fixture
def dtypes(mixed):
    """The dtypes of what the U-Net's first convolution gives, one for each call."""
    seen = []
    mixed.unet.conv_in.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    return seen


def test_what_goes_in_and_comes_out_is_float32(mixed, dtypes):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    states = encode_prompts(mixed, ["chest x-ray"] * 2)
    answer = predict_noise(mixed, latents, 500, states)
    whole = predict_noise(tiny_pipeline(), latents, 500, states)
    with mixed_calls(mixed.unet):
        assert torch.equal(mixed.unet(latents, 500, encoder_hidden_states=states).sample, answer)
    assert torch.equal(mixed.unet(latents, 500, encoder_hidden_states=states).sample, whole), "as before"
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert answer.dtype == torch.float32 == mixed.unet.dtype
    assert 0 < float((answer - whole).abs().mean() / whole.abs().mean()) < 4 * EPS


@pytest.mark.parametrize("method", ["direct", "null_text", "edit_friendly"])
def test_edits_differ_by_rounding_alone(mixed, dtypes, method):
    images, config = tiny_images(2), EditConfig(guidance_scale=1.5)

    def work(pipe):
        few = InversionConfig(inner_steps=2)
        inverted = invert(pipe, images, [REMOVE.source] * 2, method, num_inference_steps=3, config=few)
        return inverted.latents, stack(edit(pipe, inverted, [REMOVE] * 2, config), "raw")

    (latents, raw), (_, whole) = work(mixed), work(tiny_pipeline())
    assert set(dtypes) == {torch.bfloat16} and latents.dtype == torch.float32
    assert 0 < float((raw - whole).abs().mean()) < 10 * EPS


@pytest.mark.parametrize("editor", [
    SDEdit(num_inference_steps=4), LEdits(num_inference_steps=4, intersect=False),
    Imagic(0.5, 2, unet_steps=2, num_inference_steps=2),
])  # fmt: skip
def test_editors_of_others_run_in_it_too(mixed, dtypes, editor):
    images = tiny_images(1)
    (made,), (whole,) = (editor(pipe, images, [REMOVE], CHANGE) for pipe in (mixed, tiny_pipeline()))
    assert set(dtypes) == {torch.bfloat16} and made.image.dtype == torch.float32
    assert 0 < float((made.image - whole.image).abs().mean()) < 10 * EPS


def test_exact_methods_are_walked_in_full_precision(mixed, dtypes):
    images = tiny_images(2)

    def work(pipe):
        return stack(Edict(num_inference_steps=4)(pipe, images, [REMOVE] * 2, CHANGE), "raw")

    assert torch.equal(work(mixed), work(tiny_pipeline()))
    assert set(dtypes) == {torch.float32}
    invert(mixed, images, [REMOVE.source] * 2, "direct", num_inference_steps=3)
    assert dtypes[-1] == torch.bfloat16, "other methods are mixed"


def test_what_is_made_in_it_is_known_by_it(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    plain, other = (load_pipeline(tmp_path, mixed_precision=name) for name in ("no", "bf16"))
    assert copy.deepcopy(other).unet.prism_arithmetic == torch.bfloat16
    assert fingerprint(plain) == fingerprint(tiny_pipeline()) != fingerprint(other)
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16 and mixed_precision 'bf16'"):
        load_pipeline(tmp_path, "bf16", mixed_precision="bf16")


def test_auto_is_what_the_device_computes_in(monkeypatch, tmp_path):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for capabilities, expected in (
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx512_f": True}, "no"),
        ({"bf16": False}, "no"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=capabilities: known)
        assert devices.mixed_precision("auto", cpu) == expected
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("CUDA is used in this process"))
        for capability, expected in (((7, 5), "no"), ((8, 0), "bf16"), ((10, 0), "bf16")):
            sitecustomize = f"import torch; torch.cuda.get_device_capability = {{'cuda': {capability}}}.get"
            (tmp_path / "sitecustomize.py").write_text(sitecustomize)
            patch.setenv("PYTHONPATH", str(tmp_path))
            assert devices.mixed_precision("auto", gpu) == expected
        (tmp_path / "sitecustomize.py").write_text("import torch; del torch.cuda.get_device_capability")
        with pytest.raises(RuntimeError, match=r"cuda cannot be used: AttributeError: .*get_device_capability"):
            devices.mixed_precision("auto", gpu)
    assert devices.mixed_precision("auto", torch.device("mps")) == "no"
    assert [devices.mixed_precision(name, cpu) for name in ("no", "bf16")] == ["no", "bf16"]
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'; expected one of auto, no, bf16"):
        devices.mixed_precision("fp16")


def test_a_classifier_learns_in_it():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (64, 1), generator=generator).float()
    images = (0.3 * torch.rand(64, 1, 32, 32, generator=generator) + 0.5 * labels[..., None, None]).clamp(0, 1)
    config = ClassifierConfig(("Bright",), blocks=(2, 2), growth=4, features=8, steps=24, learning_rate=1e-2)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, output: (
            seen.append((module.training, output.dtype)) if isinstance(module, torch.nn.Conv2d) else None
        )
    )
    try:
        model = classifier.train_classifier(images, labels, replace(config, mixed_precision="bf16"))
        read = classifier.Classifier(model, config.labels).read(images)
    finally:
        handle.remove()
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}, "trained in bfloat16, read in float32"
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert metrics.auc(torch.cat([read, labels], 1)) > 0.95
    with pytest.raises(ValueError, match=r"mixed_precision is 'fp16': .*'no' or 'bf16'"):
        replace(config, mixed_precision="fp16")


def test_a_gan_takes_the_same_step_but_for_rounding():
    labels = ClassifierConfig(blocks=(1, 1), growth=4, features=8)
    guide = Classifier(classifier.build_classifier(labels).eval(), labels.labels)
    images, trained, losses = tiny_images(4) * 2 - 1, {}, {}
    for name in ("no", "bf16"):
        config = ganterfactual.GanConfig(filters=4, mixed_precision=name)
        training = ganterfactual._Training(config, guide, "Support Devices", 32)
        given, wanted = {"remove": images[:2], "add": images[2:]}, {"remove": images[2:], "add": images[:2]}
        losses[name] = float(training._generator_loss(given, wanted)[0].detach())
        training.step(images[:2], images[2:])
        trained[name] = torch.cat([value.flatten() for value in training.generators.parameters()])
    assert trained["bf16"].dtype == torch.float32 and not torch.equal(trained["no"], trained["bf16"])
    assert losses["bf16"] == pytest.approx(losses["no"], rel=2 * EPS)
    with pytest.raises(ValueError, match="mixed_precision is 'auto': "):
        ganterfactual.GanConfig(mixed_precision="auto")


@pytest.mark.parametrize(
    ("capable", "precision", "inside"),
    [
        ({"avx512_bf16": True}, "bf16", torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16", torch.bfloat16),
        ({"avx512_bf16": True}, "no", torch.bfloat16),
    ],
)
def test_attention_is_in_float32_where_a_cpu_multiplies_matrices_slowly_in_bfloat16(
    monkeypatch, capable, precision, inside
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    query, key, value = torch.randn(3, 2, 4, 64, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 64, 64)
    mask[..., 32:] = -1e4
    halves = [part.bfloat16() for part in (query, key, value, mask)]
    expected = [part.to(inside) for part in halves]
    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.autocast("cpu", torch.bfloat16), devices.fast_attention(torch.device("cpu"), precision):
        found = attention(*halves[:3], attn_mask=halves[3])
        product = query @ key.mT
    assert found.dtype == product.dtype == torch.bfloat16, "what is around it stays in bfloat16"
    assert torch.equal(found, attention(*expected[:3], attn_mask=expected[3]).bfloat16())
    exact = attention(*(part.double() for part in halves[:3]), attn_mask=halves[3].double())
    assert (found - exact).abs().max() < (0.004 if inside == torch.float32 else 0.05)
