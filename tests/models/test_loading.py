"""Pipelines in the layouts of others: run as diffusers itself runs them, or refused in one sentence."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from prism_lib.editing.counterfactuals import edit
from prism_lib.editing.inversion import invert
from prism_lib.language.edits import Edit
from prism_lib.models.pipeline import encode_prompts, load_pipeline, predict_noise, sample_images
from prism_lib.models.published import without_bars
from prism_lib.models.schedule import Schedule, guided, step
from prism_lib.studies.editors import LEdits
from prism_lib.training.config import FinetuneConfig
from prism_lib.training.finetuning import finetune
from tests.tiny import REMOVE, SOURCE, TARGET, tiny_images, tiny_pipeline

# The scheduler_config.json of Stable Diffusion 1.5, of 2.1, and of RadEdit's model card.
PNDM_1 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
DDIM_2 = PNDM_1 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
TRAILING = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
ZERO_SNR = DDIM_2 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
EULER = {key: PNDM_1[key] for key in ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps")}
EULER |= {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "trailing"}


HEADER = ("_class_name", "_diffusers_version")


def write(path, **changes):
    """Change entries of a JSON file; None deletes one."""
    content = (json.loads(path.read_text()) if path.is_file() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def changed(part, **config):
    """An untrained network of another configuration; ``from_config`` would take its class's defaults for some."""
    own = {key: value for key, value in part.config.items() if not key.startswith("_")}
    torch.manual_seed(2)
    return type(part)(**own | config).eval()


def bert(folder, tokens=32):
    """An untrained BERT of width 16 and a WordPiece tokenizer with a limit of ``tokens``."""
    words = BertWordPieceTokenizer(lowercase=True)
    words.train_from_iterator([SOURCE, TARGET, "a b c d e f g h i j k l m n o p q r s t u v w x y z"], vocab_size=200)
    words.save_model(str(folder))
    tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=tokens)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    return BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).eval(), tokenizer


