"""Programs that share a machine: `python -m benchmarks.threads` writes figures/phantom/threads.json.

U-Net rows a second of one program with all threads, of two such programs at once, and of one program a core with one
thread each; with waiting threads that spin (OMP_WAIT_POLICY=ACTIVE) and with the passive ones that PRISM sets.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from prism_lib import records

ROWS = 8  # of a call, the size of an edit's batch on a CPU
WORK = "from benchmarks.threads import work; work()"


def work() -> None:
    """Say "ready", wait for the number of seconds, call the U-Net for so long and print rows a second."""
    import torch

    from prism_lib.models import load_pipeline, predict_noise

    pipe = load_pipeline()
    latents, embeds = torch.randn(ROWS, 4, 64, 64), torch.randn(ROWS, 77, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        predict_noise(pipe, latents, 500, embeds)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        seconds = float(sys.stdin.readline())
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            predict_noise(pipe, latents, 500, embeds)
            calls += 1
        sys.stdout.write(f"{ROWS * calls / (time.perf_counter() - start)}\n")


def rates(programs: int, threads: int, policy: str, seconds: float) -> list[float]:
    """Rows a second of so many programs at once."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(threads), "PRISM_DEVICE": "cpu"}
    pipe = subprocess.PIPE
    begun = [
        subprocess.Popen([sys.executable, "-c", WORK], env=environment, stdin=pipe, stdout=pipe, text=True)
        for _ in range(programs)
    ]
    for program in begun:
        assert program.stdout is not None and program.stdout.readline() == "ready\n"
    for program in begun:
        assert program.stdin is not None
        program.stdin.write(f"{seconds}\n")
        program.stdin.flush()
    return [float(program.communicate()[0]) for program in begun]


def main() -> None:
    """Measure all cases in turns, because machines are shared, and record the median of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each case in each round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    cases = {
        f"{name}_{policy.lower()}": (programs, threads, policy)
        for policy in ("ACTIVE", "PASSIVE")
        for name, programs, threads in (("alone", 1, cores), ("two_at_once", 2, cores), ("one_a_core", cores, 1))
    }
    found: dict[str, list[list[float]]] = {name: [] for name in cases}
    with records.Timer() as timer:
        for _ in range(given.rounds):
            for name, case in cases.items():
                found[name].append(rates(*case, given.seconds))
    each = {name: median(rate for turn in turns for rate in turn) for name, turns in found.items()}
    together = {name: median(sum(turn) for turn in turns) for name, turns in found.items()}
    metrics = {f"rows_per_second_{name}": together[name] for name in cases}
    for policy in ("active", "passive"):
        metrics[f"share_of_alone_{policy}"] = each[f"two_at_once_{policy}"] / each[f"alone_{policy}"]
        metrics[f"speedup_one_a_core_{policy}"] = together[f"one_a_core_{policy}"] / together[f"alone_{policy}"]
    records.record(
        "threads",
        dataset="phantom",
        notebook="benchmarks/threads.py",
        parameters=vars(given) | {"cores": cores, "rows": ROWS},
        seed=0,
        metrics=metrics,
        model="phantom-sd",
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
