"""Fine-tuning: a resumed run that equals an uninterrupted one to the bit, and errors that say what to do."""

import copy
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from prism_lib import paths
from prism_lib.apps.profiles import available_profiles, load_profile
from prism_lib.data.folder import load_table, load_vocabulary
from prism_lib.data.rows import sample_captions
from prism_lib.files import Stopped, exclusive
from prism_lib.language.labels import vocabulary
from prism_lib.models.pipeline import build_pipeline, load_pipeline
from prism_lib.training import finetuning, loop
from prism_lib.training.checkpoints import write_tensors
from prism_lib.training.config import FinetuneConfig, load_config, require_same_origin, save_config
from prism_lib.training.finetuning import finetune, main
from prism_lib.training.log import read_log, text_samples
from prism_lib.training.loop import Run
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "pipeline"
    build_pipeline(tiny_config(), seed=0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(phantom_folder, start, tmp_path):
    return FinetuneConfig(
        dataset=str(phantom_folder), output=str(tmp_path / "run"), pipeline=start, steps=6, batch_size=4,
        learning_rate=1e-3, warmup=2, validation_every=3, sample_every=6, checkpoint_every=2,
    )  # fmt: skip


def assert_same_run(first, second):
    """Weights, averages, optimizer, losses and the final pipeline, to the bit."""
    newest = [sorted(Path(folder).glob("step-*"))[-1] for folder in (first, second)]
    assert newest[0].name == newest[1].name
    for name in ("unet", "ema", "optimizer"):
        expected, found = (load_file(folder / f"{name}.safetensors") for folder in newest)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    weights = [load_file(Path(f) / "pipeline/unet/diffusion_pytorch_model.safetensors") for f in (first, second)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    logs = [read_log(folder).drop(columns="images_per_second") for folder in (first, second)]
    assert logs[0].equals(logs[1])


def launched(config, processes):
    """The loop as a command: what `accelerate launch` starts once per GPU, and torchrun once per process on a CPU."""
    several = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    launcher = [sys.executable, "-m", *(several if processes > 1 else [])]
    command = [*launcher, "prism_lib.training.finetuning", str(save_config(config))]
    environment = {"PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_9(process):
    """The launcher and every process that it started, at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family)


def finish(process):
    output, _ = process.communicate(timeout=900)  # two loaded cores take minutes
    assert process.returncode == 0, output


# ------------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation": 2}, {"lora_rank": 2, "mixed_precision": "bf16", "balance": "Cardiomegaly"}],
    ids=["unet", "lora"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(config, tmp_path, monkeypatch, settings):
    config = replace(config, **settings)
    finetune(config)
    broken = replace(config, output=str(tmp_path / "broken"))
    step = Run.train_step

    def stop(self, index):
        if index == 5:
            raise KeyboardInterrupt  # between the checkpoints at 4 and 6
        return step(self, index)

    monkeypatch.setattr(Run, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken)
    monkeypatch.setattr(Run, "train_step", step)
    finetune(broken)
    assert_same_run(config.output, broken.output)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "lora_rank"), [(1, 2), (2, 0)])
def test_kill_9_in_mid_epoch_and_resume_changes_no_bit(config, tmp_path, processes, lora_rank):
    # 30 training images: an epoch ends inside a batch, and the checkpoints lie inside epochs.
    config = replace(config, steps=40, checkpoint_every=5, validation_every=20, sample_every=40, lora_rank=lora_rank)
    finish(launched(config, processes))
    killed = replace(config, output=str(tmp_path / "killed"))
    process = launched(killed, processes)
    deadline = time.monotonic() + 300
    while not list(Path(killed.output).glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)
    kill_9(process)
    assert not (Path(killed.output) / "pipeline").exists() and (Path(killed.output) / ".lock").exists()
    finish(launched(killed, processes))
    assert_same_run(config.output, killed.output)
    state = json.loads((Path(killed.output) / "step-00000040" / "state.json").read_text())
    assert state["processes"] == processes


def as_slurm_does(config, processes):
    """One process per task with the variables of docs/clusters.md, and no launcher that signals would have to pass."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    command = [sys.executable, "-m", "prism_lib.training.finetuning", str(save_config(config))]
    environment = os.environ | {"PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, **place} if processes > 1 else {} for rank in range(processes)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    own = [environment | {name: str(value) for name, value in rank.items()} for rank in ranks]
    return [subprocess.Popen(command, env=one, **how) for one in own]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_saves_a_checkpoint_and_resuming_changes_no_bit(config, tmp_path, processes, number):
    config = replace(config, steps=40, checkpoint_every=20, validation_every=20, sample_every=40)
    for process in as_slurm_does(config, processes):
        finish(process)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    running = as_slurm_does(stopped, processes)
    deadline = time.monotonic() + 300
    while not list(Path(stopped.output).glob("log.jsonl")):
        assert running[0].poll() is None and time.monotonic() < deadline, running[0].communicate()[0]
        time.sleep(0.005)
    running[-1].send_signal(number)  # the others stop at the same step
    for process in running:
        finish(process)
    (left,) = Path(stopped.output).glob("step-*")
    assert 0 < int(left.name[5:]) < 40 and not (Path(stopped.output) / "pipeline").exists()
    assert not (Path(stopped.output) / ".lock").exists()
    for process in as_slurm_does(stopped, processes):
        finish(process)
    assert_same_run(config.output, stopped.output)


@pytest.mark.slow
def test_the_notebook_launcher_runs_the_same_loop(config, tmp_path):
    two = replace(config, steps=3)
    finish(launched(two, 2))
    from_notebook = replace(two, output=str(tmp_path / "notebook"))
    made = f"training.FinetuneConfig(**{asdict(from_notebook)!r})"
    code = f"from prism_lib import training; training.launch({made}, 2)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.root(), timeout=300)
    assert_same_run(two.output, from_notebook.output)


def test_more_or_fewer_processes_cannot_continue_an_epoch(config):
    finetune(config)
    state = next(Path(config.output).glob("step-*6")) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"processes": 3}))
    shutil.rmtree(Path(config.output) / "pipeline")
    with pytest.raises(ValueError, match="trained by 3 processes and cannot be continued by 1"):
        finetune(config)


# ------------------------------------------------------------------------------------------- the result


def test_the_result_is_a_pipeline_that_diffusers_loads(config):
    folder = finetune(config)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    before = load_pipeline(config.pipeline)
    frozen = [next(iter(p.vae.parameters())) for p in (pipeline, before)]
    learned = [next(iter(p.unet.parameters())) for p in (pipeline, before)]
    assert torch.equal(*frozen) and not torch.equal(*learned)
    assert sorted(path.name for path in (folder.parent / "samples").iterdir()) == ["step-00000006.png"]
    words, prepared = vocabulary(str(folder / "vocabulary.yaml")), load_vocabulary(config.dataset)
    assert asdict(words) == asdict(prepared) and words.name == "phantom"
    assert finetune(config) == folder, "a finished run is not run again"
    assert not (folder.parent / ".lock").exists()


def test_the_base_models_settings_of_edits_go_with_the_result(config, start):
    settings = Path(start) / "editing.json"
    settings.write_text('{"defaults": {}}')
    try:
        assert (finetune(config) / "editing.json").read_text() == '{"defaults": {}}'
    finally:
        settings.unlink()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_samples_have_the_colours_of_the_data(config, phantom_folder, tmp_path, mode):
    """Of the run's strips and of its result; the phantoms are tinted, as dermoscopy is."""
    folder = tmp_path / "data"
    shutil.copytree(phantom_folder, folder)
    for path in folder.rglob("*.png"):
        Image.merge("RGB", [Image.open(path).convert("L").point(lambda v, k=k: v // k) for k in (1, 2, 3)]).convert(
            mode
        ).save(path)
    result = finetune(replace(config, dataset=str(folder), steps=2, sample_every=2, learning_rate=1e-5))
    strip = Image.open(result.parent / "samples" / "step-00000002.png")
    images, _ = text_samples(result, folder, count=2)
    assert strip.mode == mode and images.shape[1] == len(mode)


def test_adapters_are_merged_and_also_load_by_themselves(config):
    folder = finetune(replace(config, lora_rank=2))
    merged = StableDiffusionPipeline.from_pretrained(folder).unet
    plain = StableDiffusionPipeline.from_pretrained(config.pipeline)
    assert merged.state_dict().keys() == plain.unet.state_dict().keys()
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 500, torch.randn(1, 77, 16)
    before = plain.unet(*sample).sample
    plain.load_lora_weights(folder.parent / "lora")
    assert not torch.equal(plain.unet(*sample).sample, before)
    torch.testing.assert_close(plain.unet(*sample).sample, merged(*sample).sample, atol=1e-5, rtol=1e-5)
    start = load_pipeline(config.pipeline).unet.state_dict()
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, start[key])}
    assert changed and all(re.search(r"attn\d\.to_(q|k|v|out\.0)\.weight$", key) for key in changed)


def test_frozen_weights_are_in_memory_once_and_after_a_run_not_at_all(config, monkeypatch):
    once, left = [], []

    def watched(*given):
        run = Run(*given)
        own, averaged = (dict(model.named_parameters()) for model in (run.unet, run.averaged))
        once.append({name for name in own if own[name] is averaged[name]} == own.keys() - run.trained.keys() != set())
        left.append(weakref.ref(run.unet))
        return run

    monkeypatch.setattr(finetuning, "Run", watched)
    gc.disable()
    try:
        finetuning.launch(replace(config, steps=1, lora_rank=2, sample_every=0))
    finally:
        gc.enable()
    assert once == [True]
    assert left[0]() is None


def test_the_averaged_weights_follow_the_formula(config):
    """EMA with warm-up (power 3/4): after one step the decay is 1 - 2^(-3/4) at most."""
    config = replace(config, steps=2, checkpoint_every=1, warmup=0, ema_decay=0.3)
    finetune(config)
    one, two = (load_file(Path(config.output) / f"step-0000000{k}" / "unet.safetensors") for k in (1, 2))
    averages = [load_file(Path(config.output) / f"step-0000000{k}" / "ema.safetensors") for k in (1, 2)]
    decay = min(0.3, 1 - 2**-0.75)
    for key in one:
        torch.testing.assert_close(averages[0][key], one[key], msg="the first step replaces the start")
        torch.testing.assert_close(averages[1][key], decay * averages[0][key] + (1 - decay) * two[key])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"gradient_checkpointing": True}, id="memory"),
        pytest.param({"compile": True}, id="compile", marks=pytest.mark.slow),
    ],
)
def test_ways_to_compute_the_same_give_the_same(config, tmp_path, monkeypatch, settings):
    compiled = []

    def compile_without_a_compiler(unet):
        """Traced as ever, but run without the minutes that a C++ compiler takes."""
        compiled.append(unet)
        torch.nn.Module.compile(unet, backend="eager")

    monkeypatch.setattr(UNet2DConditionModel, "compile", compile_without_a_compiler)
    config = replace(config, steps=2)
    other = replace(config, output=str(tmp_path / "other"), **settings)
    expected, found = (load_file(finetune(one) / "unet/diffusion_pytorch_model.safetensors") for one in (config, other))
    assert len(compiled) == ("compile" in settings)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=2e-4, rtol=1e-3)


