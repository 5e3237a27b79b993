"""The `prism` command: notebooks, with their copies and the state for `--resume` in `runs/<name>/`, or bulk runs."""

import argparse
import hashlib
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prism_lib import paths
from prism_lib.apps.profiles import Job, UsageError, available_profiles, load_profile, plan
from prism_lib.files import Stopped, stop_asked, stop_children, stop_now, write_text

if TYPE_CHECKING:
    from prism_lib.apps.bulk_plan import BulkConfig


def run_jobs(jobs: Sequence[Job], folder: Path, *, resume: bool = False) -> float:
    """Run the jobs in order and return the seconds; ``resume`` skips those at the front with their key in the state."""
    state, done, total = folder / "state.json", {}, 0.0
    with suppress(FileNotFoundError, ValueError, TypeError):  # none, or damaged: no notebook counts as finished
        done = dict(json.loads(state.read_text(encoding="utf-8")))
    for number, job in enumerate(jobs, 1):
        head = f"[{number}/{len(jobs)}] {job.name}"
        copy = folder / job.notebook.name
        if resume and not total and done.get(job.name, {}).get("key") == job.key and copy.is_file():
            print(f"{head}: unchanged since it last ran, skipped", flush=True)
            continue
        print(head, flush=True)
        # A notebook that runs again makes stale whatever came after it.
        done = {name: entry for name, entry in done.items() if name < job.name}
        write_text(state, json.dumps(done, indent=2) + "\n")
        start = time.perf_counter()
        execute(job, folder)
        seconds = time.perf_counter() - start
        done[job.name] = {"key": job.key, "seconds": round(seconds, 1)}
        write_text(state, json.dumps(done, indent=2) + "\n")
        print(f"{head}: {seconds:.1f} s", flush=True)
        total += seconds
    return total


def execute(job: Job, folder: Path) -> None:
    """Execute one notebook with papermill; its copy goes to ``folder``. RuntimeError says where it stopped and why."""
    target, reason = folder / job.notebook.name, ""
    with _kernel(job.notebook.parent) as kernel, stop_asked(stop_children) as asked:
        import papermill  # it takes a second, in which the kernel starts
        from nbclient.exceptions import DeadKernelError

        try:
            how = {"kernel_name": "python3", "language": "python", "progress_bar": sys.stderr.isatty(), "km": kernel}
            papermill.execute_notebook(job.notebook, target, dict(job.parameters), **how)
        except papermill.PapermillExecutionError as error:
            cell = [f"    {line}" for line in error.source.splitlines() if line.strip()][:3]
            reason = "\n".join([" failed in this cell:", *cell, f"{error.ename}: {error.evalue}"])
        except DeadKernelError:
            reason = ": the kernel died, most often for want of memory"
    if asked.is_set():
        raise Stopped(0)
    if reason:
        raise RuntimeError(f"{job.name}{reason}\nsee {target}")


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


