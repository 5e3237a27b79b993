"""What a model of SD 1.5's size needs on a CPU: `python -m benchmarks.full_size_cpu`.

It writes figures/phantom/full_size_cpu.json: seconds and peak memory of the notebooks 01 to 05, each run by
`prism run` with two steps of everything. The pipeline has the sizes of SD 1.5 and random weights. 01 to 03 take the
profile `chexpert` and a folder in CheXpert's format, whose films are phantoms of 512 pixels; 02 trains adapters
(`02_lora`) and then the whole U-Net with gradient checkpointing (`02_full`), an image a step. 04 and 05 compare with
the truth, which a film does not have: they take prepared phantoms of the same size (`01_phantoms`) and the profile
`smoke`. The peak is the resident memory of the largest process of a notebook, with up to 4 GiB of mapped weight files
that the system may drop; `02_full` needs a machine with 24 GiB. Pictures of random weights mean nothing, but cost what
others cost.

`--only` makes some of the rows, in a folder that `--folder` keeps; `--size tiny` is a trial of minutes. Both write
their record below runs/.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.full_size import TINY
from prism_lib import paths, records
from prism_lib.language import corpus, vocabulary
from prism_lib.models import build_pipeline
from prism_lib.models.pipeline import assembled, train_tokenizer
from prism_lib.phantom import render, sample_patients

SEED, TOKENS = 0, 49408  # those of CLIP
PATIENTS, VALID = 14, 2
LABELS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
HEADER = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS)  # of CheXpert's tables
ROWS = ("01_data", "02_lora", "03_counterfactuals", "01_phantoms", "04_ablations", "05_baselines", "02_full")


def main() -> None:
    """Make model and films, run the notebooks, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny is a trial of minutes")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="some of the rows, in this order")
    parser.add_argument("--folder", default="", help="keep everything here, and use what is there")
    given = parser.parse_args()
    whole = given.size == "full" and given.only == ROWS
    with tempfile.TemporaryDirectory() as temporary, records.Timer() as timer:
        folder = Path(given.folder or temporary).resolve()
        if not (model := folder / "model").is_dir():
            # Another process, whose memory the rows below then do not inherit.
            made = multiprocessing.get_context("spawn").Process(target=write_model, args=(model, given.size))
            made.start()
            made.join()
            write_films(folder / "data" / "chexpert", 512 if given.size == "full" else TINY.image_size)
        metrics = {row: measured(row, folder, given.size) for row in given.only}
    records.record(
        "full_size_cpu",
        dataset="phantom",
        notebook="benchmarks/full_size_cpu.py",
        parameters={"settings": {row: settings(row, "FOLDER", given.size)[1] for row in given.only}},
        seed=SEED,
        metrics=metrics,
        figures_dir="" if whole else paths.runs() / "benchmarks",
        model="random weights",
        seconds=timer.seconds,
    )


def write_model(folder: Path, size: str) -> None:
    """A pipeline with random weights in diffusers' layout; "full" is `sd_pipeline`."""
    torch.manual_seed(SEED)
    captions = corpus(vocabulary("chest"))
    pipeline = sd_pipeline(captions) if size == "full" else build_pipeline(TINY, SEED, captions)
    pipeline.save_pretrained(folder)


def sd_pipeline(captions: Sequence[str]) -> StableDiffusionPipeline:
    """The parts of Stable Diffusion 1.5 with random weights; the tokenizer's unlearnt words are filled up."""
    tokenizer = train_tokenizer(captions, TOKENS)
    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    unused = {f"<|unused{number}|>": number for number in range(len(tokenizer), TOKENS)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = CLIPTokenizer(vocab=learned["vocab"] | unused, merges=merges, model_max_length=77)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    width = {"hidden_size": 768, "projection_dim": 768, "intermediate_size": 3072}
    depth = {"num_hidden_layers": 12, "num_attention_heads": 12}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=TOKENS, **width, **depth, **special))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # its other defaults are those of SD 1.5
    return assembled(vae, text_encoder, tokenizer, unet, scheduler)


