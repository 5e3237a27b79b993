"""`prism doctor`: can this machine run the notebooks, and with the versions the figures were made with?"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

import prism_lib
from prism_lib import devices, paths, records
from prism_lib.files import existing

WEIGHTS, JUDGE = paths.SHIPPED, "phantom-judge"
FILM = ("film-sd/text_encoder/model", "film-kinds/model", "film-judge/model")
FREE_GB, MEMORY_GB = 5.0, 4.0


@dataclass(frozen=True)
class Check:
    """One line of the report, and what to do where it failed; one that is not required is a warning."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True


def report(show: Callable[[str], None]) -> int:
    """Show every check, with its remedy where it failed, and the sum; return 1 if a required one failed, else 0."""
    verdicts: Counter[str] = Counter()
    for check in checks():
        verdict = "ok" if check.ok else "FAILED" if check.required else "note"
        verdicts[verdict] += 1
        show(f"{verdict:<7} {check.name:<11} {check.detail}")
        if not check.ok:
            show(f"{'':<7} {'':<11} -> {check.remedy}")
    well = f"The notebooks run here{', and the notes above say what could be better' if verdicts['note'] else ''}."
    wrong = f"{verdicts['FAILED']} of these must be put right before the notebooks run; do what the arrows say."
    show(f"\n{wrong if verdicts['FAILED'] else well}")
    return int("FAILED" in verdicts)


def checks() -> Iterator[Check]:
    """The checks, one by one."""
    yield Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")
    for check in (_versions, _device, _threads, _memory, _torchvision):
        yield check()
    for name, file, or_else in (
        ("weights", f"{WEIGHTS}/model_index.json", ", or let PRISM_WEIGHTS name their folder"),
        ("judge", f"{JUDGE}/model.safetensors", "; without a judge edits have no flip rates"),
        *((file.split("/")[0], f"{file}.safetensors", "; without it films are not edited and judged") for file in FILM),
    ):
        detail = str(path) if (there := (path := paths.weights() / file).exists()) else f"no {path}"
        yield Check(name, there, detail, f"git checkout -- prism_lib/weights{or_else}", required=name == "weights")
    yield _writable("data", paths.data(), "PRISM_DATA can name another folder")
    yield _writable("runs", paths.runs(), "PRISM_RUNS can name another folder")
    yield _writable("figures", paths.root() / "figures", "take another checkout")
    free = shutil.disk_usage(existing(paths.runs())).free / 1e9
    remedy = "free some, or let PRISM_RUNS and PRISM_DATA name folders on a larger disk"
    yield Check("disk", free >= FREE_GB, f"{free:.0f} GB free, {FREE_GB:.0f} wanted", remedy, required=False)


def _device() -> Check:
    try:
        mixed = devices.mixed_precision("auto")
        gains = "gains nothing" if mixed == "no" else f"is {mixed}"
        return Check("device", True, f"{records.device()}; mixed precision {gains}")
    except (ValueError, RuntimeError, AssertionError) as error:  # the last is what a torch without CUDA raises
        return Check("device", False, str(error), "let PRISM_DEVICE name a device that is here, or unset it")


def _threads() -> Check:
    """Threads that wait by spinning take the cores from other processes, so from the second one of a bulk run."""
    policy = os.environ["OMP_WAIT_POLICY"]
    detail, remedy = f"{torch.get_num_threads()}, which wait without spinning", ""
    if policy.upper() != "PASSIVE":
        detail = f"OMP_WAIT_POLICY is {policy}: waiting threads spin"
        remedy = "unset OMP_WAIT_POLICY, or set it to PASSIVE"
    elif prism_lib.SET_TOO_LATE:
        detail = "OMP_WAIT_POLICY was not set when torch was loaded: waiting threads spin"
        remedy = "import prism_lib before torch, or set OMP_WAIT_POLICY=PASSIVE in the shell"
    return Check("threads", not remedy, detail, remedy, required=False)


def _memory() -> Check:
    free = psutil.virtual_memory().available / 1e9
    detail = f"{free:.0f} GB free, {MEMORY_GB:.0f} wanted"
    if torch.cuda.is_available():
        on_device, total = (size / 1e9 for size in torch.cuda.mem_get_info())
        detail += f"; GPU {on_device:.0f} of {total:.0f} GB free"
    remedy = "shut down other kernels, or pass smaller batches"
    return Check("memory", free >= MEMORY_GB, detail, remedy, required=False)


def _torchvision() -> Check:
    """A torchvision built for another torch breaks every package that looks for one; PRISM needs none."""
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", True, "not installed, and not needed")
    try:  # in a process of its own: a broken one can take the interpreter down
        subprocess.run([sys.executable, "-c", "import torchvision"], check=True, capture_output=True, timeout=120)
    except (subprocess.SubprocessError, OSError):
        detail = f"installed, but cannot be imported beside torch {torch.__version__}"
        return Check("torchvision", False, detail, f"{sys.executable} -m pip uninstall torchvision")
    return Check("torchvision", True, "installed and whole; PRISM does not need it")


def _versions() -> Check:
    lock = paths.root() / "requirements.lock"
    if not lock.is_file():
        return Check("versions", False, f"no {lock}", "install from a checkout to compare them", required=False)
    lines = lock.read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and line[0] != "#")
    missing, other = [], []
    for package, wanted in pinned.items():
        try:
            found = metadata.version(package).split("+")[0]  # the build, such as +cpu, is the machine's choice
            other += [f"{package} {found} rather than {wanted}"] if found != wanted else []
        except metadata.PackageNotFoundError:
            missing.append(package)
    remedy = f"{sys.executable} -m pip install --requirement {lock.name}"
    if missing:
        return Check("versions", False, f"not installed: {', '.join(missing)}", remedy)
    detail = ", ".join(other) or f"all {len(pinned)} packages as in {lock.name}"
    return Check("versions", not other, detail, remedy, required=False)


def _writable(name: str, folder: Path, remedy: str) -> Check:
    """Whether a file can be made in the folder, or in the nearest one above it that exists."""
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Check(name, True, str(folder))
    except OSError as error:
        return Check(name, False, f"{place} cannot be written: {os.strerror(error.errno or 0)}", remedy)
