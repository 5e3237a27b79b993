"""Bulk generation over processes and through kills: `python -m benchmarks.bulk` writes figures/phantom/bulk.json.

The same plan of phantom edits with the shipped model, one CPU thread to each process, each run started afresh from the
command line, so that loading counts for all. One process and two take turns, because a shared machine is not always
equally fast; beside them stand two runs of half the edits each that know nothing of each other and start at one time:
what the machine has to give. One process and two must write the same bytes, and so must a run that is killed (kill -9)
at random moments and then finished. Fewer edits than 64 are a trial, and nothing is recorded.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prism_lib import records
from prism_lib.apps import bulk_plan
from prism_lib.data.preparation import PrepareConfig, prepare

EDITS, STEPS, PROCESSES, ROUNDS, KILLS = 64, 10, 2, 2, 10


def main() -> None:
    """Prepare phantoms, make the counterfactuals three times, compare every byte; print or record the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=EDITS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of one process and two")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, records.Timer() as timer:
        config = _prepared(Path(name), options.edits, options.steps)
        seconds: dict[int, list[float]] = {1: [], PROCESSES: []}
        found = []
        for turn in range(options.rounds):
            for processes, taken in seconds.items():
                own = replace(config, out=str(Path(name) / f"out{processes}-{turn}"))
                with records.Timer() as run:
                    subprocess.run(_command(own, processes), check=True)
                taken.append(run.seconds)
                found.append(_written(Path(own.out)))
        with records.Timer() as apart:
            _run_apart(_halves(config, Path(name)))
        own = replace(config, out=str(Path(name) / "killed"))
        kills = _kill(own, options.kills, min(seconds[1]), random.Random(options.seed))
        subprocess.run(_command(own, 1), check=True)
        if any(files != found[0] for files in found) or len(found[0]) != options.edits + 1:
            raise RuntimeError("one process and two did not write the same files")
        if found[0] != _written(Path(own.out)):
            raise RuntimeError(f"the run that was killed {kills} times did not write the same files")
    one, two = (sum(taken) / options.rounds for taken in seconds.values())
    metrics = {
        "edits": options.edits,
        "seconds_one_process": one,
        "seconds_two_processes": two,
        "seconds_two_separate_runs": apart.seconds,
        "speedup_two_processes": one / two,
        "speedup_two_separate_runs": one / apart.seconds,
        "kills": kills,
        "equal_files": len(found[0]),
    }
    if options.edits >= EDITS:
        records.record(
            "bulk",
            dataset="phantom",
            notebook="benchmarks/bulk.py",
            parameters={
                "edits": options.edits,
                "num_inference_steps": options.steps,
                "rounds": options.rounds,
                "threads": config.threads,
                "batch_size": config.batch_size,
            },
            seed=options.seed,
            metrics=metrics,
            model=config.model,
            seconds=timer.seconds,
        )
    sys.stdout.write(f"{metrics}\n")


def _prepared(folder: Path, edits: int, steps: int) -> bulk_plan.BulkConfig:
    """Phantoms and a file of so many edits."""
    wanted = PrepareConfig("phantom", folder / "data", num_images=4 * edits + 16, vocabulary="phantom", split=(0, 0, 1))
    rows, out = folder / "edits.csv", folder / "all"
    config = bulk_plan.BulkConfig(str(prepare(wanted)), str(rows), str(out), num_inference_steps=steps)
    rows.write_text("edit\nremove_support_devices\n")
    chosen = [task.file_name for task in bulk_plan.plan(config)[:edits]]
    rows.write_text("file_name,edit\n" + "".join(f"{name},remove_support_devices\n" for name in chosen))
    return config


def _halves(config: bulk_plan.BulkConfig, folder: Path) -> list[bulk_plan.BulkConfig]:
    """The same work as two plans of half the edits each."""
    header, *rows = Path(config.edits).read_text().splitlines(keepends=True)
    halves = []
    for name, part in (("first", rows[::2]), ("second", rows[1::2])):
        edits = folder / f"{name}.csv"
        edits.write_text("".join([header, *part]))
        halves.append(replace(config, edits=str(edits), out=str(folder / name)))
    return halves


def _run_apart(configs: Sequence[bulk_plan.BulkConfig]) -> None:
    """Runs of one process each, all at one time."""
    processes = [subprocess.Popen(_command(config, 1)) for config in configs]
    if max(process.wait() for process in processes):
        raise RuntimeError("a separate run failed")


def _command(config: bulk_plan.BulkConfig, processes: int) -> list[str]:
    """The command line of a run."""
    words = ["generate", "--data", config.data, "--edits", config.edits, "--out", config.out]
    settings = ["--processes", str(processes), "-p", "num_inference_steps", str(config.num_inference_steps)]
    return [sys.executable, "-m", "prism_lib.apps.cli", *words, *settings]


def _written(out: Path) -> dict[str, bytes]:
    """All images and the manifest, by name."""
    return {path.name: path.read_bytes() for path in [*out.rglob("*.png"), out / bulk_plan.MANIFEST]}


def _kill(config: bulk_plan.BulkConfig, times: int, seconds: float, rng: random.Random) -> int:
    """Start a run and kill it at a random moment, so many times; returns how often it was still running.

    Moments are small shares of an undisturbed run's time, so that there is work left for the last of ten.
    """
    killed = 0
    for _ in range(times):
        process = subprocess.Popen(_command(config, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.03, 0.18) * seconds)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    return killed


if __name__ == "__main__":
    main()
