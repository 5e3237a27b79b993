"""Start a bulk run in as many processes as it is worth.

Apart from `prism_lib.bulk`: the launcher only plans, so it spares the imports of diffusers and transformers, which
every process of the run makes for itself. In a run of some minutes over many processes those seconds count.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from prism_lib.bulk_plan import BulkConfig, config_json, plan
from prism_lib.results import write_text


def launch(config: BulkConfig, processes: int) -> None:
    """`bulk.generate` in this process, or by torchrun in several; RuntimeError if that fails.

    0 processes stands for one per GPU, or without one for a process per CPU core, four at most.
    """
    gpus = torch.cuda.device_count()
    processes = processes or gpus or min(os.cpu_count() or 1, 4)
    if processes == 1:
        from prism_lib.bulk import generate

        generate(config)
        return
    tasks = plan(config)  # what is wrong is said once, not by every process
    if any(task.settings.choice for task in tasks):
        from prism_lib.bulk import check_choices  # it loads what scores

        check_choices(tasks)
    path = write_text(Path(config.out) / "config.json", config_json(config))
    # Not `accelerate launch`: without GPUs it starts one process on one machine, whatever the number asked for.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | ({} if gpus else {"ACCELERATE_USE_CPU": "true"})
    if code := subprocess.run([*launcher, "-m", "prism_lib.bulk", str(path)], env=environment).returncode:
        raise RuntimeError(f"a process of the run ended with status {code}; the same command goes on where it stopped")
