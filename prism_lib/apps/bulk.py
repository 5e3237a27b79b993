"""Counterfactuals by the thousand (`prism generate`): over processes, resumable, each with a row of a manifest.

Batches depend on the plan alone and processes share out whole batches, so no file depends on their number.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.apps.bulk_plan import MANIFEST, REJECTS, BulkConfig, Choice, Task, batches, plan, region
from prism_lib.apps.recipe import exporter, put_back
from prism_lib.data.folder import load_info, read_images
from prism_lib.devices import default_device, threads
from prism_lib.editing.counterfactuals import Counterfactual, in_parts, sweep
from prism_lib.editing.inversion import invert
from prism_lib.editing.kept import kinds_folder
from prism_lib.editing.settings import EditConfig, recommended, recommended_inversion
from prism_lib.evaluation.selection import GuideScorer, IdentityScorer, Scorer, SimilarityScorer, load_guide, select
from prism_lib.files import Stopped, exclusive, file_hash, stop_asked, write_bytes, write_text
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import find_classifier
from prism_lib.models.image_text import load_image_text_model, weight_files
from prism_lib.models.pipeline import Pipe, fingerprint, load_pipeline, too_long
from prism_lib.reporting.plots import levels, png

logger = logging.getLogger(__name__)

MADE, SELECTED, REJECTED = "made", "selected", "no candidate passed"  # status of a row
_SPARE = 1.1  # of the disk space that uncompressed outputs would take


def generate(config: BulkConfig, pipe: Pipe | None = None) -> int:
    """Make every counterfactual of the plan that `config.out` lacks; returns how many, by all processes (`cli.launch`).

    All is checked before the first image; `pipe` replaces `config.model`. SIGTERM and SIGUSR1 end it after a batch.
    """
    usual = default_device()
    # On a CPU processes find each other only if told so; checking the files of a large run takes its time.
    state = PartialState(cpu=usual.type == "cpu", timeout=timedelta(hours=2))
    device = state.device if state.num_processes > 1 else usual
    out = Path(config.out).expanduser().resolve()
    tasks = plan(config)
    if state.is_main_process:
        check_place(config, tasks)
    if pipe is None:
        pipe = load_pipeline(config.model, config.precision, device=device)
    pipe.to(device)
    chooser = Chooser(tasks)
    tasks = named(config, tasks, pipe)
    with exclusive(out) if state.is_main_process else nullcontext():
        run, pending = _start(state, out, batches(tasks, config.batch_size))
        own = pending[state.process_index :: state.num_processes]
        part = out / "parts" / f"{run:06d}-{state.process_index:04d}.jsonl"
        with threads(config.threads):
            stopped = _work(config, pipe, chooser, own, part, show=state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            _merge(out)
        state.wait_for_everyone()
    if stopped:
        raise Stopped(0)
    return sum(map(len, pending))


def files(out: str | Path) -> dict[tuple[str, str], Path]:
    """(source file, edit key) -> image of a run, for `augmentation.Files`; ValueError if one has several settings."""
    found: dict[tuple[str, str], Path] = {}
    for row in _read_manifest(Path(out) / MANIFEST):
        key = row["source_file"], row["edit"]
        if not row["file_name"].endswith(".png"):
            raise ValueError(f"{out} has {key[1]} of {key[0]} as DICOM; images are trained on as PNG (out_format)")
        if key in found:
            raise ValueError(f"{out} has {key[1]} of {key[0]} with more than one setting: choose rows of {MANIFEST}")
        found[key] = Path(out) / row["file_name"]
    return found


def check_place(config: BulkConfig, tasks: Sequence[Task]) -> None:
    """The output can be written and has room for everything, and 16 bits suit the images, which are all alike."""
    out = Path(config.out).expanduser().resolve()
    channels, height, width = _images(config, tasks[:1]).shape[1:]
    if channels != 1 and (config.bits == 16 or config.full_size):
        raise ValueError(f"16 bits and full_size are for gray images; those of {config.data} have {channels} channels")
    _read_manifest(out / MANIFEST)  # another's is refused before a folder is made beside it
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output {out} cannot be written: {error.strerror or error}") from None
    needed = round(_SPARE * len(tasks) * height * width * channels * config.bits / 8)
    if (free := shutil.disk_usage(out).free) < needed:
        raise OSError(f"output {out} has {free / 1e9:.2f} GB free; {len(tasks)} images may take {needed / 1e9:.2f} GB")


def named(config: BulkConfig, tasks: Sequence[Task], pipe: Pipe) -> list[Task]:
    """The tasks with their outputs: the image's own path, the edit's key and a digest of all that decides the content.

    ValueError names the image whose prompt, or the row whose settings, the model does not take.
    """
    prompts = {prompt: task.file_name for task in tasks for prompt in (task.pair.source, task.pair.target)}
    for prompt, length in too_long(pipe.tokenizer, prompts).items():
        limit = pipe.tokenizer.model_max_length
        raise ValueError(f"{prompts[prompt]}: prompt has {length} tokens, the model reads {limit}: {prompt!r}")
    known = getattr(pipe.text_encoder.config, "known_prompts", ())
    model = [fingerprint(pipe), dict(pipe.scheduler.config), pipe.tokenizer.get_vocab(), *known]
    digest = hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode()).hexdigest()
    info, suffix = load_info(config.data), "png" if config.out_format == "PNG" else "dcm"
    common = {"data": info["content_hash"], "bits": config.bits, "model": digest}
    common |= {"full_size": True} if config.full_size else {}
    common |= {"header": config.header} if config.out_format == "DICOM" else {}
    scored = {choice: _weights(choice) for choice in {task.settings.choice for task in tasks}}
    found = []
    for task in tasks:
        pair, settings = task.pair, task.settings
        try:
            steps = settings.num_inference_steps
            used = [_record(recommended(pipe, pair, steps, **candidate)) for candidate in settings.candidates]
            networks = {kinds_folder(one["kinds_network"]) for one in used if one["kinds_network"]}
        except (OSError, ValueError) as error:
            raise ValueError(f"{config.edits}, row {task.row}: {error}") from None
        content = common | {
            "image": task.file_name,
            "prompts": [pair.source, pair.target, pair.source_words, pair.target_words, pair.side],
            "settings": [settings.text, used],
            "inversion": asdict(recommended_inversion(pipe, steps)),
            "scored": scored[settings.choice],
        }
        content |= {"kinds": sorted(file_hash(n / "model.safetensors") for n in networks)} if networks else {}
        for name, area in task.areas.items():
            content[name] = hashlib.sha256(region(area, info["config"]["size"]).tobytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        source = PurePosixPath(task.file_name).with_suffix("")
        found.append(replace(task, output=f"images/{source}__{task.edit.key[:80]}__{digest}.{suffix}"))
    return found


def _weights(choice: Choice | None) -> list[str]:
    """SHA-256 of the weights of what scores: another guide of the same name chooses other results; not of factories."""
    own = find_classifier(choice.guide) if choice and choice.guide and ":" not in choice.guide else None
    guide = [own if own.is_file() else own / "model.safetensors"] if own else []
    similar = weight_files(choice.similarity) if choice and choice.similarity else ()
    return [file_hash(file) for file in (*guide, *similar)]


def _record(settings: EditConfig) -> dict[str, Any]:  # `batch_size` does not decide the result
    return {name: value for name, value in asdict(settings).items() if name != "batch_size"}


def _start(state: PartialState, out: Path, planned: Sequence[list[Task]]) -> tuple[int, list[list[Task]]]:
    """The number of this run and the batches of which anything is missing; each is done whole, to stay equal."""
    sent: list[Any] = [None]
    if state.is_main_process:
        for leftover in out.rglob(".partial-*"):
            leftover.unlink()
        run = 1 + max((int(part.name.split("-")[0]) for part in (out / "parts").glob("*.jsonl")), default=0)
        done = _merge(out)
        sent = [(run, [k for k, batch in enumerate(planned) if any(task.output not in done for task in batch)])]
    run, pending = broadcast_object_list(sent)[0]
    return run, [planned[k] for k in pending]


class Chooser:
    """Chooses among the candidates of an image. Guides and image-text models are loaded, and checked, at the start."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        guide, similarity = cache(load_guide), cache(lambda name: SimilarityScorer(load_image_text_model(name)))
        self._scorers: dict[tuple[Choice, Edit], list[Scorer]] = {}
        for choice, edit in {(t.settings.choice, t.edit): None for t in tasks if t.settings.choice is not None}:
            scorers = self._scorers[choice, edit] = [IdentityScorer()]
            scorers += [GuideScorer(guide(choice.guide), edit)] if choice.guide else []
            scorers += [similarity(choice.similarity)] if choice.similarity else []

    def choose(self, task: Task, candidates: Sequence[Counterfactual]) -> tuple[Counterfactual | None, dict[str, Any]]:
        """The result of one image (alone: no score depends on neighbours), None if nothing passed, and its columns."""
        choice, settings = task.settings.choice, json.loads(task.settings.text)
        best: Counterfactual | None = candidates[0]
        status, scores, tried = MADE, candidates[0].scores, {}
        if choice is not None:
            (found,) = select([candidates], self._scorers[choice, task.edit], choice.criteria)
            rows = [
                {"settings": {name: given[name] for name in choice.sweep}, "scores": scores, "failures": failures}
                for given, scores, failures in zip(task.settings.candidates, found.scores, found.failures, strict=True)
            ]
            best, tried = found.best, {"winner": found.winner, "candidates": json.dumps(rows)}
            status, scores = (REJECTED, {}) if found.winner is None else (SELECTED, found.scores[found.winner])
        used = (candidates[0] if best is None else best).settings
        unknown = choice.sweep if choice is not None and best is None else {}
        settings["edit"] = {name: value for name, value in _record(used).items() if name not in unknown}
        columns = {"settings": json.dumps(settings, sort_keys=True), "status": status}
        return best, columns | {f"score_{name}": value for name, value in scores.items()} | tried