def sdxl(folder):
    """An untrained SDXL: two text encoders, pooled text and sizes beside the tokens, no negative prompt."""
    own = tiny_pipeline()
    text = own.text_encoder.config.to_dict() | {"projection_dim": 12}
    torch.manual_seed(3)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text)).eval()
    beside = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = changed(own.unet, cross_attention_dim=32, projection_class_embeddings_input_dim=12 + 6 * 8, **beside)
    other = copy.deepcopy(own.tokenizer)
    other.pad_token = "a</w>"  # SDXL's second tokenizer pads with a word
    StableDiffusionXLPipeline(
        own.vae, own.text_encoder, second, own.tokenizer, other, unet, DDIMScheduler(), add_watermarker=False
    ).save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(EULER | {"timestep_spacing": "leading", "steps_offset": 1})
    )
    write(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    return folder


def save(folder, kind):
    """A tiny pipeline in diffusers' layout, as its kind has it on the hub."""
    own, scheduler = tiny_pipeline(), PNDM_1
    vae, unet, encoder, tokenizer = own.vae, own.unet, own.text_encoder, own.tokenizer
    scale = 0.18215
    folder.mkdir()
    if kind == "sdxl":
        return sdxl(folder)
    if kind.startswith("bert"):
        encoder, tokenizer = bert(folder)
        scheduler, scale = TRAILING, 0.13025
        if kind == "bert-mask":
            encoder.config.use_attention_mask = True
    elif kind != "sd1":
        unet = changed(unet, use_linear_projection=True)
        scheduler = {"zero-snr": ZERO_SNR, "sd2": DDIM_2, "euler": EULER}[kind]
    with without_bars():
        parts = (vae, encoder, tokenizer, unet, DDIMScheduler(), None, None)
        StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    write(folder / "vae" / "config.json", scaling_factor=scale)
    if kind == "euler":
        write(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    if kind == "sd1":  # as it is published, but for the checker's weights
        checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        write(folder / "model_index.json", safety_checker=checker, scheduler=["diffusers", "PNDMScheduler"])
    return folder


KINDS = ("sd1", "sd2", "euler", "bert", "bert-mask", "zero-snr", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {kind: save(root / kind, kind) for kind in KINDS}


@pytest.fixture
def copy_of(folders, tmp_path):
    """A copy of a kind's folder, to be spoilt."""
    return lambda kind: shutil.copytree(folders[kind], tmp_path / kind)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [10, 25])
def test_our_steps_are_those_of_the_pipelines_own_call(folders, kind, steps):
    with without_bars():
        own = DiffusionPipeline.from_pretrained(folders[kind], **({} if kind == "sdxl" else {"safety_checker": None}))
    absent = {} if kind == "sdxl" else {"requires_safety_checker": False}
    # Built anew, for Stable Diffusion's own pipeline mends the settings of a scheduler that it is given.
    clipped = {"clip_sample": False} if kind == "sdxl" else {}  # the other pipeline sets it itself
    own = type(own)(
        **own.components | {"scheduler": DDIMScheduler.from_config(own.scheduler.config, **clipped)} | absent
    )
    own.set_progress_bar_config(disable=True)
    pipe = load_pipeline(folders[kind], channels_last=False)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = own(
        [SOURCE, TARGET],
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=3.0,
        height=32,
        width=32,
        output_type="latent",
    ).images
    schedule = Schedule.from_config(pipe.scheduler.config, steps)
    embeds = encode_prompts(pipe, ["", "", SOURCE, TARGET])
    for level in range(steps, 0, -1):
        low, high = predict_noise(pipe, torch.cat([latents] * 2), schedule.timesteps[level], embeds).chunk(2)
        latents = step(schedule, latents, guided(low, high, 3.0), level)
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_settings_of_a_model_stay_its_own(folders):
    pipe = load_pipeline(folders["bert"])
    config = pipe.scheduler.config
    assert (config.timestep_spacing, config.beta_schedule, config.clip_sample) == ("trailing", "linear", False)
    assert Schedule.from_config(config, 10).timesteps[-1] == 999
    assert pipe.vae.config.scaling_factor == 0.13025
    assert Schedule.from_config(load_pipeline(folders["sd1"]).scheduler.config, 50) == Schedule.from_config(
        DDIMScheduler(**{key: PNDM_1[key] for key in PNDM_1.keys() - {"skip_prk_steps", *HEADER}}).config, 50
    )
    config = load_pipeline(folders["zero-snr"]).scheduler.config
    assert config.rescale_betas_zero_snr and config.prediction_type == "v_prediction"


def test_the_attention_mask_is_used_where_the_encoder_says_so(folders):
    plain, masked = (encode_prompts(load_pipeline(folders[kind]), [SOURCE]) for kind in ("bert", "bert-mask"))
    assert plain.shape == masked.shape == (1, 32, 16)
    assert (plain - masked).abs().max() > 1e-3


def test_a_bert_model_is_inverted_and_edited(folders):
    pipe, images = load_pipeline(folders["bert"]), tiny_images(1)
    with pytest.raises(ValueError, match="the model reads 32"):
        encode_prompts(pipe, ["cardiomegaly " * 40])
    inversion = invert(pipe, images, [SOURCE], num_inference_steps=4)
    (result,) = edit(pipe, inversion, [REMOVE])
    assert torch.isfinite(result.raw).all() and not torch.equal(result.raw, result.reconstruction)


def test_sdxl_is_inverted_and_edited(folders):
    pipe, images = load_pipeline(folders["sdxl"]), tiny_images(1)
    embeds = encode_prompts(pipe, ["", SOURCE])
    assert embeds.shape[1:] == (78, 32) and not embeds[0, :-1].any()  # no prompt is no text at all
    assert embeds[1, -1, 12:18].tolist() == [32, 32, 0, 0, 32, 32]
    inversion = invert(pipe, images, [SOURCE], num_inference_steps=4)
    (result,) = edit(pipe, inversion, [REMOVE])
    assert torch.isfinite(result.raw).all() and not torch.equal(result.raw, result.reconstruction)
    assert torch.isfinite(sample_images(pipe, embeds[1:], embeds[:1], num_inference_steps=2)).all()


def test_sdxl_is_fine_tuned_and_stays_sdxl(folders, phantom_folder, tmp_path):
    sizes = {"steps": 2, "batch_size": 2, "captions_per_image": 1, "validation_every": 2, "sample_every": 2}
    given = {"dataset": str(phantom_folder), "output": str(tmp_path), "pipeline": str(folders["sdxl"])}
    trained = load_pipeline(finetune(FinetuneConfig(**given, **sizes, learning_rate=1e-3, warmup=0)))
    assert isinstance(trained, StableDiffusionXLPipeline)
    base = load_pipeline(folders["sdxl"])
    assert torch.equal(encode_prompts(base, [SOURCE]), encode_prompts(trained, [SOURCE]))  # the encoders are frozen
    assert not torch.equal(base.unet.add_embedding.linear_1.weight, trained.unet.add_embedding.linear_1.weight)


def test_what_else_sdxl_reads_matters(folders):
    pipe, latents = load_pipeline(folders["sdxl"]), torch.randn(1, 4, 16, 16)
    embeds = encode_prompts(pipe, [SOURCE])
    for of in (slice(0, 12), slice(12, 18)):  # pooled text, sizes
        other = embeds.clone()
        other[:, -1, of] += 50
        assert not torch.allclose(predict_noise(pipe, latents, 500, embeds), predict_noise(pipe, latents, 500, other))


def test_sdxl_without_its_second_encoder_is_refused(copy_of):
    folder = copy_of("sdxl")
    write(folder / "model_index.json", text_encoder_2=None)
    with pytest.raises(ValueError, match="sdxl has text_encoder_2 None; supported are"):
        load_pipeline(folder)


def test_an_editor_of_diffusers_own_pipelines_refuses_sdxl(folders):
    pipe = load_pipeline(folders["sdxl"])
    with pytest.raises(ValueError, match="sdxl is SDXL; this editor runs Stable Diffusion 1 and 2 only"):
        LEdits()(pipe, tiny_images(1), [REMOVE], Edit(remove=("Support Devices",)))


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionImageVariationPipeline",
        "StableDiffusionInstructPix2PixPipeline",
    ],
)
def test_another_family_is_refused_by_name(copy_of, name):
    folder = copy_of("sd1")
    write(folder / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=f"sd1 has _class_name {name}; supported are .*BertModel"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("part", "library", "name"),
    [
        ("text_encoder", "transformers", "CLIPTextModelWithProjection"),
        ("text_encoder", "modeling_cxrbert", "CXRBertModel"),
        ("text_encoder", None, None),  # SDXL's refiner
        ("vae", "diffusers", "AutoencoderTiny"),
        ("unet", "diffusers", "UNet3DConditionModel"),
    ],
)
def test_a_part_of_another_class_is_refused(copy_of, part, library, name):
    folder = copy_of("sd1")
    write(folder / "model_index.json", **{part: [library, name]})
    with pytest.raises(ValueError, match=f"sd1 has {part} {name}; supported are"):
        load_pipeline(folder)


