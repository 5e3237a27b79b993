"""Counterfactuals by the thousand: over processes, resumable, with one manifest row each.

    prism generate --data FOLDER --edits FILE --out FOLDER
    accelerate launch -m prism_lib.apps.bulk CONFIG.json

The plan (`apps.bulk_plan`) is cut into batches that depend on the plan alone, and processes share out whole
batches. So a file is the same, bit for bit, whatever the number of processes. Its name says image, edit and a digest
of all that decides its content. Every file is written under a temporary name and renamed, then its row is appended to
the process's own part of the manifest: whatever is killed at whatever moment, a file that counts is whole, and a run
that is started again goes on where the last one stopped.

`out/` holds `images/`, the files as the prepared folder names them, and `metadata.csv`, the manifest in the Hugging
Face *imagefolder* convention: the caption and labels that the counterfactual should have, where it came from, how it
was made, its status, its scores and its SHA-256. PNG only, of 8 or 16 bits; pixels that an edit left alone equal the
input's. Where a row sweeps settings (`apps.bulk_choice`), the scores of all candidates are there too. An image of
which no candidate passed has no file, so its row stands apart, with the same columns, in `rejected.csv`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.apps.bulk_chooser import REJECTED, Chooser, digests
from prism_lib.apps.bulk_plan import (
    MANIFEST,
    REJECTS,
    BulkConfig,
    Settings,
    Task,
    batches,
    image_shape,
    load_config,
    plan,
)
from prism_lib.data.folder import load_info, read_images
from prism_lib.devices import default_device
from prism_lib.editing.counterfactuals import Counterfactual, in_parts, sweep
from prism_lib.editing.inversion import invert
from prism_lib.editing.methods import InversionConfig
from prism_lib.files import exclusive, write_text
from prism_lib.models.pipeline import fingerprint, load_pipeline

logger = logging.getLogger(__name__)

_SPARE = 1.1  # of the disk space that uncompressed outputs would take


@dataclass(frozen=True)
class Summary:
    """What a run leaves: the manifest, how many outputs the plan has, how many of them this run had to work on, and of
    how many no candidate passed.
    """

    manifest: Path
    planned: int
    made: int
    rejected: int


@dataclass(frozen=True)
class Ready:
    """What the processes of a run have in common: what to make, with what, and `names`, id(task) -> its output path."""

    tasks: list[Task]
    pipe: StableDiffusionPipeline
    chooser: Chooser
    names: dict[int, str]


def generate(config: BulkConfig, pipe: StableDiffusionPipeline | None = None) -> Summary:
    """Make every counterfactual of the plan that `config.out` does not hold yet; the manifest is then complete.

    Runs in every process of an `accelerate launch`, or in this one. `pipe` replaces `config.model` (a notebook has it
    loaded already). Data, edits, prompts, disk and write access are checked before the first image is touched.
    """
    usual = default_device()
    state = PartialState(cpu=usual.type == "cpu")  # else CPU processes do not know of each other
    device = state.device if state.num_processes > 1 else usual
    return work(config, prepare(config, device, pipe, state.is_main_process), state)


def prepare(
    config: BulkConfig, device: torch.device, pipe: StableDiffusionPipeline | None = None, check_place: bool = True
) -> Ready:
    """Plan, load and check: all that comes before the first image, apart from what other processes have made."""
    tasks = plan(config)
    if check_place:
        _check_place(Path(config.out).expanduser().resolve(), config, tasks)
    if pipe is None:
        pipe = load_pipeline(config.model, config.precision, device=device, compile=config.compile)
    pipe.to(device)
    _check_lengths(pipe, tasks)
    return Ready(tasks, pipe, check_choices(tasks), _names(config, tasks, _model(pipe)))


def work(config: BulkConfig, ready: Ready, state: PartialState) -> Summary:
    """This process's share of a run; the main process also looks what there is, and merges what all have made."""
    out = Path(config.out).expanduser().resolve()
    with exclusive(out) if state.is_main_process else nullcontext():
        run, pending = _start(state, out, batches(ready.tasks, config.batch_size), ready.names)
        own = pending[state.process_index :: state.num_processes]
        part = out / "parts" / f"{run:06d}-{state.process_index:04d}.jsonl"
        with threads(config.threads):
            _work(config, ready, own, out, part, show=state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            _merge(out)
        state.wait_for_everyone()
    rejected = {row["file_name"] for row in _read_manifest(out / REJECTS)} & set(ready.names.values())
    return Summary(out / MANIFEST, len(ready.tasks), sum(map(len, pending)), len(rejected))


def files(out: str | Path) -> dict[tuple[str, str], Path]:
    """(source file, edit key) -> image, of a finished run: what `augmentation.Files` takes.

    Raises ValueError if an edit was made in several ways: then the manifest has to be asked for the one that is meant.
    """
    found: dict[tuple[str, str], Path] = {}
    for row in _read_manifest(Path(out) / MANIFEST):
        key = row["source_file"], row["edit"]
        if key in found:
            raise ValueError(f"{out} has {key[1]} of {key[0]} with more than one setting: choose rows of {MANIFEST}")
        found[key] = Path(out) / row["file_name"]
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many CPU threads inside the block; 0 leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def output_path(task: Task, digest: str) -> str:
    """Below `out`: the image's own path, the edit's key and the digest of all that decides the content."""
    source = PurePosixPath(task.file_name).with_suffix("")
    return f"images/{source}__{task.edit.key[:80]}__{digest[:16]}.png"


# --- before the work ------------------------------------------------------------------------------


def _check_place(out: Path, config: BulkConfig, tasks: Sequence[Task]) -> None:
    """The output can be written and has room for everything, and 16 bits suit the images."""
    height, width, channels = image_shape(config, tasks)
    if config.bits == 16 and channels != 1:
        raise ValueError(f"16-bit PNG holds gray images, and those of {config.data} have {channels} channels")
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"output {out} cannot be written: {error.strerror or error}") from None
    needed = round(_SPARE * len(tasks) * height * width * channels * config.bits / 8)
    if (free := shutil.disk_usage(out).free) < needed:
        raise OSError(f"output {out} has {free / 1e9:.2f} GB free; {len(tasks)} images may take {needed / 1e9:.2f} GB")


