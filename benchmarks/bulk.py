"""Two processes against one: `python benchmarks/bulk.py [EDITS] [STEPS]` writes figures/phantom/bulk.json.

The same plan of phantom edits with the shipped model, one CPU thread to each process, each run started afresh from the
command line, so that loading counts for both. Their files must be the same bytes. Fewer edits than 64 are a trial, and
nothing is recorded.
"""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from prism_lib import bulk, bulk_plan, datasets, results

EDITS, STEPS, PROCESSES = 64, 20, 2


def main(edits: int = EDITS, steps: int = STEPS) -> dict[str, float]:
    """Prepare phantoms, make the counterfactuals twice, compare every byte; returns the metrics."""
    with tempfile.TemporaryDirectory() as name, results.Timer() as timer:
        folder = Path(name)
        data = datasets.prepare(
            datasets.PrepareConfig(
                "phantom", folder / "data", num_images=4 * edits + 16, vocabulary="phantom", split=(0, 0, 1)
            )
        )
        rows = bulk_plan.BulkConfig(
            str(data), str(folder / "edits.csv"), str(folder / "all"), num_inference_steps=steps
        )
        Path(rows.edits).write_text("edit\nremove_support_devices\n")
        chosen = [task.file_name for task in bulk_plan.plan(rows)[:edits]]
        Path(rows.edits).write_text("file_name,edit\n" + "".join(f"{n},remove_support_devices\n" for n in chosen))
        seconds, found = {}, {}
        for processes in (1, PROCESSES):
            config = replace(rows, out=str(folder / f"out{processes}"))
            with results.Timer() as run:
                command = ["generate", "--data", config.data, "--edits", config.edits, "--out", config.out]
                settings = ["--processes", str(processes), "-p", "num_inference_steps", str(steps)]
                subprocess.run([sys.executable, "-m", "prism_lib.runner", *command, *settings], check=True)
            seconds[processes] = run.seconds
            out = Path(config.out)
            found[processes] = {path.name: path.read_bytes() for path in [*out.rglob("*.png"), out / bulk.MANIFEST]}
    if found[1] != found[PROCESSES] or len(found[1]) != edits + 1:
        raise RuntimeError("one process and two did not write the same files")
    metrics = {
        "edits": edits,
        "seconds_one_process": seconds[1],
        "seconds_two_processes": seconds[PROCESSES],
        "speedup_two_processes": seconds[1] / seconds[PROCESSES],
        "equal_files": len(found[1]),
    }
    if edits >= EDITS:
        results.record(
            "bulk",
            dataset="phantom",
            notebook="benchmarks/bulk.py",
            parameters={
                "edits": edits,
                "num_inference_steps": steps,
                "threads": rows.threads,
                "batch_size": rows.batch_size,
            },
            seed=0,
            metrics=metrics,
            model=rows.model,
            seconds=timer.seconds,
        )
    return metrics


if __name__ == "__main__":
    sys.stdout.write(f"{main(*map(int, sys.argv[1:]))}\n")
