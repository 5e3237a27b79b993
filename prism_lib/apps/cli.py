"""Run the notebooks of a profile in order: the `prism` command.

Everything that can be wrong with what is asked is found before the first notebook starts
(`apps.profiles`). Executed copies and the state that `--resume` reads are left in `runs/<name>/`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_lib import paths
from prism_lib.apps.profiles import Job, UsageError, available_profiles, load_profile, one_line, plan
from prism_lib.files import write_text

if TYPE_CHECKING:
    from prism_lib.apps.bulk_plan import BulkConfig


class NotebookFailedError(RuntimeError):
    """A notebook stopped; the message says which, where and why."""


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Run the jobs in order into ``folder`` and return the seconds of each; the first failure stops the run.

    With ``resume``, notebooks at the front whose key stands in the folder's state are not run again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = _State(folder / "state.json")
    seconds: dict[str, float] = {}
    for number, job in enumerate(jobs, 1):
        head = f"[{number}/{len(jobs)}] {job.name}"
        if resume and not seconds and state.finished(job):
            report(f"{head}: unchanged since it last ran, skipped")
            continue
        report(head)
        state.forget_from(job)
        start = time.perf_counter()
        execute(job, folder)
        seconds[job.name] = time.perf_counter() - start
        state.finish(job, seconds[job.name])
        report(f"{head}: {seconds[job.name]:.1f} s")
    return seconds


def execute(job: Job, folder: Path) -> None:
    """Execute one notebook with papermill, in a kernel of this interpreter; its copy goes to ``folder``."""
    target = folder / job.notebook.name
    with _kernel(job.notebook.parent) as kernel:
        import papermill  # it takes a second, in which the kernel starts
        from nbclient.exceptions import DeadKernelError

        try:
            papermill.execute_notebook(
                job.notebook,
                target,
                dict(job.parameters),
                kernel_name="python3",
                language="python",
                progress_bar=sys.stderr.isatty(),
                km=kernel,
            )
        except papermill.PapermillExecutionError as error:
            source = [line for line in error.source.splitlines() if line.strip()][:3]
            cell = "\n".join(f"    {line}" for line in source)
            reason = f"{error.ename}: {error.evalue}"
            raise NotebookFailedError(f"{job.name} failed in this cell:\n{cell}\n{reason}\nsee {target}") from None
        except DeadKernelError:
            reason = "the kernel died, most often for want of memory"
            raise NotebookFailedError(f"{job.name}: {reason}\nsee {target}") from None


@contextmanager
def _kernel(cwd: Path) -> Iterator[Any]:
    """A kernel of *this* interpreter, whatever kernels are installed or none at all, while the block runs."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.utils import run_sync

    # Without folders of kernels there is the one of this interpreter.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    # The level: else every notebook begins with a warning that its kernel listens without encryption.
    arguments = ["--IPKernelApp.log_level=CRITICAL", "--HistoryManager.hist_file=:memory:"]
    run_sync(kernel.start_kernel)(cwd=str(cwd), env=os.environ | quiet, extra_arguments=arguments)
    try:
        yield kernel
    finally:
        run_sync(kernel.shutdown_kernel)(now=True)


