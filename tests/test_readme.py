"""The README keeps its word: its commands exist, its files exist, its quick start runs."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from prism_lib import paths
from prism_lib.apps import cli
from prism_lib.apps.profiles import available_profiles

README = paths.root() / "README.md"
FREE = {"git", "cd", "pip", "source", "export"}  # commands that name nothing of this repository
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""

pytestmark = pytest.mark.skipif(not TEXT, reason="there is no README.md")


def blocks(text, *languages):
    """The fenced code blocks of a language, in order."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands(text):
    joined = "\n".join(blocks(text, "bash", "sh", "console", "shell")).replace("\\\n", " ")
    lines = (shlex.split(line.removeprefix("$ "), comments=True) for line in joined.splitlines())
    return [words for line in lines for words in split(line) if words]


def split(words):
    """`a && b` is two commands; `NAME=value a` is one."""
    parts = [[]]
    for word in words:
        if word in ("&&", ";", "|"):
            parts.append([])
        elif parts[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            parts[-1].append(word)
    return parts


def problem(words):
    """What is wrong with a command, or nothing."""
    command, *arguments = words
    if command == "make":
        targets = set(re.findall(r"^([a-z]+):", (paths.root() / "Makefile").read_text(encoding="utf-8"), re.M))
        unknown = {word for word in arguments if "=" not in word} - targets
        return f"make has no {', '.join(sorted(unknown))}" if unknown else ""
    if command == "prism":
        try:
            options = cli.build_parser().parse_args(arguments)
        except SystemExit as stop:
            return "prism does not take this" if stop.code else ""
        if options.verb == "run" and options.profile not in available_profiles():
            return f"there is no profile {options.profile}"
        return ""
    if command == "conda":
        files = [word for word in arguments if word.endswith(".yml")]
        return "".join(f"there is no {name}" for name in files if not (paths.root() / name).is_file())
    return "" if command in FREE else f"{command} is no command of this repository"


def test_every_command_exists():
    problems = {" ".join(words): problem(words) for words in commands(TEXT)}
    assert problems, "the README shows no command"
    assert not {command: found for command, found in problems.items() if found}


@pytest.mark.parametrize(
    "line", ["make coffee", "prism fly", "prism run nowhere", "rm -rf x", "conda env create -f no.yml"]
)
def test_a_command_that_does_not_exist_is_found(line):
    (words,) = commands(f"```bash\n{line}  # a comment\n```\n")
    assert problem(words)


def test_every_linked_file_exists():
    targets = re.findall(r"\]\(([^)#\s]+)", TEXT) + re.findall(r'(?:src|href)="([^"#]+)"', TEXT)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert not [target for target in local if not (paths.root() / target).exists()]


@pytest.mark.slow
def test_quick_start_runs(tmp_path):
    quick_start = blocks(TEXT, "python")
    assert quick_start, "the README shows no Python"
    finished = subprocess.run(
        [sys.executable, "-c", quick_start[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(paths.root()), "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
