"""The cache: on disk, read by rows, shared by processes, and never another model's."""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from prism_lib.data.folder import load_table, read_images
from prism_lib.data.rows import sample_captions
from prism_lib.files import model_hash
from prism_lib.models.pipeline import build_pipeline, encode_prompts
from prism_lib.training import cache
from prism_lib.training.cache import build_cache, require_captions_fit
from tests.tiny import tiny_config, tiny_pipeline


@pytest.fixture
def small_files(monkeypatch):
    """Files of few rows, so that sixty phantoms fill several."""
    monkeypatch.setattr(cache, "FILE_ROWS", 8)
    monkeypatch.setattr(cache, "IMAGE_BATCH", 4)
    monkeypatch.setattr(cache, "TEXT_BATCH", 4)


def captions_of(phantom_folder, split):
    return sample_captions(phantom_folder, load_table(phantom_folder, split), 0, 2, 0.5)


def build(phantom_folder, folder, pipeline=None, split="train", dtype=torch.float32):
    captions = captions_of(phantom_folder, split)
    return build_cache(pipeline or tiny_pipeline(), phantom_folder, split, folder, captions, dtype)


def test_rows_are_what_the_frozen_parts_compute(phantom_folder, tmp_path, small_files):
    pipeline = tiny_pipeline()
    built = build(phantom_folder, tmp_path)
    table = load_table(phantom_folder, "train")
    assert len(built) == len(table) and built.names == tuple(table["file_name"])
    some = torch.tensor([len(table) - 1, 0, 9])
    images = read_images(phantom_folder, table.iloc[some.tolist()])
    posterior = pipeline.vae.encode((images * 2 - 1).expand(-1, 3, -1, -1)).latent_dist
    scale = pipeline.vae.config.scaling_factor
    expected = torch.stack([posterior.mean * scale, posterior.std * scale], dim=1)
    torch.testing.assert_close(built.moments[some].float(), expected, atol=1e-3, rtol=1e-3)
    texts = sample_captions(phantom_folder, table, 0, 2, 0.5)
    found = built.embeddings[built.caption_rows[some, 1]]
    expected = encode_prompts(pipeline, [texts[k][1] for k in some.tolist()])
    torch.testing.assert_close(found, expected)
    assert torch.equal(built.embeddings[torch.tensor([0])], encode_prompts(pipeline, [""]))


def test_a_second_run_encodes_nothing_and_half_a_cache_is_completed(phantom_folder, tmp_path, small_files, monkeypatch):
    first = build(phantom_folder, tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    lost = next(path for path in files if path.parent.name.startswith("latents"))
    before = load_file(lost)["rows"]
    lost.unlink()
    build(phantom_folder, tmp_path)
    assert torch.equal(load_file(lost)["rows"], before)
    monkeypatch.setattr(cache, "encode_moments", None)
    monkeypatch.setattr(cache, "encode_prompts", None)
    again = build(phantom_folder, tmp_path)
    rows = torch.arange(len(first))
    assert torch.equal(first.moments[rows], again.moments[rows])


def test_processes_share_the_work_and_make_the_same_rows(phantom_folder, tmp_path, small_files, monkeypatch):
    alone = build(phantom_folder, tmp_path / "one")
    written = []

    class Stopped(Exception):
        pass

    def second():
        """The other process comes along when the first one waits for it to have written its files."""
        if len(written) == 1:
            written.append(sorted(path.name for path in (tmp_path / "two").glob("latents*/*")))
            raise Stopped
        written.append([])

    other = {"process_index": 1, "num_processes": 2, "is_main_process": False, "wait_for_everyone": second}
    with monkeypatch.context() as patch:
        patch.setattr(cache, "PartialState", lambda: SimpleNamespace(**other))
        with pytest.raises(Stopped):
            build(phantom_folder, tmp_path / "two")
    assert written[1] == ["00001.safetensors", "00003.safetensors"], "every other file is this process's"
    both = build(phantom_folder, tmp_path / "two")
    rows = torch.arange(len(alone))
    assert torch.equal(alone.moments[rows], both.moments[rows])


def test_another_autoencoder_or_precision_gets_its_own_cache(phantom_folder, tmp_path):
    first = build(phantom_folder, tmp_path, split="val")
    other = copy.copy(tiny_pipeline())
    other.vae = build_pipeline(tiny_config(), seed=9).vae
    rows = torch.arange(3)
    assert not torch.equal(build(phantom_folder, tmp_path, other, "val").moments[rows], first.moments[rows])
    halves = build(phantom_folder, tmp_path, split="val", dtype=torch.bfloat16).embeddings[rows]
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), first.embeddings[rows], atol=0.02, rtol=0.01)
    assert sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.iterdir()) == [
        "latents-val", "latents-val", "text-val", "text-val",
    ]  # fmt: skip


def test_a_damaged_file_is_refused_by_name(phantom_folder, tmp_path):
    build(phantom_folder, tmp_path, split="val")
    path = next(tmp_path.glob("latents-val-*/00000.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged"):
        build(phantom_folder, tmp_path, split="val")


def test_missing_room_is_told_before_the_work(phantom_folder, tmp_path, monkeypatch):
    def refuse(folder, size, what):
        raise OSError(f"{what}: {size:.0f}")

    monkeypatch.setattr(cache, "require_space", refuse)
    count = len(load_table(phantom_folder, "train"))
    size = count * 2 * 4 * 16 * 16 * 2  # mean and deviation, four channels, 16 x 16, float16
    with pytest.raises(OSError, match=rf"latents-train of {count} rows: {size}$"):
        build(phantom_folder, tmp_path)


def test_using_the_tokenizer_does_not_change_the_key():
    """A process that encodes pads its tokenizer, one that waits does not: both must look for the same files."""
    fresh = build_pipeline(tiny_config(), seed=0)
    before = cache._tokenizer_state(fresh.tokenizer)
    encode_prompts(fresh, ["chest x-ray", ""])
    assert cache._tokenizer_state(fresh.tokenizer) == before
    other = build_pipeline(tiny_config(), seed=0, captions=["melanoma", "naevus"])
    assert cache._tokenizer_state(other.tokenizer) != before


def test_a_caption_that_the_model_cannot_read_whole_is_named_with_its_image(phantom_folder):
    tokenizer, captions = tiny_pipeline().tokenizer, captions_of(phantom_folder, "val")
    names = load_table(phantom_folder, "val")["file_name"]
    require_captions_fit(tokenizer, "val", names, captions)
    captions[3][1] += " cardiomegaly" * 80
    message = rf"reads 77 tokens, and captions of 1 images.*that of {names.iloc[3]} has \d+: 'chest"
    with pytest.raises(ValueError, match=message):
        require_captions_fit(tokenizer, "val", names, captions)


def test_the_hash_follows_every_weight():
    one, other = (build_pipeline(tiny_config(), seed=0).vae for _ in range(2))
    assert model_hash(one) == model_hash(other)
    with torch.no_grad():
        other.encoder.conv_in.bias[0] += 1e-6
    assert model_hash(one) != model_hash(other)
