"""Every notebook, found by glob: its form, its fit with the profiles, and one small run of all of them.

The rules of form are functions of a notebook, held against a notebook that breaks each of them, so that
they are known to work before any real notebook is looked at.
"""

import ast
import os
import re
import subprocess
import sys

import nbformat
import pytest

from prism_lib import data, evaluation, paths, training
from prism_lib.apps.profiles import FIGURES_PARAMETER, available_profiles, declared_parameters, load_profile, plan
from prism_lib.records import load_record
from tests import formats

NOTEBOOKS = sorted(paths.notebooks().glob("*.ipynb"))
MAX_LINES = 25
SMOKE_SECONDS = 600
UPPER = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
ABSOLUTE = re.compile(r"(?<![\w.:/])(/(home|root|Users|mnt|tmp|work|data|opt|var|scratch)/|~/|[A-Z]:\\)")


# --- rules of form: each yields what is wrong -----------------------------------------------------


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cells(notebook):
    return [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]


def form(notebook):
    if not notebook.cells or not notebook.cells[0].source.startswith("# "):
        yield "the first cell is no title"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    if len(parameters_cells(notebook)) != 1:
        yield f"{len(parameters_cells(notebook))} cells are tagged parameters, not one"


def stripped(notebook):
    for cell in code_cells(notebook):
        if cell.outputs or cell.execution_count is not None:
            yield f"outputs are kept: {head(cell)}"


def parameters(notebook):
    for cell in parameters_cells(notebook):
        lines = cell.source.splitlines()
        for statement in ast.parse(cell.source).body:
            text = ast.unparse(statement)
            if not (
                isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value
            ):
                yield f"no parameter with its type: {text}"  # which `papermill --help-notebook` shows
                continue
            if not UPPER.fullmatch(statement.target.id):
                yield f"not UPPER_SNAKE: {text}"
            try:
                ast.literal_eval(statement.value)
            except ValueError:
                yield f"no literal: {text}"
            if not re.search(r"\s# \S", lines[statement.end_lineno - 1]):
                yield f"no comment behind: {text}"


def thin(notebook):
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
        if len(lines) > MAX_LINES:
            yield f"{len(lines)} lines of code: {head(cell)}"
        for node in ast.walk(parsed(cell)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield f"defines {node.name}"


def no_absolute_paths(notebook):
    for cell in notebook.cells:
        found = ABSOLUTE.search(cell.source)
        if found:
            yield f"absolute path {found.group()}: {head(cell)}"


def parsed(cell):
    """The cell's syntax tree, without lines for IPython."""
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))))


def head(cell):
    return cell.source.strip().splitlines()[0] if cell.source.strip() else "(empty)"


RULES = [form, stripped, parameters, thin, no_absolute_paths]


# --- the rules hold against a notebook that breaks them -------------------------------------------


def build(*sources, tag=1):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if tag is not None:
        cells[tag].metadata["tags"] = ["parameters"]
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), *cells])
    content.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return content


GOOD = (
    "from prism_lib import CHEST",
    'SIZE: int = 256  # pixels\nDATA_ROOT: str = ""  # images',
    "f(SIZE, CHEST)",
)


