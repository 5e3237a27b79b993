"""The explorer as a person meets it: JupyterLab, `prism explore` and Chromium for real, clicks and saved files.

Skipped, with the reason, where Chromium or Playwright is not installed. `PRISM_SCREENSHOTS` names a folder to look at
afterwards.
"""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from prism_lib import paths
from prism_lib.apps.recipe import Recipe
from prism_lib.phantom.patients import render, sample_patients

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SECONDS = 400  # for anything that waits for the kernel; a busy machine is slow
FILES = ("image", "original", "mask", "difference")
LARGE = ".prism-large canvas"
SHIPPED = paths.weights() / "phantom-sd" / "model_index.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.notebooks,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
    pytest.mark.skipif(not SHIPPED.is_file(), reason="the shipped weights are missing"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a folder with the quickstart's explorer, as (address, runs folder)."""
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[browser]'")
    folder, runs = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("runs")
    _only_the_explorer(folder / "quickstart.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {
        "PRISM_RUNS": str(runs), "PYTHONPATH": str(paths.root()), "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         "--IdentityProvider.token=", f"--notebook-dir={folder}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(address, server)
        yield address, runs
    finally:
        server.terminate()
        server.wait(30)


def _only_the_explorer(path):
    """00_quickstart up to the explorer: the rest of it runs under papermill elsewhere."""
    notebook = nbformat.read(paths.notebooks() / "00_quickstart.ipynb", as_version=4)
    last = next(i for i, cell in enumerate(notebook.cells) if "explore(MODEL" in cell.source)
    notebook.cells = notebook.cells[: last + 1]
    nbformat.write(notebook, path)


def _wait_until_up(address, server):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail("JupyterLab did not start")


@pytest.fixture
def page():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        page.set_default_timeout(SECONDS * 1000)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """`prism explore` on a folder with one image larger than both models, as (address, runs folder)."""
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[browser]'")
    folder, runs = tmp_path_factory.mktemp("films"), tmp_path_factory.mktemp("runs")
    Image.fromarray((render(sample_patients([1], 4001), 640)[0, 0] * 255).byte().numpy()).save(folder / "film.png")
    asked = tmp_path_factory.mktemp("browser") / "asked"  # a browser that only keeps the address it is given
    asked.with_name("browser").write_text(f'#!/bin/sh\necho "$1" > {asked}\n')
    asked.with_name("browser").chmod(0o755)
    environment = os.environ | {"PRISM_RUNS": str(runs), "PYTHONPATH": str(paths.root())}
    environment["BROWSER"] = f"{asked.with_name('browser')} %s"
    command = [sys.executable, "-m", "prism_lib.apps.cli", "explore", "--data", str(folder)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        assert re.fullmatch(r"The explorer is at http://127\.0\.0\.1:\d+/\?token=\w+ until you press Ctrl\+C\.\n", said)
        yield said.split()[4], runs, asked
    finally:
        server.terminate()
        server.wait(60)


def test_without_the_token_there_is_no_explorer(explored):
    address, _, asked = explored
    with urllib.request.urlopen(address.split("?")[0], timeout=60) as answer:
        assert "/login" in answer.url and b"prism" not in answer.read()
    opened = asked.read_text().strip()
    assert "token" not in opened, "every user of the machine sees it in the list of processes"
    server = http.client.HTTPConnection(urllib.parse.urlsplit(opened).netloc, timeout=60)
    for expected in (address, "/"):  # the address that the browser was given leads in once
        server.request("GET", urllib.parse.urlsplit(opened).path)
        answer = server.getresponse()
        answer.read()
        assert (answer.status, answer.headers["Location"]) == (302, expected)


def test_prism_explore_edits_a_film_of_a_folder_at_its_own_size(explored, page):
    address, runs, _ = explored
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.goto(address)
    explorer = page.locator(".prism").first
    explorer.get_by_text("Edited by phantom-sd.").wait_for()
    _nothing_is_cut_off(page)
    _look(page, "voila_1_start")
    explorer.locator("select").filter(has_text="by image").select_option("film-sd")
    _look(page, "voila_2_loading")
    explorer.get_by_text("Edited by film-sd.").wait_for()
    explorer.get_by_text("film-sd was measured for edits that remove support devices").wait_for()
    explorer.get_by_text("It resembles those of phantom-sd more").wait_for()
    _button(explorer, "Draw rectangle").click()
    _drag(page, (0.25, 0.125), (0.75, 0.875))
    explorer.get_by_text("frame: where the next edit may show").wait_for()
    chosen = explorer.locator("select").filter(has_text="rectangle").locator("option:checked")
    chosen.filter(has_text="rectangle").wait_for(state="attached")  # the kernel answers
    _button(explorer, "remove support devices").click()
    _button(explorer, "Run").click()
    explorer.get_by_text(re.compile(r"^Done in")).wait_for()
    explorer.get_by_text("result 1 of 1").wait_for()
    _nothing_is_cut_off(page)
    _look(page, "voila_3_done")
    with page.expect_download() as download:
        _button(explorer, "Export PNG").click()
    sheet = Image.open(download.value.path())
    assert sheet.size == (3 * 512 + 16, 30 + 512 + 52) and download.value.suggested_filename.startswith("film-png-")
    if os.environ.get("PRISM_SCREENSHOTS"):
        sheet.save(Path(os.environ["PRISM_SCREENSHOTS"]) / "export.png")
    _button(explorer, "Save").click()
    explorer.get_by_text("is the film at its own size").wait_for()
    (saved,) = runs.glob("explorer/*/full_size.png")
    assert Image.open(saved).size == (640, 640)
    image, original, mask = (np.asarray(Image.open(saved.with_name(f"{name}.png"))) for name in FILES[:3])
    np.testing.assert_array_equal(np.asarray(sheet.convert("L"))[30:542, :512], original)
    inside = np.zeros(mask.shape, bool)
    inside[63:449, 127:385] = True
    assert (mask[65:447, 129:383] == 255).all() and (mask[~inside] == 0).all()
    assert (image[~inside] == original[~inside]).all() and (image != original).any()
    page.set_viewport_size({"width": 800, "height": 1000})
    _nothing_is_cut_off(page)
    _look(page, "voila_4_narrow")


def test_an_own_file_is_uploaded_in_the_dark(explored, page, tmp_path):
    address, *_ = explored
    page.set_viewport_size({"width": 800, "height": 1000})
    page.goto(f"{address}&theme=dark")
    explorer = page.locator(".prism").first
    _button(explorer, "own file").click()
    with (tmp_path / "huge.png").open("wb") as huge:
        huge.truncate(66 * 2**20)  # more is too much for Playwright itself
    _upload(page, tmp_path / "huge.png")
    explorer.get_by_text("huge.png has 66 MB; at most 64 MB are read.").wait_for()
    Image.fromarray((render(sample_patients([2], 4001))[0, 0] * 255).byte().numpy()).save(tmp_path / "own.png")
    _upload(page, tmp_path / "own.png")
    explorer.get_by_text("own.png: not edited yet.").wait_for()
    assert "theme-dark" in page.locator("body").get_attribute("class")
    _nothing_is_cut_off(page)
    _look(page, "voila_5_dark")
    page.set_viewport_size({"width": 1280, "height": 1000})
    _nothing_is_cut_off(page)


def _upload(page, path):
    with page.expect_file_chooser() as chooser:
        _button(page.locator(".prism").first, r"upload \(\d\)").click()
    chooser.value.set_files(path)


def _drag(page, start, end):
    """With the mouse over the large picture, from and to these shares of its width and height."""
    page.locator(LARGE).scroll_into_view_if_needed()
    frame = page.locator(LARGE).bounding_box()
    for act, (x, y) in ((page.mouse.down, start), (page.mouse.up, end)):
        page.mouse.move(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"], steps=5)
        act()


def _pixels(page):
    return page.locator(LARGE).evaluate("canvas => canvas.toDataURL()")


def _becomes(page, test):
    """Wait until the large picture passes a test: it is decoded and drawn after the words beside it."""
    end = time.monotonic() + 60
    while not test(_pixels(page)):
        assert time.monotonic() < end, "the picture is another"
        page.wait_for_timeout(100)


def _nothing_is_cut_off(page):
    """Every control ends inside the window, and nothing is too narrow for its words."""
    page.wait_for_timeout(500)
    wide = "[...document.querySelectorAll('.prism *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert page.evaluate(f"{wide}.map(e => e.className)") == []
    worded = "[...document.querySelectorAll('.prism :is(button, label, b, span, select, .widget-html-content)')]"
    narrow = f"{worded}.filter(e => e.clientWidth && e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{narrow}.map(e => e.innerText)") == []


def test_a_person_removes_the_devices_and_saves(lab, page):
    address, runs = lab
    page.goto(f"{address}/lab/tree/quickstart.ipynb?reset")
    page.locator(".jp-NotebookPanel .jp-Notebook").first.wait_for()
    _refuse_offers(page)
    page.locator(".jp-StatusBar-Widget", has_text="| Idle").wait_for()  # without a kernel nothing would run
    _command(page, "Run", "Run All Cells")

    explorer = page.locator(".prism").first
    explorer.wait_for()
    remove = _button(explorer, "remove support devices")
    remove.wait_for()
    remove.scroll_into_view_if_needed()
    explorer.get_by_text("no result yet").wait_for()
    original, cells = _pixels(page), page.locator(".jp-Notebook .jp-Cell").count()
    assert page.locator(".jp-OutputArea", has_text="Loading").count() == 0
    assert page.locator(".jp-OutputArea .progress-bar").count() == 1, "the explorer's own, none of a library"
    _look(page, "1_start")

    remove.click()
    _button(explorer, "Run").click()
    explorer.get_by_text(re.compile(r"^Done in")).wait_for()
    explorer.get_by_text("result 1 of 1").wait_for()
    _becomes(page, lambda picture: picture != original)
    counterfactual = _pixels(page)
    _nothing_is_cut_off(page)
    _look(page, "2_done")

    page.locator(LARGE).click()
    page.keyboard.press("c")
    _becomes(page, lambda picture: picture != counterfactual)
    explorer.locator("b", has_text=re.compile("^original$")).wait_for()
    page.keyboard.press("c")
    _becomes(page, lambda picture: picture == counterfactual)
    explorer.locator("input[type=range]").fill("0.4")
    _becomes(page, lambda picture: picture not in (original, counterfactual))
    _look(page, "3_curtain")
    explorer.locator("input[type=range]").fill("1")
    page.locator(LARGE).focus()
    page.keyboard.press("z")
    _drag(page, (0.5, 0.25), (0.75, 0.5))
    explorer.get_by_text("4.0 ×").wait_for()
    _look(page, "4_zoom")
    page.keyboard.press("0")
    _becomes(page, lambda picture: picture == counterfactual)

    explorer.locator("select").filter(has_text="automatic").select_option("off")
    _button(explorer, "Run").click()
    explorer.get_by_text("result 2 of 2").wait_for()
    _becomes(page, lambda picture: picture != counterfactual)
    page.locator(LARGE).focus()
    page.keyboard.press("ArrowLeft")
    explorer.get_by_text("result 1 of 2").wait_for()
    _becomes(page, lambda picture: picture == counterfactual)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells, "the notebook took the keys for its own"

    _button(explorer, "Show code").click()
    explorer.get_by_text("recipe.run().image").wait_for()
    _button(explorer, "Save").click()
    explorer.get_by_text("Saved in").wait_for()
    (record,) = runs.glob("explorer/*/record.json")
    _check_saved(record)

    _command(page, "Settings", "Theme", "JupyterLab Dark")
    page.wait_for_timeout(1500)
    _nothing_is_cut_off(page)
    _look(page, "5_dark")


def _button(explorer, text):
    """By its words: an icon would be part of its accessible name."""
    return explorer.locator("button", has_text=re.compile(rf"^\s*{text}\s*$")).first


def _check_saved(record):
    """The files are what the record says, and the devices' pixels are all that changed."""
    recipe = Recipe(**json.loads(record.read_text())["recipe"])
    assert "without support devices" in recipe.target
    image, original, mask, difference = (np.asarray(Image.open(record.parent / f"{name}.png")) for name in FILES)
    assert image.shape == original.shape == mask.shape == difference.shape[:2]
    assert (image != original).any()
    assert (image[mask == 0] == original[mask == 0]).mean() > 0.999  # a mask below 1/510 is written as 0
    assert json.loads(record.read_text())["scores"]["true_error_ratio"] < 1


def _command(page, *menus):
    """Click through the menu bar."""
    for depth, name in enumerate(menus):
        kind = ".lm-MenuBar-itemLabel" if depth == 0 else ".lm-Menu-itemLabel"
        page.locator(kind, has_text=re.compile(f"^{name}$")).first.click()


def _refuse_offers(page):
    """JupyterLab may ask whether to fetch news; the test declines."""
    no = page.get_by_role("button", name="No", exact=True)
    page.wait_for_timeout(1500)
    if no.count():
        no.first.click()


def _look(page, name):
    folder = os.environ.get("PRISM_SCREENSHOTS", "")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png")
