"""Published U-Nets and autoencoders, saved here in the layouts they are found in, and loaded strictly."""

import logging

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from prism_lib.models.pipeline import build_pipeline, encode_images, load_pipeline
from tests.tiny import tiny_config, tiny_images, tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published():
    """Another U-Net and autoencoder of the same sizes."""
    return build_pipeline(tiny_config(), seed=5)


def component_folder(published, folder):
    published.unet.save_pretrained(folder)
    return folder


def unet_only(published, folder):
    published.unet.save_pretrained(folder / "unet")
    return folder


def whole_pipeline(published, folder):
    published.save_pretrained(folder)
    return folder


def bare_file(published, folder):
    folder.mkdir()
    save_file(published.unet.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def bare_folder(published, folder):
    return bare_file(published, folder).parent


def wrapped(published, folder):
    folder.mkdir()
    save_file({f"module.{key}": value for key, value in published.unet.state_dict().items()}, folder / "a.safetensors")
    return folder / "a.safetensors"


def halves(published, folder):
    folder.mkdir()
    tensors = {key: value.half().float().half() for key, value in published.unet.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


LAYOUTS = [component_folder, unet_only, whole_pipeline, bare_file, bare_folder, wrapped, halves]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_published_unet_takes_the_place_of_the_own(base, published, tmp_path, layout):
    pipeline = load_pipeline(base, unet=layout(published, tmp_path / "published"))
    expected = published.unet.state_dict()
    for key, value in pipeline.unet.state_dict().items():
        assert value.dtype == torch.float32
        wanted = expected[key].half().float() if layout is halves else expected[key]
        assert torch.equal(value, wanted)
    own = tiny_pipeline().vae.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in pipeline.vae.state_dict().items())
    assert not pipeline.unet.training and not any(value.requires_grad for value in pipeline.unet.parameters())


def test_both_parts_from_one_folder_go_into_their_slots(base, published, tmp_path):
    published.unet.save_pretrained(tmp_path / "unet")
    published.vae.save_pretrained(tmp_path / "vae")
    pipeline = load_pipeline(base, torch.bfloat16, unet=tmp_path, vae=tmp_path)
    assert isinstance(pipeline.unet, UNet2DConditionModel) and isinstance(pipeline.vae, AutoencoderKL)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16
    assert torch.equal(pipeline.vae.encoder.conv_in.weight, published.vae.encoder.conv_in.weight.bfloat16())


def test_an_autoencoder_with_the_names_of_early_diffusers(base, tmp_path):
    """SD v1.5's own autoencoder still calls its attention weights query, key, value and proj_attn."""
    config = dict(tiny_pipeline().vae.config) | {"mid_block_add_attention": True}
    torch.manual_seed(3)
    vae = AutoencoderKL.from_config(config)
    vae.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, old in names.items():
        tensors = {key.replace(f".{new}.", f".{old}."): value for key, value in tensors.items()}
    assert sum("proj_attn" in key for key in tensors) == 4
    save_file(tensors, file, {"format": "pt"})
    loaded = load_pipeline(base, vae=tmp_path).vae
    expected = encode_images(vae.eval(), tiny_images(1))
    torch.testing.assert_close(encode_images(loaded, tiny_images(1)), expected)


def spoil(state):
    """One tensor missing, one too many, one of another shape."""
    state = dict(state)
    state["invented.weight"] = state.pop("conv_in.bias")
    state["conv_out.bias"] = torch.zeros(9)
    return state


@pytest.mark.parametrize("layout", [component_folder, bare_file], ids=lambda layout: layout.__name__)
def test_what_does_not_fit_is_counted_and_named(base, published, tmp_path, layout):
    place = layout(published, tmp_path / "published")
    file = next((tmp_path / "published").glob("*.safetensors"))
    save_file(spoil(load_file(file)), file, {"format": "pt"})
    message = (
        r"published.* does not fit: of its tensors, 1 missing \(conv_in\.bias\); "
        r"1 unexpected \(invented\.weight\); 1 of another shape \(conv_out\.bias\)"
    )
    with pytest.raises(ValueError, match=message):
        load_pipeline(base, unet=place)


def test_parts_that_do_not_go_together_are_refused(base, tmp_path):
    config = dict(tiny_pipeline().unet.config)
    UNet2DConditionModel.from_config(config | {"cross_attention_dim": 24}).save_pretrained(tmp_path / "wide")
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(tmp_path / "inpainting")
    with pytest.raises(ValueError, match="reads text of width 24, the text encoder gives 16"):
        load_pipeline(base, unet=tmp_path / "wide")
    with pytest.raises(ValueError, match="takes 9 channels and gives 4, the autoencoder has 4"):
        load_pipeline(base, unet=tmp_path / "inpainting")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("model.ckpt", "from_single_file"),
        ("diffusion_pytorch_model.bin", r"save_file\(torch.load\(.*weights_only=True\), .*\.safetensors"),
        ("model.pt", "weights_only=True"),
    ],
)
def test_a_pickle_is_refused_with_the_way_to_convert_it(base, tmp_path, name, way):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / name).write_bytes(b"never read")
    (tmp_path / "unet" / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "unet", tmp_path / "unet" / name):
        with pytest.raises(ValueError, match=rf"{name} is a pickle, which can run code.*{way}"):
            load_pipeline(base, unet=source)
    with pytest.raises(ValueError, match=f"{name} is a pickle"):
        load_pipeline(tmp_path / "unet" / name)


def test_a_single_file_of_the_original_layout_says_how_to_convert_it(base, tmp_path):
    file = tmp_path / "v1-5.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"original layout of Stable Diffusion.*from_single_file"):
        load_pipeline(base, unet=file)


@pytest.mark.parametrize("name", ["./nowhere", "deep/er/nowhere", "model.safetensors"])
def test_a_source_that_is_nowhere_is_named(base, name):
    with pytest.raises(FileNotFoundError, match=f"unet: {name} does not exist"):
        load_pipeline(base, unet=name)


def test_an_empty_folder_and_two_files_are_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="it has: none"):
        load_pipeline(base, unet=tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"it has: a\.safetensors, b\.safetensors"):
        load_pipeline(base, unet=tmp_path)


def test_a_folder_with_parts_only_says_how_to_use_it(published, tmp_path):
    published.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match=r"no whole pipeline .* but has unet: .* unet='"):
        load_pipeline(tmp_path)


# ------------------------------------------------------------------------------------------- the hub's cache


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache as a download leaves it, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ("diffusers.pipelines.pipeline_utils", "diffusers.utils.hub_utils", "diffusers.configuration_utils"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)

    def add(name):
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        return snapshot

    return add


def test_what_is_cached_loads_without_a_network(hub, published, caplog):
    tiny_pipeline().save_pretrained(hub("owner/sd"))
    save_file(published.unet.state_dict(), hub("owner/prism") / "model.safetensors")
    with caplog.at_level(logging.INFO):
        pipeline = load_pipeline("owner/sd", unet="owner/prism")
    assert torch.equal(pipeline.unet.conv_in.weight, published.unet.conv_in.weight)
    assert "downloading" not in caplog.text


def test_what_is_not_cached_is_named(hub, base):
    with pytest.raises(FileNotFoundError, match="owner/absent is no folder here, is not cached, and cannot be"):
        load_pipeline("owner/absent")
    with pytest.raises(FileNotFoundError, match="owner/absent is no folder here"):
        load_pipeline(base, unet="owner/absent")