def test_edits_of_every_notebook_may_be_sentences():
    sources = {path.stem: "\n".join(cell.source for cell in code_cells(nbformat.read(path, 4))) for path in NOTEBOOKS}
    takes = {name for name, source in sources.items() if re.search("^EDITS:", source, re.MULTILINE)}
    assert {name for name in takes if "Edit.read(edit" in sources[name]} == takes >= {"01_data", "03_counterfactuals"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_breaks_no_rule(rule):
    assert list(rule(build(*GOOD))) == []


@pytest.mark.parametrize(
    ("rule", "notebook", "problem"),
    [
        (form, build(*GOOD, tag=None), "0 cells are tagged parameters"),
        (parameters, build("", "SIZE: int = 256"), "no comment behind"),
        (parameters, build("", "SIZE = 256  # pixels"), "no parameter with its type"),
        (parameters, build("", "SIZE: int = 2 * n  # pixels"), "no literal"),
        (parameters, build("", "size: int = 256  # pixels"), "not UPPER_SNAKE"),
        (parameters, build("", "import os  # system"), "no parameter"),
        (thin, build("a = 1\n" * 26, "A = 1  # one"), "26 lines of code"),
        (thin, build("a = 1", "A: int = 1  # one\n" * 26), "26 lines of code"),
        (thin, build("def f():\n    pass", "A = 1  # one"), "defines f"),
        (no_absolute_paths, build('open("/home/me/x.png")', "A = 1  # one"), "absolute path /home/"),
        (no_absolute_paths, build("", 'A = "~/data"  # images'), "absolute path ~/"),
    ],
)
def test_a_rule_finds_what_breaks_it(rule, notebook, problem):
    assert [found for found in rule(notebook) if problem in found]


def test_outputs_and_counts_are_found():
    notebook = build(*GOOD)
    notebook.cells[1].execution_count = 3
    assert list(stripped(notebook)) == ["outputs are kept: from prism_lib import CHEST"]


# --- the notebooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    problems = [f"{rule.__name__}: {problem}" for rule in RULES for problem in rule(notebook)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_sees_every_parameter(path):
    """papermill reads lines, not syntax: a second `=` on a line, even in its comment, hides the parameter."""
    (cell,) = parameters_cells(nbformat.read(path, as_version=4))
    names = [statement.target.id for statement in ast.parse(cell.source).body]
    declared = declared_parameters(path)
    assert list(declared) == names
    assert declared[FIGURES_PARAMETER] == ""


@pytest.mark.parametrize("name", available_profiles())
def test_profile_fits_the_notebooks(name):
    profile = load_profile(name)
    if not profile.sections:
        pytest.skip(f"profile {name} has no section yet")
    assert [job.name for job in plan(profile)] == sorted(profile.sections)


def test_smoke_profile_runs_every_notebook_and_writes_no_figures():
    profile = load_profile("smoke")
    assert list(profile.sections) == [path.stem for path in NOTEBOOKS]
    assert profile.figures == "runs"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"subjct": "knee"}, "subjct"), ({"copies": 0}, "copies"), ({"size": 3}, "size"), ({"copies": 2}, "films")],
    ids=str,
)
def test_a_wrong_option_is_found_before_01_prepares(options, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_DATA", str(tmp_path))
    monkeypatch.setattr(data, "prepare", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises((TypeError, ValueError), match=message):
        execute(nbformat.read(NOTEBOOKS[1], as_version=4), {"OPTIONS": options})


@pytest.mark.parametrize("name", available_profiles())
def test_options_of_01_in_the_profiles_are_settings_that_exist(name):
    section = load_profile(name).sections["01_data"]
    config = data.PrepareConfig(section.get("DATASET", "phantom"), "out", "in", **section.get("OPTIONS", {}))
    assert config.screened in (None, paths.data() / "nih_devices.csv")


def test_01_counts_captions_that_02_would_refuse(tmp_path, monkeypatch, capsys):
    """Of a table with very many labels, of which all that are present are named."""
    monkeypatch.setenv("PRISM_DATA", str(tmp_path))
    named = {f"A finding of the left lower lobe, number {n}": [n % 2] * 10 for n in range(30)}
    for number in range(10):
        formats.save(formats.noise(number), tmp_path / "own" / f"{number}.png")
    formats.table(
        tmp_path / "own", "metadata.csv", file_name=[f"{n}.png" for n in range(10)], patient_id=range(10), **named
    )
    chosen = {"DATASET": "table", "DATA_ROOT": "own", "MODE": "L", "SIZE": 32, "VOCABULARY": "labels", "OUTPUT": "out"}
    chosen |= {"EDITS": ["remove_a_finding_of_the_left_lower_lobe_number_1"], "FIGURES_DIR": str(tmp_path / "figures")}
    execute(nbformat.read(NOTEBOOKS[1], as_version=4), chosen)
    (count,) = re.findall(
        r"^(\d+) captions and prompts have more tokens than phantom-sd reads$", capsys.readouterr().out, re.MULTILINE
    )
    assert int(count) >= 2


@pytest.mark.parametrize("options", [{"lora_rnk": 4}, {"schedule": "sawtooth"}, {"balance": "Edema"}], ids=str)
def test_a_wrong_option_is_found_before_02_trains_from_scratch(options, phantom_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path))
    monkeypatch.setattr(training, "start_from", lambda *_: pytest.fail("hours of work had begun"))
    (notebook,) = (path for path in NOTEBOOKS if path.stem.startswith("02"))
    chosen = {"MODEL": "scratch", "DATA": str(phantom_folder), "OPTIONS": options}
    with pytest.raises((TypeError, ValueError), match="|".join(map(str, (*options, *options.values())))):
        execute(nbformat.read(notebook, as_version=4), chosen)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [({"SUBGROUPS": ["scanner"]}, "no column 'scanner'"), ({"PLANTED": {}, "CLASSIFIERS": {}}, "are both empty")],
    ids=["subgroups", "classifiers"],
)
def test_what_07_cannot_study_is_found_before_a_classifier_is_trained(chosen, message, phantom_folder, monkeypatch):
    monkeypatch.setattr(evaluation, "load_judge", lambda *_, **__: pytest.fail("hours of work had begun"))
    small = {"DATA": str(phantom_folder), "IMAGES_PER_EDIT": 1, "SMALLEST_IMAGES": 1, "SPLIT": "train"}
    with pytest.raises((AssertionError, ValueError), match=message):
        execute(nbformat.read(NOTEBOOKS[7], as_version=4), small | chosen)


