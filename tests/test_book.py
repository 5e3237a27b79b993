"""The book's sources: outputs come from executed copies, nothing dead or private is shown, dead links are found."""

import base64

import nbformat
import pytest

from docs import book
from prism_lib import paths

PNG = base64.b64encode(b"a picture").decode()


def cell(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def display(**data):
    kinds = {"png": "image/png", "text": "text/plain", "widget": book.WIDGET}
    return nbformat.v4.new_output("display_data", {kinds[kind]: value for kind, value in data.items()})


def notebook(*cells):
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# 00 Title\n\n**Writes.** `quickstart.png`"), *cells]
    )


def executed(*cells, end="2026-01-01", exception=None):
    """A copy as papermill leaves it, with a cell of injected parameters."""
    injected = cell("A = 2")
    injected.metadata["tags"] = ["injected-parameters"]
    made = notebook(cells[0], injected, *cells[1:])
    made.metadata["papermill"] = {"output_path": "/x/runs/phantom/00.ipynb", "end_time": end, "exception": exception}
    return made


def outputs(page):
    return [output for one in page.cells if one.cell_type == "code" for output in one.outputs]


def test_a_notebook_takes_the_outputs_of_its_executed_copy():
    run = executed(cell("A = 1"), cell("show()", display(png=PNG)))
    page = book.merged(notebook(cell("A = 1"), cell("show()")), run, "00_title")
    assert [output.data["image/png"] for output in outputs(page)] == [PNG]
    assert book.first_picture(page) == (b"a picture", "png")


def test_widgets_become_their_picture_and_progress_bars_go():
    widget = {"model_id": "1"}
    said = nbformat.v4.new_output("stream", name="stderr", text="50%")
    run = executed(
        cell("show()", display(widget=widget, png=PNG, text="Box()"), display(widget=widget, text="0%"), said)
    )
    page = book.merged(notebook(cell("show()")), run, "00_title")
    (kept,) = outputs(page)
    assert book.WIDGET not in kept.data
    assert kept.data["image/png"] == PNG
    assert book.LIVE in page.cells[2].source


def test_paths_of_the_machine_are_not_shown():
    run = executed(cell("show()", display(text="'/x/runs/a.json'"), display(text=f"{paths.root()}/figures/b.json")))
    page = book.merged(notebook(cell("show()")), run, "00_title")
    assert [output.data["text/plain"] for output in outputs(page)] == ["'runs/a.json'", "figures/b.json"]


@pytest.mark.parametrize(
    ("run", "why"), [(None, "was not run"), (executed(cell("other()", display(png=PNG))), "has changed since")]
)
def test_a_notebook_that_was_not_run_says_so_and_shows_committed_pictures(run, why):
    page = book.merged(notebook(cell("show()")), run, "00_title")
    assert outputs(page) == []
    assert why in page.cells[1].source
    assert "(../figures/phantom/quickstart.png)" in page.cells[-1].source


@pytest.mark.parametrize("state", [{"end": None}, {"exception": True}], ids=str)
def test_a_run_that_did_not_end_is_refused(tmp_path, state):
    nbformat.write(executed(cell("show()"), **state), tmp_path / "00.ipynb")
    with pytest.raises(SystemExit, match="did not run to its end: run `make figures` again"):
        book.executed(tmp_path / "00.ipynb")


def test_without_executed_notebooks_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path))
    with pytest.raises(SystemExit, match="run `make figures` first"):
        book.main()


def test_every_notebook_gets_a_page_a_question_and_a_picture(tmp_path):
    shown = list(book.notebooks(tmp_path, tmp_path / "no_runs"))
    names = [path.stem for path in sorted(paths.notebooks().glob("*.ipynb"))]
    assert [name for name, *_ in shown] == names
    assert [name for name, question, _ in shown if not question.endswith("?")] == []
    assert sorted(path.stem for path in (tmp_path / "notebooks").iterdir()) == names


def test_dead_links_and_what_a_page_loads_from_elsewhere_are_found(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="here">a</h1><a href="#here"></a><a href="b.html#there"></a><a href="https://x.y/z"></a>'
        '<a href="#nowhere"></a><a href="no.html"></a><img src="no.png"><script src="https://cdn.x/y.js"></script>'
    )
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1><a href="index.html#gone"></a>')
    assert book.broken(tmp_path) == [
        "b.html: index.html#gone leads nowhere",
        "index.html: #nowhere leads nowhere",
        "index.html: loads https://cdn.x/y.js",
        "index.html: no.html leads nowhere",
        "index.html: no.png leads nowhere",
    ]
