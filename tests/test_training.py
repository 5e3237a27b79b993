"""Fine-tuning: every sample once, and a resumed run that equals an uninterrupted one to the bit."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from prism_lib import models, training
from prism_lib.training import FinetuneConfig
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "pipeline"
    models.build_pipeline(models.tiny_config(), seed=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(phantom_folder, start, tmp_path):
    return FinetuneConfig(
        dataset=str(phantom_folder), output=str(tmp_path / "run"), pipeline=start, steps=6, batch_size=4,
        learning_rate=1e-3, warmup=2, validation_every=3, sample_every=6, checkpoint_every=2,
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def checkpoint(output, name):
    newest = sorted((output / "").glob("step-*"))[-1]
    return load_file(newest / f"{name}.safetensors")


def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, monkeypatch):
    whole = training.finetune(config)
    broken = replace(config, output=str(tmp_path / "broken"))
    step = training._Run.train_step

    def stop(self, index):
        if index == 5:
            raise KeyboardInterrupt  # between the checkpoints at 4 and 6
        return step(self, index)

    monkeypatch.setattr(training._Run, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        training.finetune(broken)
    monkeypatch.setattr(training._Run, "train_step", step)
    resumed = training.finetune(broken)
    for name in ("unet", "ema", "optimizer"):
        expected, found = checkpoint(whole.parent, name), checkpoint(resumed.parent, name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))
    logs = [training.read_log(folder.parent) for folder in (whole, resumed)]
    assert logs[0].equals(logs[1])


def test_the_result_is_a_pipeline_that_diffusers_loads(config):
    folder = training.finetune(config)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    before = models.load_pipeline(config.pipeline)
    frozen = [next(iter(p.vae.parameters())) for p in (pipeline, before)]
    learned = [next(iter(p.unet.parameters())) for p in (pipeline, before)]
    assert torch.equal(*frozen) and not torch.equal(*learned)
    assert sorted(path.name for path in (folder.parent / "samples").iterdir()) == ["step-00000006.png"]
    assert training.finetune(config) == folder, "a finished run is not run again"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_sample_once_per_epoch(config, processes):
    count, epochs = 30, 2
    small = replace(config, batch_size=3)
    cache = training.Cache(
        torch.zeros(count, 2, 1, 2, 2),
        torch.zeros(count, 1, dtype=torch.long),
        torch.zeros(1, 2, 2),
        ("",) * count,
    )
    steps = count * epochs // (small.batch_size * processes)
    seen = [
        row
        for micro in range(steps + 1)
        for rank in range(processes)
        for row in training.draw_batch(cache, small, micro, rank, processes).rows.tolist()
    ]
    first, second = seen[:count], seen[count : 2 * count]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second, "each epoch has its own order"


def test_captions_are_dropped_as_often_as_asked(config):
    cache = training.Cache(
        torch.zeros(4, 2, 1, 1, 1),
        torch.ones(4, 1, dtype=torch.long),
        torch.tensor([[[0.0]], [[1.0]]]),
        ("",) * 4,
    )
    many = replace(config, batch_size=2000, caption_dropout=0.25)
    kept = training.draw_batch(cache, many, 0).embeddings.mean()
    assert kept == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_right_prediction(prediction):
    scheduler = models.ddim_scheduler(prediction)
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    timesteps = torch.tensor([10, 800])
    truth = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)

    class Oracle:
        def __call__(self, *_, **__):
            return type("Output", (), {"sample": truth})

    args = (scheduler, latents, noise, timesteps, torch.zeros(2, 1, 1))
    assert torch.equal(training.diffusion_loss(Oracle(), *args), torch.zeros(2))
    truth = truth + 1
    assert torch.allclose(training.diffusion_loss(Oracle(), *args), torch.ones(2), atol=1e-5)


def test_the_cache_is_reused_and_follows_the_autoencoder(config):
    pipeline = tiny_pipeline()
    first = training.build_cache(pipeline, config, "val")
    files = set((training.Path(config.output) / "cache").iterdir())
    again = training.build_cache(pipeline, config, "val")
    assert torch.equal(first.moments, again.moments)
    other = copy.deepcopy(pipeline)
    other.vae = models.build_pipeline(models.tiny_config(), seed=9).vae
    assert not torch.equal(training.build_cache(other, config, "val").moments, first.moments)
    assert len(set((training.Path(config.output) / "cache").iterdir())) == len(files) + 1


def test_a_loss_that_is_not_finite_names_the_files(config):
    pipeline = models.load_pipeline(config.pipeline)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0 for train/"):
        training.finetune(config, pipeline)
    listed = json.loads((training.Path(config.output) / "not-finite-step-0.json").read_text())
    assert len(listed["files"]) == config.batch_size


def test_another_configuration_needs_another_folder(config):
    training._claim(training.Path(config.output), config)
    with pytest.raises(ValueError, match="another learning_rate"):
        training._claim(training.Path(config.output), replace(config, learning_rate=1.0))


def test_a_damaged_checkpoint_is_refused(config):
    training.finetune(config)
    output = training.Path(config.output)
    newest = sorted(output.glob("step-*"))[-1]
    (newest / "ema.safetensors").write_bytes(b"damaged")
    for path in sorted((output / "pipeline").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (output / "pipeline").rmdir()
    with pytest.raises(ValueError, match=r"ema.safetensors was altered"):
        training.finetune(config)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("caption_dropout", 1.5), ("learning_rate", 0.0)])
def test_settings_out_of_range_are_named(config, name, value):
    with pytest.raises(ValueError, match=name):
        replace(config, **{name: value})


def test_the_cluster_entry_point_reads_the_written_configuration(config, capsys):
    path = training.Path(config.output)
    training._claim(path, config)
    assert training.main([str(path / "config.json")]) == 0
    assert (path / "pipeline" / "model_index.json").is_file()
    assert training.main([]) == 2 and "CONFIG.json" in capsys.readouterr().err