def write_films(root: Path, size: int) -> None:
    """Frontal phantoms in the layout of CheXpert-v1.0, a study for each patient."""
    drawn = sample_patients(PATIENTS, SEED)
    films = (render(drawn, size) * 255).round().byte().squeeze(1).numpy()
    known, rows = drawn.labels(), []
    for number, film in enumerate(films):
        split, patient = ("valid", 64541 + number) if number < VALID else ("train", number)
        file = f"{split}/patient{patient:05d}/study1/view1_frontal.jpg"
        (root / file).parent.mkdir(parents=True)
        Image.fromarray(film).save(root / file, quality=95)
        about = {"Path": f"CheXpert-v1.0-small/{file}", "Sex": "Female", "Age": 60, "Frontal/Lateral": "Frontal"}
        rows.append(about | {"AP/PA": "AP"} | {name: known[name].iloc[number] for name in known if name in LABELS})
    table = pd.DataFrame(rows, columns=HEADER)
    for split in ("train", "valid"):
        own = table[table["Path"].str.contains(f"/{split}/")]
        own.to_csv(root / f"{split}.csv", index=False, float_format="%.1f")


def settings(row: str, folder: str, size: str) -> tuple[list[str], dict[str, Any]]:
    """Profile and notebook of a row, and the parameters that differ from the profile's."""
    full = size == "full"
    network = {"network": "densenet121", "size": 320} if full else {"network": "densenet-tiny", "size": 32}
    trained = {"DATA": "prepared/phantoms", "MODEL": "lora/pipeline"}
    pixels = {"SIZE": 512 if full else TINY.image_size}
    edits = {"EDITS": ["remove_support_devices", "add_pleural_effusion"], "IMAGES_PER_EDIT": 1, "STEPS": 2}
    training = {"MODEL": f"{folder}/model", "STEPS": 2, "BATCH_SIZE": 1, "GRADIENT_ACCUMULATION": 1, "EVERY": 2}
    training |= {"WARMUP": 1, "SAMPLES": {"count": 1, "num_inference_steps": 2}}
    options = {"sample_every": 0, "keep_checkpoints": 1}
    judge = {"JUDGE_TRAINING": network | {"steps": 2, "batch_size": 4}, "JUDGE_MIN_AUC": 0.0}
    rows: dict[str, tuple[list[str], dict[str, Any]]] = {
        "01_data": (["chexpert", "01"], pixels | {"EDITS": edits["EDITS"]}),
        "02_lora": (["chexpert", "02"], training | {"RUN": "lora", "OPTIONS": options | {"lora_rank": 8}}),
        "03_counterfactuals": (["chexpert", "03"], edits | judge | {"MODEL": "lora/pipeline", "SHEET_ROWS": 1}),
        "01_phantoms": (["smoke", "01"], pixels | {"OUTPUT": "prepared/phantoms", "NUM_IMAGES": 24}),
        "04_ablations": (["smoke", "04"], trained | {"IMAGES_PER_EDIT": 1, "VARY": {}, "MIXED_PRECISION": "auto"}),
        "05_baselines": (["smoke", "05"], trained | {"HARD_IMAGES": 1}),
        "02_full": (
            ["chexpert", "02"],
            training | {"RUN": "full", "OPTIONS": options | {"gradient_checkpointing": True}},
        ),
    }
    return rows[row]


def measured(row: str, folder: Path, size: str) -> dict[str, float]:
    """Run one notebook as a user does: its seconds, and the peak resident memory of its largest process."""
    (profile, notebook), parameters = settings(row, str(folder), size)
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "prism_lib.apps.cli", "run", profile, "--only", notebook, *given]
    places = {"PRISM_DATA": str(folder / "data"), "PRISM_RUNS": str(folder / "runs"), "PYTHONPATH": str(paths.root())}
    with records.Timer() as timer:
        process = subprocess.Popen(command, env=os.environ | places)
        _, status, usage = os.wait4(process.pid, 0)  # of the process and of all that it waited for
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{row} ended with {process.returncode}")
    sys.stdout.write(f"{row}: {timer.seconds:.0f} s, {usage.ru_maxrss / 2**20:.2f} GiB\n")
    sys.stdout.flush()
    return {"seconds": timer.seconds, "peak_memory_gib": usage.ru_maxrss / 2**20}


if __name__ == "__main__":
    main()
