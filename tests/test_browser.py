"""The explorer as a person meets it: JupyterLab, `prism explore` and Chromium for real, clicks and saved files.

Skipped, with the reason, where Chromium or Playwright is not installed. `PRISM_SCREENSHOTS` names a folder to look at
afterwards.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
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
    environment = os.environ | {"PRISM_RUNS": str(runs), "PYTHONPATH": str(paths.root())}
    command = [sys.executable, "-m", "prism_lib.apps.cli", "explore", "--no-browser", "--data", str(folder)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        assert re.fullmatch(r"The explorer is at http://127\.0\.0\.1:\d+/\?token=\w+ until you press Ctrl\+C\.\n", said)
        yield said.split()[4], runs
    finally:
        server.terminate()
        server.wait(60)


def test_without_the_token_there_is_no_explorer(explored):
    address, _ = explored
    with urllib.request.urlopen(address.split("?")[0], timeout=60) as answer:
        assert "/login" in answer.url and b"prism" not in answer.read()


def test_prism_explore_edits_a_film_of_a_folder_at_its_own_size(explored, page):
    address, runs = explored
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.goto(address)
    explorer = page.locator(".prism").first
    explorer.get_by_text("Edited by phantom-sd.").wait_for()
    _nothing_is_cut_off(page)
    _look(page, "voila_1_start")
    explorer.locator("select").filter(has_text="by image").select_option("film-sd")
    explorer.get_by_text("Edited by film-sd.").wait_for()
    explorer.get_by_text("film-sd was measured for one edit").wait_for()
    explorer.get_by_text("It resembles those of phantom-sd more").wait_for()
    _button(explorer, "remove support devices").click()
    _button(explorer, "Run").click()
    explorer.get_by_text(re.compile(r"^Done in")).wait_for()
    _button(explorer, "Save").click()
    explorer.get_by_text("is the film at its own size").wait_for()
    _look(page, "voila_2_done")
    (saved,) = runs.glob("explorer/*/full_size.png")
    assert Image.open(saved).size == (640, 640)
    page.set_viewport_size({"width": 800, "height": 1000})
    _nothing_is_cut_off(page)
    _look(page, "voila_3_narrow")


def test_an_own_file_is_uploaded_in_the_dark(explored, page):
    address, _ = explored
    page.set_viewport_size({"width": 800, "height": 1000})
    page.goto(f"{address}&theme=dark")
    explorer = page.locator(".prism").first
    _button(explorer, "own file").click()
    picture = io.BytesIO()
    Image.fromarray((render(sample_patients([2], 4001))[0, 0] * 255).byte().numpy()).save(picture, format="PNG")
    with page.expect_file_chooser() as chooser:
        _button(explorer, r"upload \(\d\)").click()
    chooser.value.set_files({"name": "own.png", "mimeType": "image/png", "buffer": picture.getvalue()})
    explorer.get_by_text("own.png: not edited yet.").wait_for()
    assert "theme-dark" in page.locator("body").get_attribute("class")
    _nothing_is_cut_off(page)
    _look(page, "voila_4_dark")


def _nothing_is_cut_off(page):
    """Every control ends inside the window, and no button is too narrow for its words."""
    page.wait_for_timeout(500)
    wide = "[...document.querySelectorAll('.prism *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert page.evaluate(f"{wide}.map(e => e.className)") == []
    narrow = "[...document.querySelectorAll('.prism button')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert page.evaluate(f"{narrow}.map(e => e.innerText)") == []


def test_a_person_removes_the_devices_and_saves(lab, page):
    address, runs = lab
    page.goto(f"{address}/lab/tree/quickstart.ipynb?reset")
    page.locator(".jp-NotebookPanel .jp-Notebook").first.wait_for()
    _refuse_offers(page)
    _command(page, "Run", "Run All Cells")

    explorer = page.locator(".prism").first
    explorer.wait_for()
    remove = _button(explorer, "remove support devices")
    remove.wait_for()
    remove.scroll_into_view_if_needed()
    picture = explorer.locator("img").first
    original = picture.get_attribute("src")
    _look(page, "1_start")

    remove.click()
    _button(explorer, "Run").click()
    explorer.get_by_text(re.compile(r"^Done in")).wait_for()
    counterfactual = picture.get_attribute("src")
    assert counterfactual != original
    _look(page, "2_done")

    handle = explorer.locator(".prism-slider .noUi-handle")
    handle.focus()
    for _ in range(12):
        page.keyboard.press("PageDown")
    page.wait_for_function("([image, was]) => image.src != was", arg=[picture.element_handle(), counterfactual])
    _look(page, "3_slider")

    _button(explorer, "Show code").click()
    explorer.get_by_text("recipe.run().image").wait_for()
    _look(page, "4_code")
    _button(explorer, "Save").click()
    explorer.get_by_text("Saved in").wait_for()
    (record,) = runs.glob("explorer/*/record.json")
    _check_saved(record)

    _command(page, "Settings", "Theme", "JupyterLab Dark")
    page.wait_for_timeout(1500)
    _look(page, "5_dark")


def _button(explorer, text):
    """By its words: an icon would be part of its accessible name."""
    return explorer.locator("button", has_text=re.compile(rf"^\s*{text}\s*$")).first


def _check_saved(record):
    """The files are what the record says, and the devices' pixels are all that changed."""
    recipe = Recipe.load(record)
    assert "without support devices" in recipe.target
    names = ("image", "original", "mask", "difference")
    image, original, mask, difference = (np.asarray(Image.open(record.parent / f"{name}.png")) for name in names)
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
