"""The `prism` command on small notebooks: all is checked before anything runs, a failure can be resumed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import nbformat
import pytest
import yaml

from prism_lib import paths
from prism_lib.apps import browser, cli, doctor
from prism_lib.apps.profiles import UsageError, coerce, load_profile, plan

PARAMETERS = """\
COUNT = 1  # how many
RATE = 0.5  # learning rate
LABEL = "none"  # a word
FIGURES_DIR = ""  # where figures go
"""
WRITE = """\
import json, os, sys
from pathlib import Path
folder = Path(FIGURES_DIR or "figures")
folder.mkdir(parents=True, exist_ok=True)
values = {"count": COUNT, "rate": RATE, "label": LABEL, "python": sys.executable, "cwd": os.getcwd()}
(folder / f"{LABEL}.json").write_text(json.dumps(values))"""
FAIL = """\
# the cell that fails
if not Path("fixed").exists():
    raise RuntimeError("no such thing")"""


def notebook(path, *cells):
    parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    content = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    content.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(content, path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Two notebooks, of which the second fails while its neighbour `fixed` is missing, and two profiles."""
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path / "runs"))
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    notebook(tmp_path / "notebooks" / "00_first.ipynb", WRITE)
    notebook(tmp_path / "notebooks" / "01_second.ipynb", "from pathlib import Path", FAIL, WRITE)
    profile(tmp_path, "tiny", {"00_first": {"LABEL": "a"}, "01_second": {"LABEL": "b", "RATE": "1e-4"}})
    return tmp_path


def profile(checkout, name, notebooks, figures="runs"):
    content = {"description": f"the {name} one", "figures": figures, "notebooks": notebooks}
    (checkout / "notebooks" / "profiles" / f"{name}.yaml").write_text(yaml.safe_dump(content))


def ran(folder):
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


# --- checks before anything runs ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no profile 'nowhere'; there are: tiny"),
        (["tiny", "-p", "RATES", "1"], "no selected notebook has a parameter 'RATES'; did you mean 'RATE'?"),
        (["tiny", "-p", "02.RATE", "1"], "no selected notebook has a parameter '02.RATE'"),
        (["tiny", "-p", "COUNT", "four"], "COUNT takes int (such as 1), not 'four'"),
        (["tiny", "-p", "COUNT", "1.5"], "COUNT takes int"),
        (["tiny", "--from", "7"], "no notebook '7' in this profile; it has 00_first, 01_second"),
        (["tiny", "--only", "00", "--from", "01"], "leave no notebook to run"),
    ],
)
def test_a_wrong_command_is_one_line_and_starts_nothing(checkout, capsys, arguments, message):
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (checkout / "runs").exists()


@pytest.mark.parametrize(
    ("notebooks", "message"),
    [
        ({"00_first": {"RATTE": 1}}, "00_first has no parameter 'RATTE'; did you mean 'RATE'?"),
        ({"00_frist": {}}, "no notebook 00_frist; did you mean '00_first'?"),
        ({"00_first": {"COUNT": True}}, "COUNT takes int"),
        ({"00_first": [1]}, "section 00_first must be a mapping"),
        ({}, "has no notebooks"),
    ],
)
def test_a_wrong_profile_is_found(checkout, notebooks, message):
    profile(checkout, "wrong", notebooks)
    with pytest.raises(UsageError) as error:
        plan(load_profile("wrong"))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "a: 1", "description: x\nfigures: elsewhere\nnotebooks: {}"])
def test_a_profile_of_another_form_is_named(checkout, text):
    (checkout / "notebooks" / "profiles" / "odd.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"odd\.yaml"):
        load_profile("odd")


def test_a_damaged_notebook_is_named(checkout):
    (checkout / "notebooks" / "00_first.ipynb").write_text("{")
    with pytest.raises(UsageError, match=r"00_first\.ipynb"):
        plan(load_profile("tiny"))


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        ("1e-4", 0.5, 1e-4),
        (3, 0.5, 3.0),
        ("007", "x", "007"),
        (7, "x", "7"),
        ("true", False, True),
        ("[a, b]", ["c"], ["a", "b"]),
        ("(1, 2)", [3], [1, 2]),
        ("0.5", None, 0.5),
        ("words", None, "words"),
    ],
)
def test_values_take_the_type_of_the_default(value, default, expected):
    result = coerce("NAME", value, default)
    assert result == expected
    assert type(result) is type(expected)


