"""Counterfactuals by the thousand: over processes, resumable, with one manifest row each.

    prism generate --data FOLDER --edits FILE --out FOLDER
    accelerate launch -m prism_lib.apps.bulk CONFIG.json

The plan (`apps.bulk_plan`) is cut into batches that depend on the plan alone, and processes share out whole batches. So
a file is the same, bit for bit, whatever the number of processes. Its name holds image, edit and a digest of all that
decides its content. Every file appears whole, then its row is appended to the process's own part of the manifest. A run
may be killed at any moment: started again, it goes on where it stopped.

`out/` holds `images/`, the files as the prepared folder names them, and `metadata.csv`, the manifest in the Hugging
Face *imagefolder* convention: the caption and labels that the counterfactual should have, where it came from, all
settings it was made with, its status, its scores and its SHA-256. PNG only, of 8 or 16 bits; pixels that an edit left
alone equal the input's. Where a row sweeps settings (`bulk_plan.Choice`), the scores of all candidates are there too.
An image of which no candidate passed has no file, so its row stands apart, with the same columns, in `rejected.csv`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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

from prism_lib.apps.bulk_choice import REJECTED, Chooser, record, weights
from prism_lib.apps.bulk_plan import MANIFEST, REJECTS, BulkConfig, Settings, Task, batches, load_config, plan
from prism_lib.apps.profiles import one_line
from prism_lib.data.folder import load_info, read_images
from prism_lib.devices import default_device
from prism_lib.editing.counterfactuals import Counterfactual, in_parts, sweep
from prism_lib.editing.inversion import invert
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import recommended
from prism_lib.files import atomic, exclusive, file_hash, write_text
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


def generate(config: BulkConfig, pipe: StableDiffusionPipeline | None = None) -> Summary:
    """Make every counterfactual of the plan that `config.out` does not hold yet; the manifest is then complete.

    Runs in this process or in every one of several (`cli.launch`, `accelerate launch`). `pipe` replaces
    `config.model`. Data, edits, settings, prompts, disk and write access are checked before the first image is touched.
    """
    usual = default_device()
    state = PartialState(cpu=usual.type == "cpu")  # else processes on CPUs do not find each other
    device = state.device if state.num_processes > 1 else usual
    out = Path(config.out).expanduser().resolve()
    tasks = plan(config)
    if state.is_main_process:
        _check_place(out, config, tasks)
    if pipe is None:
        pipe = load_pipeline(config.model, config.precision, device=device, compile=config.compile)
    pipe.to(device)
    _check_lengths(pipe, tasks)
    chooser = Chooser(tasks)
    tasks = named(config, tasks, pipe)
    with exclusive(out) if state.is_main_process else nullcontext():
        run, pending = _start(state, out, batches(tasks, config.batch_size))
        own = pending[state.process_index :: state.num_processes]
        part = out / "parts" / f"{run:06d}-{state.process_index:04d}.jsonl"
        with threads(config.threads):
            _work(config, pipe, chooser, own, part, show=state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            _merge(out)
        state.wait_for_everyone()
    rejected = {row["file_name"] for row in _read_manifest(out / REJECTS)} & {task.output for task in tasks}
    return Summary(out / MANIFEST, len(tasks), sum(map(len, pending)), len(rejected))


def files(out: str | Path) -> dict[tuple[str, str], Path]:
    """(source file, edit key) -> image, of a finished run: what `augmentation.Files` takes.

    Raises ValueError if an edit was made in several ways: then choose rows of the manifest.
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


# --- before the work ------------------------------------------------------------------------------


def _check_place(out: Path, config: BulkConfig, tasks: Sequence[Task]) -> None:
    """The output can be written and has room for everything, and 16 bits suit the images."""
    # The images of a prepared folder are all alike.
    channels, height, width = _images(config, tasks[:1]).shape[1:]
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


