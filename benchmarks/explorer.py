"""How long a person waits: `python -m benchmarks.explorer` writes figures/phantom/explorer.json."""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from prism_lib import records
from prism_lib.apps import Session
from prism_lib.paths import SHIPPED

ROUNDS, PATIENTS = 5, 4001

# What `00_quickstart` does until its first counterfactual, in a fresh interpreter.
FIRST = """
from prism_lib.apps import explore
panel = explore({model!r}, {judge!r})
edit = panel.session.edit(remove=["Support Devices"])
panel.session.run([panel.session.recipe(edit, steps=20)], edit)
"""


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--judge", default="phantom-judge")
    options = parser.parse_args()
    with records.Timer() as timer:
        metrics = _waiting(options.model, options.judge)
    records.record(
        "explorer",
        dataset="phantom",
        notebook="benchmarks/explorer.py",
        parameters={"rounds": ROUNDS, "steps": 20, "judge": options.judge},
        seed=PATIENTS,
        metrics=metrics,
        model=options.model,
        seconds=timer.seconds,
    )


def _waiting(model: str, judge: str) -> dict[str, float]:
    """Seconds to the first counterfactual in a fresh interpreter, per edit, to its preview, and to stop."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST.format(model=model, judge=judge)],
        check=True, env=os.environ | {"TQDM_DISABLE": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    first = time.perf_counter() - start
    session = Session.load(model, judge)
    edits: list[float] = []
    previews: list[float] = []
    for index in range(ROUNDS):
        case = session.open_phantom(PATIENTS, index)
        present = ["Support Devices"] if case.state("Support Devices") else []
        edit = session.edit(remove=present, add=[] if present else ["Support Devices"])
        planned = session.recipe(edit, steps=20)
        start = time.perf_counter()
        session.run([planned], edit, preview=_stopwatch(previews, start))
        edits.append(time.perf_counter() - start)
    return {
        "seconds_to_first_counterfactual": first,
        "seconds_per_edit": statistics.median(edits),
        "seconds_to_preview": statistics.median(previews),
        "seconds_to_cancel": _cancelling(session),
    }


def _stopwatch(times: list[float], start: float) -> Callable[[object], None]:
    """What notes the seconds since the start whenever it is called."""
    return lambda _: times.append(time.perf_counter() - start)


def _cancelling(session: Session) -> float:
    """Seconds from a cancel in mid-run until the session is free."""
    case = session.open_phantom(PATIENTS, 0)
    edit = session.edit(text="add cardiomegaly" if not case.state("Cardiomegaly") else "remove cardiomegaly")
    under_way, ended = threading.Event(), threading.Event()
    session.start(
        [session.recipe(edit, steps=20)], edit,
        progress=lambda share: under_way.set(), preview=lambda _: None, done=lambda *_: ended.set(),
    )  # fmt: skip
    under_way.wait()
    start = time.perf_counter()
    session.cancel()
    ended.wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