class _State:
    """Which notebooks finished with which key: `state.json` of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none, or damaged: nothing is known to be finished
            content = {}
        self.done: dict[str, dict[str, Any]] = content if isinstance(content, dict) else {}

    def finished(self, job: Job) -> bool:
        copy = self.path.parent / job.notebook.name
        return self.done.get(job.name, {}).get("key") == job.key and copy.is_file()

    def forget_from(self, job: Job) -> None:
        """A notebook that runs again makes stale whatever came after it."""
        self.done = {name: entry for name, entry in self.done.items() if name < job.name}
        self._write()

    def finish(self, job: Job, seconds: float) -> None:
        self.done[job.name] = {"key": job.key, "seconds": round(seconds, 1)}
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.done, indent=2) + "\n")


# --- the command ----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line of `prism`."""
    parser = argparse.ArgumentParser(
        prog="prism", description="Run PRISM's notebooks, or make counterfactuals in bulk."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the notebooks of a profile in order")
    run.add_argument("profile", metavar="PROFILE")
    run.add_argument("--from", dest="start", metavar="NN", help="the first notebook to run")
    run.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NN", help="run these notebooks and no others"
    )
    run.add_argument("--resume", action="store_true", help="skip what finished and has not changed")
    run.add_argument("--name", help="the run's folder under runs/ (default: from the profile and -p)")
    run.add_argument(
        "-p", nargs=2, action="append", default=[], dest="overrides", metavar=("NAME", "VALUE"),
        help="another value for a parameter; figures then go to the run's own folder",
    )  # fmt: skip
    generate = verbs.add_parser("generate", help="make counterfactuals in bulk; the same command goes on after a stop")
    generate.add_argument("--data", required=True, metavar="FOLDER", help="a prepared folder of images")
    generate.add_argument("--edits", required=True, metavar="FILE", help="CSV, JSON or YAML, a row per edit")
    generate.add_argument("--out", required=True, metavar="FOLDER", help="where images and metadata.csv go")
    generate.add_argument("--processes", type=int, default=0, metavar="N", help="default: one per GPU, or per CPU core")
    generate.add_argument("--check", action="store_true", help="check everything, say how many, and make nothing")
    generate.add_argument(
        "-p", nargs=2, action="append", default=[], dest="overrides", metavar=("NAME", "VALUE"),
        help="another setting: split, model, method, num_inference_steps, bits, guidance_scale, ...",
    )  # fmt: skip
    verbs.add_parser("profiles", help="list the profiles")
    figures = verbs.add_parser("figures", help="do the committed tables, figures and README follow from the records?")
    figures.add_argument("--check", action="store_true", required=True, help="say what does not, and fail")
    figures.add_argument("dataset", nargs="*", metavar="DATASET", help="folders below figures/ (default: all)")
    verbs.add_parser("doctor", help="check this machine: versions, device, weights, write access, disk")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The `prism` command; 0 on success, 1 if a notebook or a check failed, 2 if it could not start."""
    options = build_parser().parse_args(arguments)
    try:
        if options.verb == "profiles":
            for name in available_profiles():
                print(f"{name:<10} {load_profile(name).description}")
            return 0
        if options.verb == "figures":
            return _check_figures(options.dataset)
        if options.verb == "doctor":
            from prism_lib.apps import doctor  # it imports torch's device and every version

            return doctor.report(print)
        return _generate(options) if options.verb == "generate" else _run(options)
    except (UsageError, OSError) as error:
        print(f"prism: {error}", file=sys.stderr)
        return 2


def _generate(options: argparse.Namespace) -> int:
    from prism_lib.apps import bulk_plan  # it imports torch

    try:
        config = bulk_plan.BulkConfig(options.data, options.edits, options.out)
        config = bulk_plan.configured(config, [tuple(pair) for pair in options.overrides])
        planned = len(bulk_plan.plan(config))
    except ValueError as error:
        raise UsageError(one_line(error)) from None
    print(f"{planned} counterfactuals into {options.out}", flush=True)
    if options.check:
        return 0
    try:
        launch(config, options.processes)
    except (ValueError, RuntimeError, KeyboardInterrupt) as error:
        print(f"prism: {str(error) or 'interrupted; the same command goes on where it stopped'}", file=sys.stderr)
        return 1
    rejects = bulk_plan.REJECTS
    apart = f" that passed, {rejects} one for each other" if (Path(options.out) / rejects).is_file() else ""
    print(f"{bulk_plan.MANIFEST} in {options.out} has a row for each{apart}", flush=True)
    return 0


def launch(config: BulkConfig, processes: int) -> None:
    """`bulk.generate` in this process or in several; RuntimeError if one of them fails.

    0 processes stands for one per GPU, or without one for a process per CPU core, four at most. The processes end with
    this one. On CPUs the model is loaded once and they are forked from there, which halves the seconds that a start
    takes. They are spawned where a fork would break a GPU, a pool of threads, a compiler or the libraries of macOS.
    """
    import torch
    from torch import multiprocessing

    from prism_lib.apps.bulk_plan import config_json
    from prism_lib.devices import processes_for

    gpus = torch.cuda.device_count()
    processes = processes or gpus or processes_for()
    if processes == 1:
        from prism_lib.apps.bulk import generate

        generate(config)
        return
    write_text(Path(config.out) / "config.json", config_json(config))
    method, pipe = "spawn", None
    if not gpus and config.threads == 1 and not config.compile and sys.platform == "linux":
        from prism_lib.apps import bulk

        with bulk.threads(1):
            method, pipe = "fork", bulk.load_pipeline(config.model, config.precision, device="cpu")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        shared = (processes, port, config, pipe)
        multiprocessing.start_processes(_process, shared, nprocs=processes, start_method=method)
    except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
        reason = str(error).strip().splitlines()[-1]
        message = f"a process of the run failed: {reason}; the same command goes on where it stopped"
        raise RuntimeError(message) from error


def _process(index: int, processes: int, port: int, config: BulkConfig, pipe: Any) -> None:
    """One process of several, with the variables by which torch.distributed finds the others."""
    place: dict[str, object] = {
        "RANK": index,
        "LOCAL_RANK": index,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
    }
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": config.threads or 1}
    os.environ |= {name: str(value) for name, value in place.items()}
    from accelerate.state import AcceleratorState

    from prism_lib.apps.bulk import generate

    AcceleratorState._reset_state(reset_partial_state=True)  # a forked process has that of a run of one process
    generate(config, pipe)


def _check_figures(datasets: Sequence[str]) -> int:
    """Report which figures, tables and pages do not follow from the records; 1 if there are any."""
    from prism_lib.reporting.pages import check_figures  # it imports pandas

    folder = paths.root() / "figures"
    found = datasets or sorted(path.name for path in folder.iterdir() if any(path.glob("*.json")))
    problems = []
    for dataset in found:
        try:
            problems += check_figures(dataset, pages=dataset == "phantom")
        except ValueError as error:
            problems.append(str(error))
    for problem in problems:
        print(problem)
    again = f"{len(problems)} problems; `prism run PROFILE --only 07` writes all of it anew"
    print(f"figures of {', '.join(found)}: {again if problems else 'all follow from the records'}")
    return 1 if problems else 0


def _run(options: argparse.Namespace) -> int:
    profile = load_profile(options.profile)
    overrides = [tuple(pair) for pair in options.overrides]
    name = options.name or _run_name(profile.name, overrides)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"--name {name!r} cannot name a folder: letters, digits, '-', '_' and '.' only")
    folder = paths.runs() / name
    committed = profile.figures == "figures" and not overrides
    jobs = plan(
        profile,
        overrides,
        start=options.start,
        only=options.only,
        figures_dir=None if committed else folder / "figures",
    )
    where = "figures/" if committed else str(folder / "figures")
    print(f"{profile.name}: {len(jobs)} notebooks, copies in {folder}, figures in {where}", flush=True)
    try:
        seconds = run_jobs(jobs, folder, resume=options.resume, report=lambda line: print(line, flush=True))
    except (NotebookFailedError, KeyboardInterrupt) as error:
        print(f"prism: {str(error) or 'interrupted'}\nto go on: {_resume_command(options)}", file=sys.stderr)
        return 1
    print(f"{profile.name}: done in {sum(seconds.values()) / 60:.1f} min", flush=True)
    return 0


def _run_name(profile: str, overrides: Sequence[tuple[str, ...]]) -> str:
    """The profile's name, with a digest of the values of `-p`: the same trial finds its folder again."""
    if not overrides:
        return profile
    return f"{profile}-{hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:6]}"


def _resume_command(options: argparse.Namespace) -> str:
    words = ["prism", "run", options.profile, "--resume"]
    words += ["--from", options.start] if options.start else []
    words += ["--only", *options.only] if options.only else []
    words += ["--name", options.name] if options.name else []
    for name, value in options.overrides:
        words += ["-p", name, value]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