def named(config: BulkConfig, tasks: Sequence[Task], pipe: StableDiffusionPipeline) -> list[Task]:
    """The tasks with their outputs: the image's own path, the edit's key and a digest of all that decides the content.

    Of the model that is weights, schedule, words and what it recommends, wherever it was loaded from. ValueError names
    the row whose settings do not go with what the model recommends.
    """
    model = [fingerprint(pipe), dict(pipe.scheduler.config), pipe.tokenizer.get_vocab()]
    common = {"data": load_info(config.data)["content_hash"], "bits": config.bits}
    common["model"] = json.dumps(model, sort_keys=True, default=str)
    scored = {choice: weights(choice) for choice in {task.settings.choice for task in tasks}}
    found = []
    for task in tasks:
        pair, settings = task.pair, task.settings
        try:
            used = [record(recommended(pipe, pair, **candidate)) for candidate in settings.candidates]
        except ValueError as error:
            raise ValueError(f"{config.edits}, row {task.row}: {one_line(error)}") from None
        content = common | {
            "image": task.file_name,
            "prompts": [pair.source, pair.target, pair.source_words, pair.target_words],
            "settings": [settings.text, used],
            "scored": scored[settings.choice],
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        source = PurePosixPath(task.file_name).with_suffix("")
        found.append(replace(task, output=f"images/{source}__{task.edit.key[:80]}__{digest}.png"))
    return found


def _start(state: PartialState, out: Path, planned: Sequence[list[Task]]) -> tuple[int, list[list[Task]]]:
    """The number of this run and the batches it has to do, which the main process finds and sends to all.

    A batch of which anything is missing is done whole, so that its images have the neighbours they always had.
    """
    sent: list[Any] = [None]
    if state.is_main_process:
        for leftover in (*(out / "images").rglob(".partial-*"), *out.glob(".partial-*")):
            leftover.unlink()
        run = 1 + max((int(part.name.split("-")[0]) for part in (out / "parts").glob("*.jsonl")), default=0)
        done = _merge(out)
        sent = [(run, [k for k, batch in enumerate(planned) if any(task.output not in done for task in batch)])]
    run, pending = broadcast_object_list(sent)[0] if state.num_processes > 1 else sent[0]
    return run, [planned[k] for k in pending]


# --- the work -------------------------------------------------------------------------------------


def _work(
    config: BulkConfig,
    pipe: StableDiffusionPipeline,
    chooser: Chooser,
    own: Sequence[list[Task]],
    part: Path,
    show: bool,
) -> None:
    """Edit batch after batch; tqdm shows the images done by this process and how long the rest will take."""
    out = part.parents[1]
    with tqdm(total=sum(map(len, own)), desc="generate", unit="image", disable=None if show else True) as progress:
        for batch in own:
            for task, candidates in zip(batch, _edited(pipe, config, batch), strict=True):
                result, outcome = chooser.choose(task, candidates)
                content = b"" if result is None else _png(result.image, config.bits)
                if content:
                    _write(out / task.output, content)
                _append(part, _row(task, outcome, content))
            progress.update(len(batch))


def _images(config: BulkConfig, tasks: Sequence[Task]) -> Tensor:
    return read_images(config.data, pd.DataFrame({"file_name": [task.file_name for task in tasks]}))


def _edited(pipe: StableDiffusionPipeline, config: BulkConfig, batch: Sequence[Task]) -> list[list[Counterfactual]]:
    """Every candidate of each image of one batch; without room for it, in smaller parts."""
    images = _images(config, batch)
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
    try:
        with atomic(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


# --- the manifest ---------------------------------------------------------------------------------


def _row(task: Task, outcome: dict[str, Any], content: bytes) -> dict[str, Any]:
    """One row of the manifest: what it is, what it should be, how it was made, what came of it and its hash.

    Without content nothing passed: the row keeps the name that the file would have had.
    """
    about = {key: None if value != value else value for key, value in task.about.items()}
    return {
        "file_name": task.output,
        "text": task.pair.target,
        **about,
        "source_file": task.file_name,
        "source_text": task.pair.source,
        "edit": task.edit.key,
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
        elif (out / row["file_name"]).is_file() and file_hash(out / row["file_name"]) == row["sha256"]:
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
