"""Start a bulk run in as many processes as it is worth.

On CPUs the model is loaded once and the processes are forked from there: they share its weights, and the seconds that
libraries and weights take are spent once. With GPUs, which a forked process cannot use, torchrun starts them; the
launcher then only plans, and spares the imports of diffusers and transformers (so `apps.bulk` is imported late).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prism_lib.apps.bulk_plan import BulkConfig, config_json, plan
from prism_lib.devices import processes_for
from prism_lib.files import write_text

if TYPE_CHECKING:
    from prism_lib.apps.bulk import Ready

_AGAIN = "the same command goes on where it stopped"


def launch(config: BulkConfig, processes: int) -> None:
    """`bulk.generate` in this process or in several; RuntimeError if one of them fails.

    0 processes stands for one per GPU, or without one for a process per CPU core, four at most.
    """
    gpus = torch.cuda.device_count()
    processes = processes or gpus or processes_for()
    if processes == 1:
        from prism_lib.apps.bulk import generate

        generate(config)
    elif gpus or config.threads > 1 or config.compile or sys.platform != "linux":
        # What a fork would break: a GPU in use, a pool of threads, workers of the compiler, libraries of macOS.
        _torchrun(config, processes, {} if gpus else {"ACCELERATE_USE_CPU": "true"})
    else:
        _fork(config, processes)


def _torchrun(config: BulkConfig, processes: int, variables: dict[str, str]) -> None:
    tasks = plan(config)  # what is wrong is said once, not by every process
    if any(task.settings.choice for task in tasks):
        from prism_lib.apps.bulk import check_choices  # it loads what scores

        check_choices(tasks)
    path = write_text(Path(config.out) / "config.json", config_json(config))
    # Not `accelerate launch`: without GPUs it starts one process on one machine, whatever the number asked for.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "-m", "prism_lib.apps.bulk", str(path)]
    if code := subprocess.run(command, env=os.environ | variables).returncode:
        raise RuntimeError(f"a process of the run ended with status {code}; {_AGAIN}")


def _fork(config: BulkConfig, processes: int) -> None:
    from torch import multiprocessing

    from prism_lib.apps import bulk

    with bulk.threads(1), tempfile.TemporaryDirectory() as meeting:
        ready = bulk.prepare(config, torch.device("cpu"))
        write_text(Path(config.out) / "config.json", config_json(config))
        shared = (processes, f"file://{meeting}/store", config, ready)
        try:
            multiprocessing.start_processes(_forked, shared, nprocs=processes, start_method="fork")
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"a process of the run failed: {reason}; {_AGAIN}") from error


def _forked(index: int, processes: int, store: str, config: BulkConfig, ready: Ready) -> None:
    """One of the processes; what torchrun would tell it in variables, and a file where they find each other."""
    from accelerate.state import AcceleratorState, PartialState

    from prism_lib.apps import bulk

    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in place.items()}
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which knew of no others
    bulk.work(config, ready, PartialState(cpu=True, init_method=store))
