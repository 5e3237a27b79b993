"""How long a person waits: `python -m benchmarks.explorer` writes figures/phantom/explorer.json.

The times in a browser need Chromium and Playwright (`pip install '.[browser]'`).
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from playwright.sync_api import Locator, Page, sync_playwright

from prism_lib import records
from prism_lib.apps import Session
from prism_lib.paths import SHIPPED

ROUNDS, PATIENTS, STEPS = 5, 4001, 12

# What `00_quickstart` does until its first counterfactual, in a fresh interpreter.
FIRST = """
from prism_lib.apps import explore
panel = explore({model!r}, {judge!r})
edit = panel.session.edit(remove=["Support Devices"])
panel.session.run([panel.session.recipe(edit, steps={steps})], edit)
"""


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--judge", default="phantom-judge")
    options = parser.parse_args()
    with records.Timer() as timer:
        metrics = _waiting(options.model, options.judge) | _in_a_browser(options.model, options.judge)
    records.record(
        "explorer",
        dataset="phantom",
        notebook="benchmarks/explorer.py",
        parameters={"rounds": ROUNDS, "steps": STEPS, "judge": options.judge},
        seed=PATIENTS,
        metrics=metrics,
        model=options.model,
        seconds=timer.seconds,
    )


def _waiting(model: str, judge: str) -> dict[str, float]:
    """Seconds to the first counterfactual in a fresh interpreter, per edit, to its preview, and to stop."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST.format(model=model, judge=judge, steps=STEPS)],
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
        planned = session.recipe(edit, steps=STEPS)
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
        [session.recipe(edit, steps=STEPS)], edit,
        progress=lambda share: under_way.set(), preview=lambda _: None, done=lambda *_: ended.set(),
    )  # fmt: skip
    under_way.wait()
    start = time.perf_counter()
    session.cancel()
    ended.wait()
    return time.perf_counter() - start


def _in_a_browser(model: str, judge: str) -> dict[str, float]:
    """Seconds from `prism explore` to the first counterfactual on screen; of a further edit; until it is cancelled."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    command = [
        sys.executable,
        "-m",
        "prism_lib.apps.cli",
        "explore",
        "--no-browser",
        "--model",
        model,
        "--judge",
        judge,
    ]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(600_000)
        begun = time.perf_counter()
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            page.goto(server.stdout.readline().split()[4])
            explorer = page.locator(".prism").first
            _button(explorer, "remove support devices").click()
            _button(explorer, "Run").click()
            explorer.get_by_text("result 1 of 1").wait_for()
            first = time.perf_counter() - begun
            explorer.locator("select").filter(has_text="automatic").select_option("off")
            start = time.perf_counter()
            _drawn(page, lambda: _button(explorer, "Run").click())
            preview = time.perf_counter() - start
            explorer.get_by_text("result 2 of 2").wait_for()
            further = time.perf_counter() - start
            explorer.locator("select").filter(has_text="off").first.select_option("automatic")
            _drawn(page, lambda: _button(explorer, "Run").click())
            start = time.perf_counter()
            _button(explorer, "Cancel").click()
            explorer.get_by_text("Cancelled.").wait_for()
            cancel = time.perf_counter() - start
        finally:
            server.terminate()
            server.wait(60)
            browser.close()
    return {
        "browser_seconds_to_first_counterfactual": first,
        "browser_seconds_per_edit": further,
        "browser_seconds_to_preview": preview,
        "browser_seconds_to_cancel": cancel,
    }


def _button(explorer: Locator, words: str) -> Locator:
    return explorer.locator("button", has_text=re.compile(rf"^\s*{words}\s*$")).first


def _drawn(page: Page, act: Callable[[], None]) -> None:
    """Act, and wait until the large picture is another."""
    canvas = page.locator(".prism-large canvas")
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    act()
    while canvas.evaluate("canvas => canvas.toDataURL()") == before:
        page.wait_for_timeout(20)


if __name__ == "__main__":
    main()