def _check_lengths(pipe: StableDiffusionPipeline, tasks: Sequence[Task]) -> None:
    """No prompt is longer than the model reads: the first that is raises ValueError with its image."""
    limit = pipe.tokenizer.model_max_length
    prompts = {prompt: task.file_name for task in tasks for prompt in (task.pair.source, task.pair.target)}
    for prompt, file_name in prompts.items():
        if (length := len(pipe.tokenizer(prompt).input_ids)) > limit:
            raise ValueError(f"{file_name}: prompt has {length} tokens, the model reads {limit}: {prompt!r}")


def check_choices(tasks: Sequence[Task]) -> Chooser:
    """What chooses among candidates; guides that are missing, the judge, or cannot read their edit raise."""
    chooser = Chooser()
    for choice, edit in {(t.settings.choice, t.edit): None for t in tasks if t.settings.choice is not None}:
        chooser.scorers(choice, edit)
    return chooser


def _model(pipe: StableDiffusionPipeline) -> str:
    """What of a pipeline decides its images, wherever it was loaded from: weights, schedule, words."""
    words = pipe.tokenizer.get_vocab()
    return json.dumps([fingerprint(pipe), dict(pipe.scheduler.config), words], sort_keys=True, default=str)


def _names(config: BulkConfig, tasks: Sequence[Task], model: str) -> dict[int, str]:
    """id(task) -> its output path."""
    common = {"data": load_info(config.data)["content_hash"], "model": model, "bits": config.bits}
    names = {}
    scored = {id(c): digests(c) for c in (task.settings.choice for task in tasks) if c is not None}
    for task in tasks:
        pair = [task.pair.source, task.pair.target, task.pair.source_words, task.pair.target_words]
        content = common | {"image": task.file_name, "prompts": pair, "settings": task.settings.text}
        if task.settings.choice is not None:
            content |= scored[id(task.settings.choice)]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        names[id(task)] = output_path(task, digest)
    return names


def _start(
    state: PartialState, out: Path, planned: Sequence[list[Task]], names: dict[int, str]
) -> tuple[int, list[list[Task]]]:
    """The number of this run and the batches it has to do: the main process looks, and all are told the same.

    A batch of which anything is missing is done whole, so that its images see the neighbours they always had.
    """
    told: list[Any] = [None]
    if state.is_main_process:
        for leftover in (*(out / "images").rglob(".*.part"), *out.glob(".*.csv.*")):
            leftover.unlink()
        run = 1 + max((int(part.name.split("-")[0]) for part in (out / "parts").glob("*.jsonl")), default=0)
        done = _merge(out)
        told = [(run, [k for k, batch in enumerate(planned) if any(names[id(task)] not in done for task in batch)])]
    run, pending = broadcast_object_list(told)[0] if state.num_processes > 1 else told[0]
    return run, [planned[k] for k in pending]


# --- the work -------------------------------------------------------------------------------------


