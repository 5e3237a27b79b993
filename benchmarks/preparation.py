"""How fast and in how much memory data are prepared: writes the record `preparation`.

A folder in CheXpert-v1.0-small's form is made of random films of its size (390 x 320). Two processes are measured
against one, one against the plain loop that people write (open, resize, save, with PIL), and the memory of a table of
as many rows as CheXpert has: its films are links to a few shared files, so that only the table is large.

    python -m benchmarks.preparation [--images 2000] [--rows 223414] [--rounds 3]

It takes half an hour, most of it for the large table. A run with fewer images or rows is a trial: its record goes below
PRISM_RUNS.
"""

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from PIL import Image, ImageFilter

from prism_lib import paths, records
from prism_lib.data import PrepareConfig, prepare
from prism_lib.data.chest import ARCHIVES

SIZE, SHARED = 256, 64
IMAGES, ROWS = 2000, 223_414  # of the committed record; CheXpert has as many rows


def film(seed: int) -> Image.Image:
    """Smooth noise: it compresses like a radiograph, which pure noise does not."""
    noise = np.random.default_rng(seed).integers(0, 256, (320, 390), np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


def write_films(root: Path, rows: int, shared: int) -> Path:
    """A train.csv of `rows` films, two per patient: the first `shared` are files, the others links to them."""
    chexpert = ARCHIVES["chexpert"]
    lines, originals = [",".join([*chexpert.tables[0].columns, *chexpert.labels])], []
    for index in range(rows):
        file = root / f"train/patient{index // 2 + 1:06d}/study{index % 2 + 1}/view1_frontal.jpg"
        file.parent.mkdir(parents=True)
        if index < shared:
            film(index).save(file, quality=90)
            originals.append(file)
        else:
            os.link(originals[index % shared], file)
        labels = ",".join("1.0" if (index + place) % 5 == 0 else "" for place in range(14))
        lines.append(f"CheXpert-v1.0-small/{file.relative_to(root)},Male,50,Frontal,AP,{labels}")
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    return root


def plain_loop(root: Path, output: Path) -> None:
    """What one would write without a library: no letterbox, no check, no table."""
    output.mkdir()
    for index, path in enumerate(sorted(root.rglob("*.jpg"))):
        Image.open(path).convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(output / f"{index}.png")


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory(work: Callable[[], object]) -> list[float]:
    """GiB of this process and its children together, sampled every 50 ms while the work runs."""
    samples, done, own = [], threading.Event(), psutil.Process()

    def watch() -> None:
        while not done.wait(0.05):
            total = 0
            for process in (own, *own.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            samples.append(total / 2**30)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return samples


def main() -> None:
    """Measure and record; every comparison alternates, because machines are shared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help="films that are prepared and timed")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the table whose memory is measured")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, records.Timer() as timer:
        place = Path(folder)
        films = write_films(place / "films", given.images, given.images)
        config = PrepareConfig("chexpert", place / "out", films, SIZE, num_images=given.rows, duplicates="keep")
        taken: dict[str, list[float]] = {"plain": [], "one": [], "two": []}
        for turn in range(given.rounds):
            taken["plain"].append(seconds(partial(plain_loop, films, place / f"plain{turn}")))
            for name, processes in (("one", 1), ("two", 2)):
                one_of_two = replace(config, output=place / f"{name}{turn}", processes=processes)
                taken[name].append(seconds(partial(prepare, one_of_two)))
        large = write_films(place / "large", given.rows, SHARED)
        memory = peak_memory(
            partial(prepare, replace(config, data_root=large, output=place / "large-out", processes=2))
        )
    plain, one, two = (median(taken[name]) for name in ("plain", "one", "two"))
    records.record(
        "preparation",
        dataset="phantom",
        notebook="benchmarks/preparation.py",
        parameters={
            "size": SIZE,
            "images": given.images,
            "rows": given.rows,
            "rounds": given.rounds,
            "cores": multiprocessing.cpu_count(),
        },
        seed=0,
        metrics={
            "images_per_second": given.images / one,
            "speedup_two_processes": one / two,
            "speedup_over_plain_loop": plain / one,
            "peak_memory_gib": max(memory),
            "memory_growth_gib": max(memory) - max(memory[: max(1, len(memory) // 4)]),
        },
        figures_dir="" if (given.images, given.rows) == (IMAGES, ROWS) else paths.runs() / "benchmarks",
        model="none",
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