def build_parser() -> argparse.ArgumentParser:
    """The command line of `prism`, as `commands.yaml` describes it."""
    parser = argparse.ArgumentParser("prism", description="Run PRISM's notebooks, or make counterfactuals in bulk.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, command in yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text(encoding="utf-8")).items():
        own = verbs.add_parser(verb, help=command["help"])
        for name, how in command.get("arguments", {}).items():
            if isinstance(how.get("default"), int | float):
                how["type"] = type(how["default"])
            if how.get("nargs") == 2:
                how["metavar"] = tuple(how["metavar"])
            own.add_argument(name, **how)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The `prism` command; 0 on success, 1 if a notebook or a check failed, 2 if it could not start."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(words)
    try:
        if options.verb == "profiles":
            for name in available_profiles():
                print(f"{name:<10} {load_profile(name).description}")
            return 0
        if options.verb == "figures":
            return _check_figures(options.dataset)
        if options.verb == "doctor":
            from prism_lib.apps import doctor  # it imports torch

            return doctor.report(print)
        if options.verb == "explore":
            from prism_lib.apps import browser  # it imports Voila

            browser.serve(options, partial(print, flush=True))
            return 0
        if options.verb == "tune":
            return _tune(options)
        return _generate(options) if options.verb == "generate" else _run(options, words)
    except (UsageError, OSError) as error:
        print(f"prism: {error}", file=sys.stderr)
        return 2


def _tune(options: argparse.Namespace) -> int:
    from optuna import logging

    from prism_lib.reporting import plots
    from prism_lib.studies import tuning  # it imports torch

    logging.set_verbosity(logging.WARNING)
    given = {name: value for name, value in vars(options).items() if name != "verb"}
    try:
        found = tuning.find_settings(tuning.TuningConfig(**given), partial(print, flush=True))
    except (ValueError, RuntimeError, KeyboardInterrupt) as error:
        raise UsageError(str(error) or "interrupted; the same command goes on where it stopped") from None
    figure = plots.curves(found.progress(), xlabel="trial", ylabel="least loss so far")
    plots.save_figure(figure, "tuning", found.folder)
    print(f"{found.folder}: editing.json, tuning.json, .csv and .png\nloss on images that the search did not see:")
    print(found.losses.to_string())
    return 0


def _generate(options: argparse.Namespace) -> int:
    from prism_lib.apps import bulk, bulk_plan, recipe  # they import torch
    from prism_lib.data.folder import load_info, load_vocabulary

    try:
        if options.processes < 0:
            raise ValueError(f"processes is {options.processes}: expected 0 or more")
        config = bulk_plan.configured(bulk_plan.BulkConfig(options.data, options.edits, options.out), options.overrides)
        tasks = bulk_plan.plan(config)
        if options.check:
            bulk.Chooser(tasks)
            bulk.named(config, tasks, bulk.load_pipeline(config.model, device="cpu"))
        else:
            bulk.check_place(config, tasks)
    except ValueError as error:
        raise UsageError(str(error)) from None
    vocab = load_vocabulary(config.data)
    notes = {note for task in tasks for note in (task.edit.note, recipe.unmeasured(config.model, task.edit, vocab))}
    if Path(config.model).name == paths.SHIPPED and load_info(config.data)["source"] != "phantom":
        notes.add(f"{config.model} was trained on phantoms alone; on films, `-p model {paths.FILMS}` removes devices.")
    made = f"{len(tasks)} counterfactuals by {config.model} into {options.out}"
    print(made, *sorted(filter(None, notes)), sep="\n", flush=True)
    if options.check:
        return 0
    try:
        with stop_asked(stop_now):
            launch(config, options.processes)
    except Stopped:
        print("prism: stopped by a signal; the same command goes on", file=sys.stderr)
        return 0
    except (ValueError, RuntimeError, KeyboardInterrupt) as error:
        print(f"prism: {str(error) or 'interrupted; the same command goes on where it stopped'}", file=sys.stderr)
        return 1
    rejects = bulk_plan.REJECTS
    apart = f" that passed, {rejects} one for each other" if (Path(options.out) / rejects).is_file() else ""
    print(f"{bulk_plan.MANIFEST} in {options.out} has a row for each{apart}", flush=True)
    return 0


def launch(config: "BulkConfig", processes: int) -> None:
    """`bulk.generate` in this process or in several (not under accelerate or torchrun); RuntimeError if one fails.

    0 is one per GPU (one where `PRISM_DEVICE` numbers it), or `processes_for`. CPU processes are forked with the model
    loaded, or spawned where a GPU or threads forbid it.
    """
    import torch
    from torch import multiprocessing

    from prism_lib.apps import bulk
    from prism_lib.devices import default_device, processes_for, threads

    place = default_device()
    gpus = 0 if place.type != "cuda" else torch.cuda.device_count() if place.index is None else 1
    processes = processes or gpus or processes_for()
    if processes == 1 or "RANK" in os.environ:
        bulk.generate(config)
        return
    method, pipe = "spawn", None
    if not gpus and config.threads == 1 and sys.platform == "linux":
        with threads(1):
            method, pipe = "fork", bulk.load_pipeline(config.model, config.precision, device="cpu")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with stop_asked(stop_children) as asked:
        try:
            shared = (processes, port, config, pipe)
            multiprocessing.start_processes(_process, shared, nprocs=processes, start_method=method)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            if not asked.is_set():  # else one was asked before it could listen
                reason = f"a process of the run failed: {str(error).strip().splitlines()[-1]}"
                raise RuntimeError(f"{reason}; the same command goes on where it stopped") from error
    if asked.is_set():
        raise Stopped(0)


def _process(index: int, processes: int, port: int, config: "BulkConfig", pipe: Any) -> None:
    """One process of several, with the variables by which torch.distributed finds the others."""
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(config.threads or 1)}
    from accelerate.state import AcceleratorState

    from prism_lib.apps.bulk import generate

    AcceleratorState._reset_state(reset_partial_state=True)  # a forked process has that of a run of one process
    with stop_asked(stop_now):
        generate(config, pipe)


def _check_figures(datasets: Sequence[str]) -> int:
    from prism_lib.reporting.tables import check_figures  # it imports pandas

    found = datasets or sorted(path.name for path in (paths.root() / "figures").iterdir() if any(path.glob("*.json")))
    problems = []
    for dataset in found:
        try:
            problems += check_figures(dataset, pages=dataset == "phantom")
        except ValueError as error:
            problems.append(str(error))
    again = f"{len(problems)} problems; `prism run PROFILE --only 08` writes all of it anew"
    print(*problems, f"figures of {', '.join(found)}: {again if problems else 'all follow from the records'}", sep="\n")
    return 1 if problems else 0


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    profile, overrides = load_profile(options.profile), options.overrides
    # The digest of the values of `-p`: the same trial finds its folder again.
    trial = f"-{hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:6]}" if overrides else ""
    folder = paths.runs() / f"{profile.name}{trial}"
    figures = None if profile.figures == "figures" and not overrides else folder / "figures"
    jobs = plan(profile, overrides, start=options.start, only=options.only, figures_dir=figures)
    print(f"{profile.name}: {len(jobs)} notebooks, copies in {folder}, figures in {figures or 'figures/'}", flush=True)
    try:
        seconds = run_jobs(jobs, folder, resume=options.resume)
    except (RuntimeError, KeyboardInterrupt, Stopped) as error:
        again = shlex.join(["prism", *words, *([] if options.resume else ["--resume"])])
        said = "stopped by a signal" if isinstance(error, Stopped) else str(error) or "interrupted"
        print(f"prism: {said}\nto go on: {again}", file=sys.stderr)
        return 0 if isinstance(error, Stopped) else 1
    print(f"{profile.name}: done in {seconds / 60:.1f} min", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