def test_a_trial_never_writes_committed_figures(checkout):
    profile(checkout, "full", {"00_first": {}}, figures="figures")
    (job,) = plan(load_profile("full"))
    assert "FIGURES_DIR" not in job.parameters
    (job,) = plan(load_profile("full"), [("COUNT", "2")], figures_dir=checkout / "runs" / "x" / "figures")
    assert job.parameters == {"COUNT": 2, "FIGURES_DIR": str(checkout / "runs" / "x" / "figures")}
    path = checkout / "notebooks" / "00_first.ipynb"
    path.write_text(path.read_text().replace("FIGURES_DIR = ", "ELSEWHERE = "))
    with pytest.raises(UsageError, match="FIGURES_DIR"):
        plan(load_profile("full"), figures_dir=checkout)


def test_a_parameter_may_be_given_to_one_notebook(checkout):
    given = [("COUNT", "2"), ("01.COUNT", "3"), ("00.LABEL", "c")]
    first, second = (job.parameters for job in plan(load_profile("tiny"), given))
    assert first == {"COUNT": 2, "LABEL": "c"} and second == {"COUNT": 3, "LABEL": "b", "RATE": 1e-4}


def test_keys_follow_parameters_notebook_and_what_comes_before(checkout):
    def keys(*overrides):
        return [job.key for job in plan(load_profile("tiny"), overrides)]

    before = keys()
    assert keys() == before
    first, second = keys(("COUNT", "2"))
    assert first != before[0]
    assert second != before[1]
    notebook(checkout / "notebooks" / "01_second.ipynb", "changed = True")
    after = keys()
    assert after[0] == before[0]
    assert after[1] != before[1]


# --- runs -----------------------------------------------------------------------------------------


def test_a_failure_is_explained_and_resumed(checkout, capsys, monkeypatch):
    foreign = checkout / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {
        "argv": ["/nowhere/python", "-f", "{connection_file}"],
        "display_name": "another",
        "language": "python",
    }
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(checkout / "jupyter"))

    assert cli.main(["run", "tiny"]) == 1
    output = capsys.readouterr()
    for part in ("01_second failed", "# the cell that fails", "RuntimeError: no such thing"):
        assert part in output.err
    assert "prism run tiny --resume" in output.err
    folder = checkout / "runs" / "tiny"
    values = ran(folder / "figures")
    assert set(values) == {"a"}
    assert values["a"]["python"] == sys.executable  # not the kernel that happens to be called python3
    assert values["a"]["cwd"] == str(checkout / "notebooks")
    assert (folder / "01_second.ipynb").is_file()  # the copy shows the traceback

    (checkout / "notebooks" / "fixed").touch()
    shutil.rmtree(folder / "figures")
    assert cli.main(["run", "tiny", "--resume"]) == 0
    assert "00_first: unchanged" in capsys.readouterr().out
    values = ran(folder / "figures")
    assert set(values) == {"b"}
    assert values["b"]["rate"] == 1e-4

    assert cli.main(["run", "tiny", "--resume"]) == 0
    assert capsys.readouterr().out.count("unchanged") == 2


def test_an_override_runs_in_its_own_folder(checkout, capsys):
    assert cli.main(["run", "tiny", "--only", "0", "-p", "COUNT", "7"]) == 0
    (folder,) = (checkout / "runs").iterdir()
    assert folder.name.startswith("tiny-")
    assert ran(folder / "figures")["a"]["count"] == 7
    assert "[1/1] 00_first: " in capsys.readouterr().out


def test_notebooks_may_be_named_one_by_one(checkout, monkeypatch):
    executed = []
    monkeypatch.setattr(cli, "execute", lambda job, folder: executed.append(job.name))
    cli.main(["run", "tiny", "--only", "01", "--only", "00"])
    assert executed == ["00_first", "01_second"]


def test_running_an_early_notebook_again_makes_later_ones_stale(checkout, monkeypatch):
    executed = []

    def execute(job, folder):
        executed.append(job.name)
        (folder / job.notebook.name).touch()

    monkeypatch.setattr(cli, "execute", execute)
    cli.main(["run", "tiny"])
    cli.main(["run", "tiny", "--only", "00"])
    cli.main(["run", "tiny", "--resume"])
    assert executed == ["00_first", "01_second", "00_first", "01_second"]
    (checkout / "runs" / "tiny" / "state.json").write_text("{")
    cli.main(["run", "tiny", "--resume", "--from", "01"])
    assert executed[4:] == ["01_second"]


