"""Pipelines: built from seeds, saved and loaded whole, and strict about what they are given."""

import copy
import subprocess
import sys

import pytest
import torch

from prism_lib.editing.counterfactuals import edit
from prism_lib.editing.inversion import invert
from prism_lib.language import captions
from prism_lib.models.pipeline import (
    build_pipeline,
    compile_blocks,
    decode_latents,
    encode_images,
    encode_prompts,
    load_pipeline,
    sample_images,
    told_apart,
    too_long,
    train_tokenizer,
)
from tests.tiny import REMOVE, tiny_config, tiny_images, tiny_pipeline


def test_weights_follow_the_seed():
    one, same, other = (build_pipeline(tiny_config(), seed) for seed in (1, 1, 2))
    for part in ("vae", "unet", "text_encoder"):
        first, second, third = (next(iter(getattr(p, part).parameters())) for p in (one, same, other))
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_pipeline(tiny_config(), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_a_saved_pipeline_is_the_same_when_loaded(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipe")
    loaded = load_pipeline(tmp_path / "pipe", channels_last=False)
    text = ["chest x-ray with cardiomegaly"]
    assert torch.equal(encode_prompts(loaded, text), encode_prompts(pipeline, text))
    images = tiny_images(2)
    assert torch.equal(encode_images(loaded.vae, images), encode_images(pipeline.vae, images))
    config = loaded.scheduler.config
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 1)
    assert not list(tmp_path.rglob("*.bin"))


def test_channels_last_changes_the_layout_and_no_result(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    plain, last = (load_pipeline(tmp_path / "pipe", channels_last=flag) for flag in (False, None))
    weight = last.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    results = []
    for pipe in (plain, last):
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.double()  # an untrained model amplifies rounding
        inversion = invert(pipe, tiny_images(2), [REMOVE.source] * 2, num_inference_steps=2)
        results.append(torch.stack([r.raw for r in edit(pipe, inversion, [REMOVE] * 2, mask="off")]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_compiled_blocks_edit_as_plain_ones_do(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    plain, compiled = (load_pipeline(tmp_path / "pipe") for _ in range(2))
    compile_blocks(compiled, backend="eager")  # traced and guarded as ever, but not handed to a compiler
    results = []
    for pipe in (plain, compiled):
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.double()
        inversion = invert(pipe, tiny_images(3), [REMOVE.source] * 3, num_inference_steps=2, batch_size=2)
        results.append(torch.stack([r.raw for r in edit(pipe, inversion, [REMOVE] * 3, mask="off")]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)
    assert compiled.unet.state_dict().keys() == plain.unet.state_dict().keys()


def test_the_tokenizer_knows_the_vocabulary_as_whole_words():
    tokenizer = train_tokenizer(captions.corpus(), 1024)
    for word in ("with", "without", "cardiomegaly", "effusion", "devices"):
        assert len(tokenizer(word).input_ids) == 3, f"{word} is one token between start and end"


def test_the_same_captions_give_the_same_tokenizer():
    """The trainer's hash maps are seeded anew for every call: without a fixed numbering no two runs agree."""
    one, *others = (train_tokenizer(captions.corpus(), 1024).backend_tokenizer.to_str() for _ in range(4))
    assert others == [one] * 3


def test_gray_and_colour_go_through_the_autoencoder():
    vae = tiny_pipeline().vae
    gray = tiny_images(2)
    latents = encode_images(vae, gray)
    assert latents.shape == (2, 4, 16, 16)
    assert torch.equal(latents, encode_images(vae, gray.expand(-1, 3, -1, -1)))
    assert decode_latents(vae, latents, 1).shape == (2, 1, 32, 32)
    colour = decode_latents(vae, latents, 3)
    assert colour.shape == (2, 3, 32, 32) and colour.min() >= 0 and colour.max() <= 1


def test_each_prompt_gets_its_own_embedding_in_order():
    texts = ["chest x-ray", "", "chest x-ray", "cardiomegaly"]
    embeddings = encode_prompts(tiny_pipeline(), texts)
    assert torch.equal(embeddings[0], embeddings[2])
    assert not torch.equal(embeddings[0], embeddings[3])
    alone = torch.cat([encode_prompts(tiny_pipeline(), [text]) for text in texts])
    torch.testing.assert_close(embeddings, alone)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 32, 32), r"must be \(N, 1 or 3, H, W\)"),
        (torch.rand(1, 2, 32, 32), r"must be \(N, 1 or 3, H, W\)"),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "torch.uint8"),
        (torch.full((2, 1, 32, 32), torch.nan), r"images \[0, 1\]"),
        (torch.full((1, 1, 32, 32), 200.0), "200"),
        (torch.rand(1, 1, 33, 32), "33x32"),
    ],
)
def test_images_that_do_not_fit_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        encode_images(tiny_pipeline().vae, images)


def test_texts_that_are_too_long_are_counted_with_start_and_end():
    tokenizer = tiny_pipeline().tokenizer
    assert len(tokenizer("cardiomegaly").input_ids) == 3
    longest = " ".join(["cardiomegaly"] * 75)
    assert too_long(tokenizer, ["", longest, f"{longest} cardiomegaly"]) == {f"{longest} cardiomegaly": 78}
    assert too_long(tokenizer, []) == {}


def test_long_prompts_are_never_cut():
    with pytest.raises(ValueError, match="the model reads 77"):
        encode_prompts(tiny_pipeline(), ["cardiomegaly " * 90])


@pytest.mark.parametrize("name", ["./nowhere", "runs/a/pipeline"])
def test_missing_folders_are_named_before_anything_loads(name):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load_pipeline(name)


def test_missing_shipped_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="shipped weights are missing"):
        load_pipeline()


