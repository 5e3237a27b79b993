"""How much sooner small classifiers are trained side by side: writes the record `side_by_side`.

The classifiers of 05 in its sizes, first one after the other with every core's thread, then one to a core with one
thread each, in turns. The processes' start counts: it is part of what a user waits for.

    python -m benchmarks.classifiers [--classifiers 10] [--steps 160] [--processes 0] [--rounds 3]
"""

import argparse
from dataclasses import replace
from statistics import median

import torch

from prism_lib import records
from prism_lib.devices import processes_for
from prism_lib.models import classifier
from prism_lib.phantom.patients import render, sample_patients
from prism_lib.studies import side_by_side

SIZE, TRAIN, READ, SEED = 192, 360, 160, 30_003


def tasks(count: int, steps: int) -> list[tuple[int, side_by_side.Task]]:
    """As many classifiers, which differ in their seed."""
    config = classifier.named_network("densenet-tiny", classifier.ClassifierConfig(steps=steps))
    patients = sample_patients(TRAIN + READ, SEED)
    images = torch.cat([render(patients[n : n + 64], SIZE) for n in range(0, len(patients), 64)])
    labels = torch.tensor(patients.labels()[list(config.labels)].to_numpy(dtype=float).tolist())
    task = side_by_side.Task(images[:TRAIN], labels[:TRAIN], labels[:TRAIN, 0].long(), config, images[TRAIN:])
    return [(seed, replace(task, config=replace(config, seed=seed))) for seed in range(count)]


def main() -> None:
    """Measure in turns, because machines are shared, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifiers", type=int, default=10, help="how many are trained and timed")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of each")
    parser.add_argument("--processes", type=int, default=0, help="at a time; 0: as many as 05 takes")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts")
    given = parser.parse_args()
    processes = processes_for(given.processes)
    taken: dict[int, list[float]] = {1: [], processes: []}
    difference = 0.0
    with records.Timer() as timer:
        todo = tasks(given.classifiers, given.steps)
        for _ in range(given.rounds):
            read = []
            for count in taken:
                with records.Timer() as turn:
                    read.append(dict(side_by_side.train(todo, count)))
                taken[count].append(turn.seconds / given.classifiers)
            apart = [(read[0][key] - read[-1][key]).abs().mean().item() for key, _ in todo]
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
