"""Latents and text embeddings of a data set, encoded once and kept on disk in safetensors files of 1,024 rows.

Rows are read one at a time, so a data set may be larger than memory. The folder's name is a hash of everything they
depend on. Each process writes its part of the files, each whole or not at all, and encodes nothing again.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.data.folder import load_info, load_table, read_images
from prism_lib.files import model_hash
from prism_lib.models.pipeline import Pipe, encode_moments, encode_prompts, text_encoders, too_long
from prism_lib.training.checkpoints import require_space, write_tensors

logger = logging.getLogger(__name__)

FILE_ROWS = 1024  # rows of a file; a multiple of the batch sizes below
IMAGE_BATCH, TEXT_BATCH = 16, 64
CPU_IMAGE_BATCH = 4  # larger batches outgrow a CPU's caches and take up to twice as long


class Rows:
    """The rows of one tensor that lies in many files; ``rows[indices]`` reads these and no more."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Open the files; ValueError names one that is damaged."""
        self._slices = []
        for path in files:
            try:
                self._slices.append(safe_open(path, framework="pt").get_slice("rows"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"cache file {path} is damaged, delete it: {error}") from None

    def __len__(self) -> int:
        return sum(rows.get_shape()[0] for rows in self._slices)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Rows (K, ...) for indices (K,)."""
        return torch.stack([self._slices[i // FILE_ROWS][i % FILE_ROWS] for i in indices.tolist()])


@dataclass(frozen=True)
class Cache:
    """What the frozen parts make of one split."""

    moments: Tensor | Rows  # (N, 2, c, h, w): mean and deviation of the latents' posterior, scaled
    caption_rows: Tensor  # (N, k) rows of `embeddings`
    embeddings: Tensor | Rows  # (distinct captions + 1, tokens, width); row 0 is the empty prompt
    names: tuple[str, ...]  # (N,) file names

    def __len__(self) -> int:
        return len(self.moments)


def build_cache(
    pipeline: Pipe,
    dataset: str | Path,
    split: str,
    folder: Path,
    captions: Sequence[Sequence[str]],
    dtype: torch.dtype = torch.float32,
) -> Cache:
    """Encode a split and ``captions`` of each of its images below ``folder``, or open what is there.

    ``dtype`` is that of the text embeddings. Latents are in float16: their deviation is far wider than its rounding.
    """
    table = load_table(dataset, split)
    distinct = list(dict.fromkeys(["", *(text for texts in captions for text in texts)]))
    row = {text: i for i, text in enumerate(distinct)}
    vae = copy.deepcopy(pipeline.vae).to(memory_format=torch.channels_last)  # a quarter faster
    image_batch = CPU_IMAGE_BATCH if vae.device.type == "cpu" else IMAGE_BATCH

    def moments(start: int, stop: int) -> Tensor:
        images = read_images(dataset, table.iloc[start:stop])
        return torch.stack(encode_moments(vae, images), dim=1).half().cpu()  # (N, 2, c, h, w)

    def embeddings(start: int, stop: int) -> Tensor:
        return encode_prompts(pipeline, distinct[start:stop]).to("cpu", dtype)

    content = load_info(dataset)["content_hash"]
    image_key = _key("latents", content, split, model_hash(vae), [vae.config.scaling_factor, vae.config.shift_factor])
    words = hashlib.sha256("\n".join(distinct).encode()).hexdigest()
    encoders = [model_hash(encoder) for encoder in text_encoders(pipeline)]
    text_key = _key("text", words, _tokenizer_state(pipeline.tokenizer), *encoders, str(dtype))
    return Cache(
        moments=_encode(moments, len(table), image_batch, folder, f"latents-{split}", image_key),
        caption_rows=torch.tensor([[row[text] for text in texts] for texts in captions]),
        embeddings=_encode(embeddings, len(distinct), TEXT_BATCH, folder, f"text-{split}", text_key),
        names=tuple(table["file_name"]),
    )


def require_captions_fit(tokenizer: Any, split: str, names: Iterable[str], captions: Sequence[Sequence[str]]) -> None:
    """ValueError, by image and caption, if one of the captions of each image has more tokens than the model reads."""
    long = too_long(tokenizer, dict.fromkeys(text for texts in captions for text in texts))
    found = [(name, text) for name, texts in zip(names, captions, strict=True) for text in texts if text in long]
    if found:
        (name, text), count = found[0], len({name for name, _ in found})
        most, where = tokenizer.model_max_length, f"captions of {count} images in split {split!r}"
        example = f"that of {name} has {long[text]}: {text!r}"
        way = "Keep fewer labels when preparing, or lower explicit_share"
        raise ValueError(f"the model reads {most} tokens, and {where} have more: {example}. {way}")


def _encode(encode: Callable[[int, int], Tensor], count: int, batch: int, folder: Path, name: str, key: str) -> Rows:
    """Write the files that are missing, those of this process, and open them all."""
    processes = PartialState()
    folder = folder / f"{name}-{key[:16]}"
    files = [folder / f"{start // FILE_ROWS:05d}.safetensors" for start in range(0, count, FILE_ROWS)]
    missing = [(k, path) for k, path in enumerate(files) if not path.is_file()]
    processes.wait_for_everyone()  # all processes must see the same files missing
    rows = {k: min(FILE_ROWS, count - k * FILE_ROWS) for k, _ in missing}
    own = missing[processes.process_index :: processes.num_processes]
    total = sum(rows[k] for k, _ in own)
    with tqdm(total=total, desc=name, unit="row", disable=not (own and processes.is_main_process)) as bar:
        for k, path in own:
            chunks = []
            for start in range(k * FILE_ROWS, k * FILE_ROWS + rows[k], batch):
                chunks.append(encode(start, min(count, start + batch)))
                if k == own[0][0] and len(chunks) == 1:
                    size = chunks[0].nbytes / len(chunks[0]) * sum(rows.values())
                    require_space(folder, size, f"{name} of {sum(rows.values())} rows")
                bar.update(len(chunks[-1]))
            write_tensors(path, {"rows": torch.cat(chunks)})
    processes.wait_for_everyone()
    return Rows(files)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """The state of a tokenizer, without the padding and truncation that its last call has left in it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: state[name] for name in sorted(state.keys() - {"padding", "truncation"})}