def _work(config: BulkConfig, pipe: Pipe, chooser: Chooser, own: list[list[Task]], part: Path, show: bool) -> bool:
    """Edit batch after batch: each file, then its row in this process's part of the manifest; whether a signal came."""
    out, hidden = part.parents[1], None if show else True
    with tqdm(total=sum(map(len, own)), desc="generate", unit="image", disable=hidden) as bar, stop_asked() as asked:
        for batch in own:
            if asked.is_set():
                break
            edit = partial(_edit_batch, pipe, config, batch)
            for task, candidates in zip(batch, in_parts(len(batch), len(batch), edit), strict=True):
                result, columns = chooser.choose(task, candidates)
                source = {"source_file": task.file_name, "source_text": task.pair.source, "edit": task.edit.key}
                row = {"file_name": task.output, "text": task.pair.target, **task.about, **source, **columns}
                digest = ""  # nothing passed: the name is that which the file would have had
                if result is not None:
                    told = {"model": Path(config.model).name, **json.loads(columns["settings"])}
                    dicom = exporter(result, told, task.film, config.header) if config.out_format == "DICOM" else None
                    content = (dicom or partial(png, compress_level=6))(levels(result.image, config.bits))
                    digest = hashlib.sha256(content).hexdigest()
                    write_bytes(out / task.output, content)
                    if config.full_size:
                        film = out / "full_size" / PurePosixPath(task.output).relative_to("images")
                        row["full_size"] = put_back(Path(task.film), film, result, dicom).removeprefix(f"{out}/")
                with part.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | {"sha256": digest}) + "\n")
            bar.update(len(batch))
    return asked.is_set()


