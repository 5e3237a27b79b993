"""How much sooner small classifiers are trained side by side: writes the record `side_by_side`.

The classifiers of 06 in its sizes, first one after the other with every core's thread, then one to a core with one
thread each, in turns. The processes' start counts: a user waits for it.

    python -m benchmarks.classifiers [--classifiers 10] [--steps 160] [--processes 0] [--rounds 3]
"""

import argparse
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from prism_lib import records
from prism_lib.devices import processes_for, side_by_side
from prism_lib.models import classifier
from prism_lib.phantom.patients import render, sample_patients

SIZE, TRAIN, READ, SEED = 192, 360, 160, 30_003

Job = tuple[Tensor, Tensor, classifier.ClassifierConfig]


def jobs(count: int, steps: int) -> list[Job]:
    """As many classifiers, which differ in their seed: images, labels of those that they learn from, configuration."""
    config = classifier.named_network("densenet-tiny", classifier.ClassifierConfig(steps=steps))
    patients = sample_patients(TRAIN + READ, SEED)
    images = torch.cat([render(patients[n : n + 64], SIZE) for n in range(0, len(patients), 64)])
    labels = torch.tensor(patients.labels()[list(config.labels)].to_numpy(dtype=float).tolist())
    return [(images, labels[:TRAIN], replace(config, seed=seed)) for seed in range(count)]


def train(job: Job) -> Tensor:
    """Train one and read the other images."""
    images, labels, config = job
    model = classifier.train_classifier(images[:TRAIN], labels, config, progress=False)
    return classifier.Classifier(model, config.labels).read(images[TRAIN:])


def main() -> None:
    """Measure in turns, because machines are shared, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifiers", type=int, default=10, help="how many are trained and timed")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of each")
    parser.add_argument("--processes", type=int, default=0, help="at a time; 0: as many as 06 takes")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts")
    given = parser.parse_args()
    processes = processes_for(given.processes)
    taken: dict[int, list[float]] = {1: [], processes: []}
    difference = 0.0
    with records.Timer() as timer:
        todo = jobs(given.classifiers, given.steps)
        for _ in range(given.rounds):
            read = []
            for count in taken:
                with records.Timer() as turn:
                    read.append([train(job) for job in todo] if count == 1 else list(side_by_side(train, todo, count)))
                taken[count].append(turn.seconds / given.classifiers)
            apart = [(one - other).abs().mean().item() for one, other in zip(read[0], read[-1], strict=True)]
            difference = max(difference, *apart)
    one, many = median(taken[1]), median(taken[processes])
    records.record(
        "side_by_side",
        dataset="phantom",
        notebook="benchmarks/classifiers.py",
        parameters=vars(given) | {"processes": processes, "threads": torch.get_num_threads(), "size": SIZE},
        seed=SEED,
        metrics={
            "seconds_one_after_another": one,
            "seconds_side_by_side": many,
            "speedup": one / many,
            "difference_of_readings": difference,
        },
        model="none",
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