def execute(notebook, chosen):
    """Run the code cells here, with parameters chosen as papermill injects them."""
    names = {}
    for cell in code_cells(notebook):
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []):
            names.update(chosen)


def test_the_quickstart_does_not_promise_a_factor():
    """The factor of additions is the model's, from 1 to 2 by finding."""
    assert "twice" not in (paths.notebooks() / "00_quickstart.ipynb").read_text()


# --- one small run of all -------------------------------------------------------------------------


def committed_figures():
    return {path: path.stat().st_mtime_ns for path in (paths.root() / "figures").rglob("*")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of one run of the profile `smoke`, by the command a user types."""
    if not NOTEBOOKS:
        pytest.skip("there are no notebooks yet")
    runs, prepared = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data")
    before = committed_figures()
    finished = subprocess.run(
        [sys.executable, "-m", "prism_lib.apps.cli", "run", "smoke"],
        env=os.environ | {"PRISM_RUNS": str(runs), "PRISM_DATA": str(prepared), "PYTHONPATH": str(paths.root())},
        capture_output=True,
        text=True,
        timeout=SMOKE_SECONDS,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert committed_figures() == before
    lines = [line for line in finished.stdout.splitlines() if not re.match(r"\[\d/\d\] \d\d_|smoke: ", line)]
    assert lines == [] and finished.stderr == ""
    return runs / "smoke"


@pytest.mark.slow
@pytest.mark.notebooks
def test_smoke_run_executes_every_notebook(smoke):
    assert sorted(path.name for path in smoke.glob("*.ipynb")) == [path.name for path in NOTEBOOKS]
    for path in smoke.glob("*.ipynb"):
        cells = code_cells(nbformat.read(path, as_version=4))
        assert all(cell.execution_count is not None for cell in cells if cell.source.strip()), path.name
        text = str([cell.outputs for cell in cells])
        assert not re.search("torchvision|Loading pipeline|Loading weights", text), path.name


@pytest.mark.slow
@pytest.mark.notebooks
def test_smoke_run_leaves_whole_records(smoke):
    records = sorted((smoke / "figures").glob("*.json"))
    assert records, "no notebook left a record"
    for path in records:
        record = load_record(path.stem, "phantom", path.parent)
        assert record["name"] == path.stem
        assert record["notebook"] in {notebook.stem for notebook in NOTEBOOKS}
        assert record["metrics"]
        assert record["seconds"] > 0