def _work(config: BulkConfig, ready: Ready, own: Sequence[list[Task]], out: Path, part: Path, show: bool) -> None:
    """Edit batch after batch; tqdm shows the images done by this process and how long the rest will take."""
    with tqdm(total=sum(map(len, own)), desc="generate", unit="image", disable=None if show else True) as progress:
        for batch in own:
            for task, candidates in zip(batch, _edited(ready.pipe, config, batch), strict=True):
                result, outcome = ready.chooser.choose(task.settings.choice, task.edit, candidates)
                content = b"" if result is None else _png(result.image, config.bits)
                name = ready.names[id(task)]
                if content:
                    _write(out / name, content)
                _append(part, _row(task, outcome, name, content))
            progress.update(len(batch))


def _edited(pipe: StableDiffusionPipeline, config: BulkConfig, batch: Sequence[Task]) -> list[list[Counterfactual]]:
    """Every candidate of each image of one batch; without room for it, in smaller parts."""
    images = read_images(config.data, pd.DataFrame({"file_name": [task.file_name for task in batch]}))
    return in_parts(
        [slice(0, len(batch))], lambda rows: _edit_batch(pipe, images[rows], batch[rows], batch[0].settings)
    )


def _edit_batch(
    pipe: StableDiffusionPipeline, images: Tensor, batch: Sequence[Task], settings: Settings
) -> list[list[Counterfactual]]:
    pairs, size = [task.pair for task in batch], len(batch)
    inversion = invert(
        pipe,
        images,
        [pair.source for pair in pairs],
        method=settings.method,
        num_inference_steps=settings.num_inference_steps,
        config=InversionConfig(seed=settings.seed or 0),
        batch_size=size,
    )
    return sweep(pipe, inversion, pairs, [{**tried, "batch_size": size} for tried in settings.candidates])


def _png(image: Tensor, bits: int) -> bytes:
    """An image (C, H, W) in [0, 1] as the bytes of a PNG file; 8 bits give an 8-bit input back exactly."""
    levels = (image.detach().cpu().double() * (2**bits - 1)).round().permute(1, 2, 0).numpy()
    pixels = levels.astype(np.uint8 if bits == 8 else np.uint16)
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, format="PNG")
    return stream.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole; what was there, of an unfinished batch, is replaced by the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


# --- the manifest ---------------------------------------------------------------------------------


def _row(task: Task, outcome: dict[str, Any], name: str, content: bytes) -> dict[str, Any]:
    """One row of the manifest: what it is, what it should be, how it was made, what came of it and its hash.

    Without content nothing passed: the row keeps the name that the file would have had.
    """
    about = {key: None if value != value else value for key, value in task.about.items()}
    return {
        "file_name": name,
        "text": task.pair.target,
        **about,
        "source_file": task.file_name,
        "source_text": task.pair.source,
        "edit": task.edit.key,
        "settings": task.settings.text,
        **outcome,
        "sha256": hashlib.sha256(content).hexdigest() if content else "",
    }


def _append(part: Path, row: dict[str, Any]) -> None:
    """A row joins the part in one write; a line that a kill cut short is not JSON and does not count."""
    with part.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _merge(out: Path) -> set[str]:
    """Tables and parts become one manifest of all files that are whole and one of rejects; returns their names."""
    made: dict[str, dict[str, Any]] = {}
    rejected: dict[str, dict[str, Any]] = {}
    for row in (*_read_manifest(out / MANIFEST), *_read_manifest(out / REJECTS), *_read_parts(out)):
        if row.get("status") == REJECTED:
            rejected[row["file_name"]] = row
        elif _intact(out / row["file_name"], row["sha256"]):
            made[row["file_name"]] = row
    for path, rows in ((out / MANIFEST, made), (out / REJECTS, rejected)):
        if rows:
            _write_table(path, [rows[name] for name in sorted(rows)])
    for part in (out / "parts").glob("*.jsonl"):
        part.unlink()
    return made.keys() | rejected.keys()


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"file_name", "sha256", "settings"} <= set(rows[0]):
        raise ValueError(f"{path} is no manifest of a bulk run: choose another output folder")
    return rows


def _read_parts(out: Path) -> Iterator[dict[str, Any]]:
    for part in sorted((out / "parts").glob("*.jsonl")):
        for line in part.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # cut short by a kill
                logger.warning("%s: a row was cut short; its image is made again", part)


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def main(arguments: Sequence[str] | None = None) -> int:
    """``accelerate launch -m prism_lib.apps.bulk CONFIG.json``."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if len(argv) != 1:
        sys.stderr.write("usage: accelerate launch -m prism_lib.apps.bulk CONFIG.json\n")
        return 2
    generate(load_config(argv[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