def test_phrases_are_as_far_apart_as_the_text_encoder_puts_them():
    pipe, subject = tiny_pipeline(), "chest x-ray"
    assert told_apart(pipe, "pacemaker", "pacemaker", subject) == 0
    assert told_apart(pipe, "pacemaker", "endotracheal tube", subject) > 0
    shipped = load_pipeline()
    sides = told_apart(shipped, "left pleural effusion", "right pleural effusion", subject)
    assert sides > 0.5, "the shipped model was taught the words of details"
    assert told_apart(shipped, "pleural effusion", "support devices", subject) > 0.5


def sampled_by_hand(pipe, prompt, empty, channels):
    """Denoising without a pipeline of diffusers: 25 steps, guidance 3, one generator a row."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(25)
    latents = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(5 + k)) for k in range(2)])
    for t in scheduler.timesteps:
        doubled = torch.cat([latents, latents])
        low, high = pipe.unet(doubled, t, encoder_hidden_states=torch.cat([empty, prompt])).sample.chunk(2)
        latents = scheduler.step(low + 3.0 * (high - low), t, latents).prev_sample
    return decode_latents(pipe.vae, latents, channels)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_those_of_the_formula_to_the_bit_in_gray_and_in_colour(channels):
    pipe = tiny_pipeline()
    prompt, empty = encode_prompts(pipe, ["chest x-ray with cardiomegaly", "chest x-ray", "", ""]).chunk(2)
    before = dict(vars(pipe.scheduler))
    images = sample_images(pipe, prompt, empty, channels=channels, seed=5)
    assert images.shape == (2, channels, 32, 32)
    assert torch.equal(images, sampled_by_hand(pipe, prompt, empty, channels))
    assert all(value is before[name] for name, value in vars(pipe.scheduler).items()), "the scheduler stays as it is"
    if channels == 3:
        assert not torch.equal(images[:, 0], images[:, 1])


def test_loading_in_a_fresh_process_says_nothing():
    code = "from prism_lib.models import load_pipeline; load_pipeline()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_progress_bar_of_the_users_own_loading_stays(tmp_path):
    from diffusers.utils import logging

    tiny_pipeline().save_pretrained(tmp_path)
    load_pipeline(tmp_path)
    assert logging.is_progress_bar_enabled()