def test_a_kernel_that_dies_is_named(checkout, capsys):
    notebook(checkout / "notebooks" / "00_first.ipynb", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert cli.main(["run", "tiny", "--only", "00"]) == 1
    assert "00_first: the kernel died" in capsys.readouterr().err


def test_a_signal_lets_the_notebook_save_and_ends_the_run_well(checkout, capsys):
    saves = "from pathlib import Path\nfrom prism_lib.files import Stopped, stop_asked\n"
    saves += f"with stop_asked() as asked:\n    Path({str(checkout)!r}, 'started').touch()\n    asked.wait(100)\n"
    saves += f"Path({str(checkout)!r}, 'saved').touch()\nraise Stopped(0)"
    for number in ("00_first", "01_second"):
        notebook(checkout / "notebooks" / f"{number}.ipynb", saves)

    def ask():
        while not (checkout / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert cli.main(["run", "tiny"]) == 0
    thread.join()
    said = capsys.readouterr()
    assert "stopped by a signal\nto go on: prism run tiny --resume" in said.err and "01_second" not in said.out
    assert (checkout / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("cli.main(['--help'])", {"numpy", "pandas", "papermill", "pydantic", "torch"}),
        ("cli.plan(cli.load_profile('phantom'))", {"numpy", "pandas", "papermill", "pydantic", "torch"}),
        ("cli._kernel('.').__enter__()", {"pandas", "papermill", "nbformat", "torch"}),
    ],
)
def test_the_command_imports_little_before_a_notebook_starts(command, absent):
    code = f"import sys\nfrom prism_lib.apps import cli\ntry:\n    {command}\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert absent.isdisjoint(done.stdout.split("\n")[-2].split()), done.stderr


def test_only_our_lines_are_printed_and_the_kernel_waits_without_spinning(checkout):
    shout = "import os, warnings; warnings.warn('shout'); print(os.environ['OMP_WAIT_POLICY'])"
    notebook(checkout / "notebooks" / "00_first.ipynb", shout)
    code = f"from pathlib import Path\nfrom prism_lib import paths\npaths.root = lambda: Path({str(checkout)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}from prism_lib.apps import cli\ncli.main(['run', 'tiny', '--only', '00'])"],
        capture_output=True, text=True, env=os.environ | {"OMP_WAIT_POLICY": "ACTIVE"},
    )  # fmt: skip
    assert done.stderr == ""
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "tiny",
        "[1/1] 00_first",
        "[1/1] 00_first",
        "tiny",
    ]
    outputs = nbformat.read(checkout / "runs" / "tiny" / "00_first.ipynb", as_version=4).cells[-1].outputs
    assert "PASSIVE" in [output.text.strip() for output in outputs if output.get("name") == "stdout"]


# --- the other verbs ------------------------------------------------------------------------------


def test_profiles_are_listed_with_their_line(checkout, capsys):
    assert cli.main(["profiles"]) == 0
    assert capsys.readouterr().out.split() == ["tiny", "the", "tiny", "one"]


def test_doctor_fails_on_missing_weights_only(checkout, capsys, monkeypatch):
    monkeypatch.setenv("PRISM_WEIGHTS", str(checkout / "weights"))
    assert cli.main(["doctor"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1
    assert "model_index.json" in failed[0]
    (checkout / "weights" / doctor.WEIGHTS).mkdir(parents=True)
    (checkout / "weights" / doctor.WEIGHTS / "model_index.json").write_text("{}")
    assert cli.main(["doctor"]) == 0


def test_doctor_compares_versions_with_the_lock(checkout):
    (checkout / "requirements.lock").write_text("# a comment\npyyaml==0.0.1\nnot-a-package-of-ours==1.0\n")
    assert "not-a-package-of-ours" in doctor._versions().detail
    (checkout / "requirements.lock").write_text("pyyaml==0.0.1\n")
    check = doctor._versions()
    assert "rather than 0.0.1" in check.detail
    assert not check.required


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "no/such/model"], "no/such/model is no diffusers pipeline"),
        (["--model", "nothere"], "there is no model 'nothere', here or below"),
        (["--data", "nowhere"], "there is no folder nowhere, neither here nor in"),
        (["--judge", "nobody"], "there is no judge 'nobody' in"),
        (["--judge", "film-sd"], "there is no judge 'film-sd' in"),
        (["--port", "USED"], "cannot be used: Address already in use\n"),
        (["--ip", "::1"], "port 0 of ::1 cannot be used: Address family for hostname not supported"),
    ],
)
def test_what_explore_cannot_start_with_is_said(capsys, words, said):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        assert cli.main(["explore", *(port if word == "USED" else word for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_without_a_browser_the_address_is_enough(monkeypatch):
    monkeypatch.setattr(browser.webbrowser, "open", lambda _: False)
    monkeypatch.setattr(browser._Server, "display_url", "http://127.0.0.1:1/?token=a")
    server, said = browser._Server(), []
    server.show, server.quiet = said.append, False
    server._open()
    assert said == ["There is no browser here: open that address in one."]
