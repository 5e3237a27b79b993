"""README and docs keep their word: their commands exist, their links lead somewhere, their Python runs."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from urllib.parse import unquote

import nbformat
import pytest
from markdown_it import MarkdownIt

from prism_lib import paths
from prism_lib.apps import cli
from prism_lib.apps.profiles import available_profiles, load_profile, plan

ROOT = paths.root()
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CHANGELOG.md", "docs/*.md", "figures/*/README.md", "prism_lib/weights/*/README.md")
    for path in ROOT.glob(pattern)
)
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in paths.notebooks().glob("*.ipynb"))
FREE = {"git", "cd", "cp", "pip", "source", "export"}  # commands that name nothing of this repository
LAUNCHERS = {"accelerate", "torchrun", "python", "srun"}

pytestmark = pytest.mark.skipif("README.md" not in PAGES, reason="there is no README.md")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


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
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
        unknown = {word for word in arguments if "=" not in word} - targets
        return f"make has no {', '.join(sorted(unknown))}" if unknown else ""
    if command == "prism":
        return prism_problem(arguments)
    if command == "conda":
        files = [word for word in arguments if word.endswith(".yml")]
        return "".join(f"there is no {name}" for name in files if not (ROOT / name).is_file())
    if command in LAUNCHERS:
        modules = [word for flag, word in pairwise(arguments) if flag == "-m"]
        return "".join(f"there is no module {name}" for name in modules if not importlib.util.find_spec(name))
    return "" if command in FREE else f"{command} is no command of this repository"


def prism_problem(arguments):
    try:
        options = cli.build_parser().parse_args(arguments)
    except SystemExit as stop:
        return "prism does not take this" if stop.code else ""
    if options.verb != "run":
        return ""
    if options.profile not in available_profiles():
        return f"there is no profile {options.profile}"
    try:
        plan(load_profile(options.profile), options.overrides, start=options.start, only=options.only)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page):
    problems = {" ".join(words): problem(words) for words in commands(read(page))}
    assert problems or page != "README.md", "the README shows no command"
    assert not {command: found for command, found in problems.items() if found}


@pytest.mark.parametrize(
    "line",
    [
        "make coffee",
        "prism fly",
        "prism run nowhere",
        "prism run smoke -p COFFEE 1",
        "rm -rf x",
        "conda env create -f no.yml",
        "accelerate launch -m prism_lib.nowhere x.json",
    ],
)
def test_a_command_that_does_not_exist_is_found(line):
    (words,) = commands(f"```bash\n{line}  # a comment\n```\n")
    assert problem(words)


# --- links ----------------------------------------------------------------------------------------


def prose(page):
    """The Markdown of a page; of a notebook, its Markdown cells."""
    if not page.endswith(".ipynb"):
        return read(page)
    return "\n\n".join(cell.source for cell in nbformat.read(ROOT / page, 4).cells if cell.cell_type == "markdown")


def parsed(text):
    """Every token of a Markdown text, so that what stands in code is no link."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [part for token in tokens for part in (token, *(token.children or ()))]


def links(text):
    for token in parsed(text):
        yield from (str(token.attrs[name]) for name in ("href", "src") if name in token.attrs)
        if token.type in ("html_inline", "html_block"):
            yield from re.findall(r'(?:src|href)="([^"]+)"', token.content)


def anchors(text):
    """The anchors that GitHub gives the headings: lower case, hyphens for blanks, a number behind a repeated one."""
    tokens, found = parsed(text), []
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open":
            words = "".join(part.content for part in inline.children if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return {*found, *re.findall(r'(?:id|name)="([^"]+)"', text)}


def dead(text, page):
    """The relative links of a page that lead to no file, or to no heading of it."""
    for target in links(text):
        name, _, anchor = unquote(target).partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if re.match(r"[a-z]+:", target):
            continue
        if not path.exists():
            yield target
        elif anchor and path.suffix in (".md", ".ipynb"):
            there = text if not name else prose(path.resolve().relative_to(ROOT).as_posix())
            if anchor not in anchors(there):
                yield target


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_every_relative_link_leads_somewhere(page):
    assert not list(dead(prose(page), page))


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/nowhere.md)",
        "![a](figures/nowhere.png)",
        "[a](docs/results.md#nowhere)",
        "# Here\n\n[a](#there)",
        "| a |\n|---|\n| [a](nowhere.md) |",
        "[a][b]\n\n[b]: nowhere.md",
        '<img src="nowhere.png" alt="a">',
    ],
)
def test_a_dead_link_is_found(text):
    assert len(list(dead(text, "README.md"))) == 1


def test_a_link_that_leads_somewhere_is_left_alone():
    text = (
        "# What `prism` says: 1, 2\n\n[a](#what-prism-says-1-2) [b](docs/results.md) [c](https://x.y) `[d](nowhere.md)`"
    )
    assert not list(dead(text, "README.md"))


# --- names and code -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page), "python")])
def test_every_name_of_the_library_exists(page):
    for block in blocks(read(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "prism_lib":
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page}: {node.module} has no {', '.join(missing)}"


def test_every_module_that_the_architecture_names_exists():
    named = re.findall(r"`([a-z]+/\w+)`", read("docs/architecture.md"))
    assert named
    assert not [name for name in named if not (ROOT / "prism_lib" / f"{name}.py").is_file()]


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.slow
def test_quick_start_runs(tmp_path):
    quick_start = blocks(read("README.md"), "python")
    assert quick_start, "the README shows no Python"
    finished = subprocess.run(
        [sys.executable, "-c", quick_start[0]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