class Doubled(torch.autograd.Function):
    """The same value with twice the gradient: a compiler that is wrong without an error."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def test_a_compiler_that_computes_other_gradients_is_found_before_the_first_step(config, monkeypatch):
    def backend(graph, inputs):
        return lambda *given: tuple(
            Doubled.apply(value) if isinstance(value, torch.Tensor) and value.requires_grad else value
            for value in graph(*given)
        )

    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: torch.nn.Module.compile(unet, backend=backend))
    with pytest.raises(RuntimeError, match=r"wrongly: its gradient is off by .*set compile to False"):
        finetune(replace(config, compile=True, steps=2))
    assert not list(Path(config.output).glob("step-*"))


@pytest.mark.slow
def test_a_right_compiler_passes_where_the_run_before_ended_between_micro_batches(config, monkeypatch):
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: torch.nn.Module.compile(unet, backend="eager"))
    GradientState()._set_sync_gradients(False)
    finetune(replace(config, compile=True, steps=1))


def test_early_stop_keeps_the_weights_that_validated_best(config, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    monkeypatch.setattr(Run, "validation_loss", lambda self: {"validation_loss": next(losses)})
    config = replace(config, validation_every=1, checkpoint_every=1, early_stop=2, keep_checkpoints=9)
    folder = finetune(config)
    assert sorted(path.name[-1] for path in folder.parent.glob("step-*")) == ["1", "2", "3", "4"]
    best = load_file(folder.parent / "step-00000002" / "ema.safetensors")
    kept = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(best[key], kept[key]) for key in best)
    shutil.rmtree(folder)
    finetune(config)  # killed between the last step and the pipeline: no further validation
    assert next(losses) == 1.0


def test_a_signal_at_the_step_of_an_early_stop_ends_the_run_whole(config, monkeypatch):
    losses = iter([3.0, 4.0])
    step = Run.train_step

    def signalled(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, index)

    monkeypatch.setattr(Run, "validation_loss", lambda self: {"validation_loss": next(losses)})
    monkeypatch.setattr(Run, "train_step", signalled)
    folder = finetune(replace(config, validation_every=1, early_stop=1))
    assert (folder / "model_index.json").is_file()
    assert finetune(replace(config, validation_every=1, early_stop=1)) == folder


def test_one_process_asks_no_other_whether_to_stop(config, monkeypatch):
    gather = Accelerator.gather
    calls = []
    monkeypatch.setattr(Accelerator, "gather", lambda self, tensor: calls.append(tensor) or gather(self, tensor))
    step, kept = Run.train_step, config.output

    def signalled(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, index)

    monkeypatch.setattr(Run, "train_step", signalled)
    with pytest.raises(Stopped) as stopped:
        finetune(config)
    assert stopped.value.code == 0 and sorted(path.name for path in Path(kept).glob("step-*"))[-1] == "step-00000003"
    assert not calls, "it would wait for the device at every step"
    monkeypatch.setattr(Run, "train_step", step)
    assert finetune(config).is_dir()


def test_a_shared_cache_is_where_it_was_asked_for(config, tmp_path):
    finetune(replace(config, steps=1, cache=str(tmp_path / "shared")))
    assert len(list((tmp_path / "shared").iterdir())) == 4
    assert not (Path(config.output) / "cache").exists()


# ------------------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_names_the_files(config, monkeypatch):
    pipeline = load_pipeline(config.pipeline)
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    monkeypatch.setattr(finetuning, "load_pipeline", lambda *_, **__: pipeline)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 0 for train/"):
        finetune(config)
    listed = json.loads((Path(config.output) / "not-finite-step-0.json").read_text())
    assert len(listed["files"]) == config.batch_size


def test_a_gradient_that_is_not_finite_is_caught_before_it_spoils_the_weights(config, monkeypatch):
    pipeline = load_pipeline(config.pipeline)
    pipeline.unet.conv_out.register_full_backward_hook(lambda *_: (torch.full((4, 8, 16, 16), torch.inf),))
    monkeypatch.setattr(finetuning, "load_pipeline", lambda *_, **__: pipeline)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at step 0 for train/"):
        finetune(config)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (
            {},
            'order: mixed_precision="bf16", gradient_checkpointing=True, batch_size=2 with gradient_accumulation=2',
        ),
        ({"gradient_checkpointing": True, "batch_size": 1, "lora_rank": 2}, 'order: mixed_precision="bf16"$'),
        ({"compile": True, "batch_size": 1, "lora_rank": 2}, 'order: mixed_precision="bf16", gradient_checkpointing'),
    ],
)
def test_out_of_memory_says_what_helps(config, monkeypatch, settings, advice):
    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    with pytest.raises(MemoryError, match=advice):
        finetune(replace(config, **settings))


def test_two_runs_cannot_write_one_folder(config):
    with exclusive(Path(config.output)), pytest.raises(RuntimeError, match="in use by process"):
        finetune(config)


def test_a_run_that_began_from_other_weights_or_data_is_not_taken_for_this_one(config):
    require_same_origin(config)
    require_same_origin(config)
    origin = Path(config.output) / "origin.json"
    kept = json.loads(origin.read_text())
    for name in ("weights", "data"):
        origin.write_text(json.dumps(kept | {name: "0" * 64}))
        with pytest.raises(ValueError, match=f"began from other {name} than"):
            finetune(config)


def test_another_configuration_needs_another_folder(config, tmp_path):
    save_config(config)
    with pytest.raises(ValueError, match=r"another learning_rate \(0.*\); choose"):
        finetune(replace(config, learning_rate=1.0))
    moved = tmp_path / "moved"
    shutil.copytree(config.output, moved)
    save_config(replace(config, output=str(moved)))


def test_a_damaged_checkpoint_is_refused(config):
    folder = finetune(config)
    write_tensors(folder.parent / "step-00000006" / "ema.safetensors", {"weight": torch.zeros(1)})
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"ema\.safetensors was altered"):
        finetune(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("caption_dropout", 1.5), ("learning_rate", 0.0), ("mixed_precision", "fp8"), ("lora_rank", -1),
        ("schedule", "sawtooth"), ("keep_checkpoints", 0), ("noisy_share", 1.4), ("noisy_share", 0.4),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(config, name, value):
    with pytest.raises(ValueError, match=name):
        replace(config, **{name: value})


@pytest.mark.parametrize(("capable", "expected"), [({"avx512_bf16": True}, "bf16"), ({}, "no")])
def test_automatic_precision_is_kept_as_what_it_became(config, monkeypatch, capable, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable)
    monkeypatch.setenv("PRISM_DEVICE", "cpu")
    automatic = replace(config, mixed_precision="auto")
    assert automatic.mixed_precision == expected
    assert load_config(save_config(automatic)) == automatic


@pytest.mark.parametrize("name", available_profiles())
def test_options_of_the_profiles_are_settings_that_exist(name):
    options = load_profile(name).sections.get("02_finetuning", {}).get("OPTIONS", {})
    assert asdict(FinetuneConfig(dataset="data", output="run", **options)).items() >= options.items()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"balance": "Edema"}, ValueError, "'Edema' is no label of .*; labels: No Finding, Cardiomegaly"),
        ({"unet": "./nowhere"}, FileNotFoundError, "nowhere does not exist"),
        ({"trackers": ("dvclive",)}, ImportError, "dvclive"),
        ({"trackers": ("telepathy",)}, ValueError, "telepathy"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_encoded(config, settings, error, message):
    with pytest.raises(error, match=message):
        finetune(replace(config, **settings))
    assert not (Path(config.output) / "cache").exists()


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")]
)
def test_weights_that_accelerate_splits_are_refused_before_any_work(config, monkeypatch, variable, name):
    """By what `accelerate launch` sets: so too where DeepSpeed itself is not installed."""
    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(finetuning, "load_pipeline", None)
    with pytest.raises(ValueError, match=f"^{name} splits the weights .* choose multi-GPU"):
        finetune(config)
    assert not Path(config.output).exists() or not list(Path(config.output).glob("config.json"))


def test_a_caption_that_is_too_long_is_told_before_anything_is_encoded(config, monkeypatch):
    """Of either split: the last one to be encoded too."""
    sample = sample_captions

    def sample_long(folder, table, *settings):
        long = " cardiomegaly" * 80 if set(table["split"]) == {"val"} else ""
        return [[text + long for text in texts] for texts in sample(folder, table, *settings)]

    monkeypatch.setattr(loop, "sample_captions", sample_long)
    with pytest.raises(ValueError, match=r"captions of 12 images in split 'val' have more: that of val/\S+\.png"):
        finetune(config)
    assert not (Path(config.output) / "cache").exists()


def test_an_empty_split_is_named(config, monkeypatch):
    empty = load_table(config.dataset, "val").iloc[:0]
    monkeypatch.setattr(
        finetuning, "load_table", lambda folder, split: load_table(folder, split) if split != "val" else empty
    )
    with pytest.raises(ValueError, match="no image in split 'val'"):
        finetune(config)


def test_the_cluster_entry_point_reads_the_written_configuration(config, capsys):
    path = save_config(replace(config, trackers=["tensorboard"]))
    assert load_config(path) == replace(config, trackers=("tensorboard",))
    path.unlink()
    main([str(save_config(config))])
    assert (path.parent / "pipeline" / "model_index.json").is_file()
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "CONFIG.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"dataset": "a", "output": "b", "stepps": 3}', "stepps"),
        ('{"dataset": "a"}', "output"),
        ("{", "Expecting property name"),
    ],
)
def test_a_configuration_that_is_none_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)config\.json is no configuration.*{message}"):
        load_config(path)


def test_published_weights_are_trained_on(config, tmp_path):
    published = copy.deepcopy(load_pipeline(config.pipeline).unet)
    with torch.no_grad():
        published.conv_in.bias.fill_(7.0)
    write_tensors(tmp_path / "model.safetensors", published.state_dict())
    folder = finetune(replace(config, steps=1, unet=str(tmp_path / "model.safetensors")))
    assert load_pipeline(folder).unet.conv_in.bias.mean() == pytest.approx(7.0, abs=0.01)