def test_a_unet_that_needs_more_than_text_is_refused(folders, tmp_path):
    changed(tiny_pipeline().unet, time_cond_proj_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="also reads time_cond_proj_dim"):
        load_pipeline(folders["sd1"], unet=tmp_path)


def test_a_scheduler_without_alphas_is_refused(copy_of):
    folder = copy_of("sd1")
    write(folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    )
    with pytest.raises(ValueError, match="sd1 has a FlowMatchEulerDiscreteScheduler, a schedule without alphas"):
        load_pipeline(folder)


def test_zero_terminal_snr_with_epsilon_is_refused(copy_of):
    folder = copy_of("zero-snr")
    write(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(ValueError, match="zero-snr predicts epsilon, which says nothing at the zero-terminal SNR"):
        load_pipeline(folder)


def test_the_tokenizer_and_the_encoder_must_agree(copy_of, tmp_path):
    folder = copy_of("sd1")
    shutil.rmtree(folder / "tokenizer")
    _, tokenizer = bert(tmp_path)
    tokenizer.save_pretrained(folder / "tokenizer")
    write(folder / "model_index.json", tokenizer=["transformers", "BertTokenizer"])
    count = tiny_pipeline().text_encoder.config.vocab_size
    with pytest.raises(ValueError, match=f"tokenizer has {len(tokenizer)} tokens, its text encoder {count}"):
        load_pipeline(folder)


@pytest.mark.parametrize("limit", [128, None])
def test_a_tokenizer_without_a_limit_that_the_encoder_keeps_is_refused(copy_of, limit):
    folder = copy_of("bert")
    write(folder / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    with pytest.raises(ValueError, match=r"model_max_length .* text encoder reads 64: .* tokenizer_config"):
        load_pipeline(folder)


# ------------------------------------------------------------------------------------------- files


def sharded(folder):
    """The U-Net in two files and their index, as large models are stored."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    file.unlink()
    shards = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for k, shard in enumerate(shards):
        save_file({name: tensors[name] for name in names[k::2]}, folder / "unet" / shard, {"format": "pt"})
    of = {name: shards[k % 2] for k, name in enumerate(names)}
    write(file.with_name(f"{file.name}.index.json"), metadata={"total_size": 1}, weight_map=of)
    return [folder / "unet" / shard for shard in shards]


def test_shards_load_and_a_missing_one_is_named(copy_of):
    folder = copy_of("sd1")
    _, last = sharded(folder)
    weight = load_pipeline(folder).unet.conv_in.weight
    assert torch.equal(weight, tiny_pipeline().unet.conv_in.weight)
    last.unlink()
    with pytest.raises(FileNotFoundError, match=rf"unet lacks {last.name}: .*again"):
        load_pipeline(folder)
    with pytest.raises(FileNotFoundError, match=rf"unet lacks {last.name}: .*again"):
        load_pipeline(folder, unet=folder)


@pytest.mark.parametrize("file", ["unet/x.safetensors.incomplete", ".cache/huggingface/download/unet/x.incomplete"])
def test_an_unfinished_download_is_named(copy_of, file):
    folder = copy_of("sd1")
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).touch()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"unet lacks .*\.safetensors: x.*incomplete was begun: .*again"):
        load_pipeline(folder)


def test_a_file_that_ends_early_is_named(copy_of):
    folder = copy_of("sd1")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"vae/diffusion_pytorch_model\.safetensors is not whole .*again"):
        load_pipeline(folder)


def test_a_part_without_weights_is_named(copy_of):
    folder = copy_of("sd1")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(FileNotFoundError, match=r"text_encoder lacks model\.safetensors: download"):
        load_pipeline(folder)


def test_weights_of_a_variant_only_say_how_to_save_them(copy_of):
    folder = copy_of("sd1")
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        file = folder / part / f"{name}.safetensors"
        file.rename(file.with_name(f"{name}.fp16.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"unet lacks .*fp16\.safetensors is a variant.*variant='fp16'.*save"):
        load_pipeline(folder)


def test_weights_as_pickles_only_say_how_to_convert_them(copy_of):
    folder = copy_of("sd1")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin is a pickle.*save_file"):
        load_pipeline(folder)


# ------------------------------------------------------------------------------------------- parts from elsewhere


def test_a_unet_trained_with_another_text_encoder_or_prediction_is_refused(folders):
    with pytest.raises(ValueError, match=r"bert does not fit: .* trained with text encoder bert.* clip_text_model"):
        load_pipeline(folders["sd1"], unet=folders["bert"])
    with pytest.raises(ValueError, match=r"sd1 does not fit: .* prediction type epsilon.* v_prediction"):
        load_pipeline(folders["sd2"], unet=folders["sd1"])


def test_an_autoencoder_of_another_scale_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"vae does not fit: .* scaling factor 0\.18215.* 0\.13025"):
        load_pipeline(folders["sd1"], vae=folders["bert"] / "vae")
    changed(tiny_pipeline().vae, latent_channels=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 4 channels and gives 4, the autoencoder has 8"):
        load_pipeline(folders["sd1"], vae=tmp_path)


def test_a_unet_brings_its_autoencoder(copy_of, folders, caplog):
    """A U-Net of another scale fits together with the autoencoder that it was trained with."""
    folder = copy_of("sd1")
    write(folder / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(ValueError, match=r"scaling factor 0\.5.* 0\.18215"):
        load_pipeline(folders["sd1"], unet=folder)
    with caplog.at_level(logging.WARNING):
        pipe = load_pipeline(folders["sd1"], unet=folder, vae=folder)
    assert pipe.vae.config.scaling_factor == 0.5 and not caplog.records


def test_what_a_part_was_trained_with_is_noted(folders, tmp_path, caplog):
    save_file(tiny_pipeline().unet.state_dict(), tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "prism_lib"):
        load_pipeline(folders["sd1"], unet=folders["sd1"])
        load_pipeline(folders["sd1"], unet=tmp_path)
    said, silent = (record for record in caplog.records if "trained with" in record.getMessage())
    assert said.levelname == "INFO" and "'text encoder': 'clip_text_model'" in said.getMessage()
    assert silent.levelname == "WARNING" and f"{tmp_path}: of what" in silent.getMessage()
    assert silent.getMessage().endswith("the folder says nothing")
