"""How many phantoms a second: `python -m benchmarks.rendering` writes figures/phantom/rendering.json."""

import argparse
import time

import torch

from prism_lib import records
from prism_lib.phantom import render, sample_patients

SIZE, COUNT, ROUNDS = 256, 64, 5


def main() -> None:
    """Render the same patients several times; the median round counts, because machines are shared."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    patients = sample_patients(COUNT, seed=0)
    render(patients[:8], SIZE)
    with records.Timer() as timer:
        rates = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            render(patients, SIZE)
            rates.append(COUNT / (time.perf_counter() - start))
    records.record(
        "rendering",
        dataset="phantom",
        notebook="benchmarks/rendering.py",
        parameters={"size": SIZE, "images": COUNT, "rounds": ROUNDS, "threads": torch.get_num_threads()},
        seed=0,
        metrics={"images_per_second": sorted(rates)[ROUNDS // 2], "fastest": max(rates), "slowest": min(rates)},
        model="none",
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