def _images(config: BulkConfig, tasks: Sequence[Task]) -> Tensor:
    return read_images(config.data, pd.DataFrame({"file_name": [task.file_name for task in tasks]}))


def _edit_batch(pipe: Pipe, config: BulkConfig, batch: Sequence[Task], rows: slice) -> list[list[Counterfactual]]:
    """Every candidate of some rows of a batch."""
    batch = batch[rows]
    settings, pairs, size = batch[0].settings, [task.pair for task in batch], len(batch)
    images, sources = _images(config, batch), [pair.source for pair in pairs]
    steps = settings.num_inference_steps
    how = recommended_inversion(pipe, steps, seed=settings.seed or 0)
    inversion = invert(pipe, images, sources, settings.method, steps, config=how, batch_size=size)
    drawn = {name: [region(task.areas[name], images.shape[-1]) for task in batch] for name in batch[0].areas}
    areas = {name: torch.from_numpy(np.stack(pixels))[:, None] for name, pixels in drawn.items()}
    tried = [one | {"batch_size": size} for one in settings.candidates]
    return sweep(pipe, inversion, pairs, tried, mask=areas.get("mask", "auto"), keep=areas.get("keep"))


def _merge(out: Path) -> set[str]:
    """Tables and parts become one manifest of all files that are whole and one of rejects; returns their names."""
    made, rejected = {}, {}
    for row in (*_read_manifest(out / MANIFEST), *_read_manifest(out / REJECTS), *_read_parts(out)):
        if row.get("status") == REJECTED:
            rejected[row["file_name"]] = row
        elif (out / row["file_name"]).is_file() and file_hash(out / row["file_name"]) == row["sha256"]:
            made[row["file_name"]] = row
    for path, rows in ((out / MANIFEST, made), (out / REJECTS, rejected)):
        if rows:  # as objects: numbers are written as they are read
            table = pd.DataFrame([rows[name] for name in sorted(rows)], dtype=object)
            write_text(path, table.to_csv(index=False, lineterminator="\n"))
    for part in (out / "parts").glob("*.jsonl"):
        part.unlink()
    return made.keys() | rejected.keys()


def _read_manifest(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if not {"file_name", "sha256", "settings"} <= set(table):
        raise ValueError(f"{path} is no manifest of a bulk run: choose another output folder")
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _read_parts(out: Path) -> Iterator[dict[str, Any]]:
    for part in sorted((out / "parts").glob("*.jsonl")):
        for line in part.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # cut short by a kill
                logger.warning("%s: a row was cut short; its image is made again", part)
