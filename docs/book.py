"""The book: notebooks with their pictures, the pages of docs/ and the public names of each room as a static site.

`make book` runs this. It lays out the sources in build/book-sources as they lie in the checkout, so that every relative
link stays as it is, lets Sphinx make build/book of them, and checks every link of the result. A notebook's prose comes
from notebooks/ and its outputs from the copy that `prism run phantom` executed in runs/phantom. A notebook that was not
run, or has other code than its copy, is shown without outputs and with the committed pictures that it writes.
"""

from __future__ import annotations

import base64
import importlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbformat import NotebookNode

from prism_lib import paths

ROOT = paths.root()
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "docs/*.md",
    "figures/*/README.md",
    "figures/*/tables/*.md",
    "prism_lib/weights/*/README.md",
)
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = {"image/png": "png", "image/gif": "gif"}
INDEX = """# PRISM: what would this image look like if one finding were different?

PRISM edits medical images with Stable Diffusion and measures the edits against a known truth. The notebooks below are
shown with the outputs of a run. The [README](README.md) says how to install and run them, [results](docs/results.md)
what was measured, and [your data](docs/your-data.md) how to use your own images. PRISM is for research, not for
diagnosis.

## Notebooks

::::{{grid}} 1 2 2 3
:gutter: 2
{cards}
::::
"""
CARD = """
:::{{grid-item-card}} {name}
:link: notebooks/{name}
:link-type: doc
{picture}
{question}
:::
"""
TREE = """
```{{toctree}}
:hidden:
:caption: {caption}

{entries}
```
"""
BARE = "book-bare"  # the cell that says why a notebook has no outputs
LIVE = "The output is interactive where the notebook runs (`make lab`); this page has its picture."
LINK = re.compile(r'(?<=\]\()[^)\s]+(?=\))|(?<=src=")[^"]+(?=")')


# --- notebooks ------------------------------------------------------------------------------------


def code(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells as committed: without the parameters that papermill put in."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def still(output: NotebookNode) -> NotebookNode | None:
    """An output without what a static page cannot show: widgets become their picture, progress bars go."""
    if output.output_type == "stream" and output.name == "stderr":
        return None
    if WIDGET in output.get("data", {}):
        del output.data[WIDGET]
        if not PICTURES.keys() & output.data.keys():
            return None
    return output


def anonymous(notebook: NotebookNode, run: NotebookNode) -> None:
    """Take the folder of the checkout, here and where the notebook ran, out of every printed path."""
    ran = Path(run.metadata.get("papermill", {}).get("output_path") or ROOT / "runs" / "phantom" / "x.ipynb").parents[2]
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        texts = output.get("data", {}) if "data" in output else output
        for kind in [kind for kind in texts if kind.startswith("text")]:
            for folder in {f"{ran}/", f"{ROOT}/"}:
                texts[kind] = texts[kind].replace(folder, "")


def note(text: str, name: str) -> NotebookNode:
    """A cell with a remark of the book."""
    return nbformat.v4.new_markdown_cell(f":::{{note}}\n{text}\n:::", id=name)


def merged(source: NotebookNode, run: NotebookNode | None, name: str) -> NotebookNode:
    """The committed notebook with the outputs of its executed copy, or with the pictures that it wrote before."""
    source.metadata.pop("widgets", None)
    if run is not None and [cell.source for cell in code(run)] == [cell.source for cell in code(source)]:
        for cell, ran in zip(code(source), code(run), strict=True):
            kinds = [output.get("data", {}).keys() for output in ran.outputs]
            if any(WIDGET in shown and PICTURES.keys() & shown for shown in kinds):
                source.cells.insert(source.cells.index(cell) + 1, note(LIVE, f"{cell.id}-live"))
            cell.outputs = [output for output in map(still, ran.outputs) if output is not None]
            cell.execution_count = ran.execution_count
        anonymous(source, run)
        return source
    why = "was not run for this site" if run is None else "has changed since it was last run"
    text = f"The notebook {why}, so no outputs are shown. `prism run phantom --only {name[:2]}` runs it."
    source.cells.insert(1, note(text, BARE))
    pictures = "\n\n".join(f"![{path.stem}](../{path.relative_to(ROOT).as_posix()})" for path in written(source))
    if pictures:
        text = f"## Committed pictures\n\nAn earlier run of this notebook wrote these pictures.\n\n{pictures}"
        source.cells.append(nbformat.v4.new_markdown_cell(text, id="book-pictures"))
    return source


def written(notebook: NotebookNode) -> list[Path]:
    """The committed phantom pictures that the notebook's first cell names after "Writes"."""
    names = re.findall(r"`(\w+)(?:\.png|\.gif)?`", notebook.cells[0].source.partition("**Writes")[2])
    folder = ROOT / "figures" / "phantom"
    return [path for name in dict.fromkeys(names) for path in sorted(folder.glob(f"{name}.[pg][ni][gf]"))]


def executed(copy: Path) -> NotebookNode | None:
    """The copy that papermill ran to its end, if there is one."""
    if not copy.is_file():
        return None
    notebook = nbformat.read(copy, 4)
    run = notebook.metadata.get("papermill", {})
    if run.get("exception") or not run.get("end_time"):
        sys.exit(f"{copy} did not run to its end: run `make figures` again.")
    return notebook


def first_picture(notebook: NotebookNode) -> tuple[bytes, str] | None:
    """The first picture that a notebook shows, or one that it wrote before, and its format."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        for kind, ending in PICTURES.items():
            if kind in output.get("data", {}):
                return base64.b64decode(output.data[kind]), ending
    return next(((path.read_bytes(), path.suffix[1:]) for path in written(notebook)), None)


def notebooks(sources: Path, runs: Path) -> Iterator[tuple[str, str, str]]:
    """Write every notebook's page; its name, its question in the README, and its picture."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (sources / "notebooks").mkdir()
    (sources / "pictures").mkdir()
    for path in sorted(paths.notebooks().glob("*.ipynb")):
        page = merged(nbformat.read(path, 4), executed(runs / path.name), path.stem)
        nbformat.write(page, sources / "notebooks" / path.name)
        if page.cells[1].get("id") == BARE:
            print(f"{path.stem}: {page.cells[1].source.splitlines()[1]}")
        asked = re.search(rf"\[{path.stem}\]\([^)]*\) \| ([^|]+) \|", readme)
        picture = first_picture(page)
        if picture:
            (sources / "pictures" / f"{path.stem}.{picture[1]}").write_bytes(picture[0])
        title = page.cells[0].source.splitlines()[0].lstrip("# ")
        yield path.stem, asked.group(1) if asked else title, f"pictures/{path.stem}.{picture[1]}" if picture else ""


# --- pages ----------------------------------------------------------------------------------------


def pages(sources: Path) -> list[str]:
    """Copy the Markdown pages and every file that they link to; a linked folder becomes a page that lists it."""
    found = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    folders: set[Path] = set()
    for path in found:
        text = path.read_text(encoding="utf-8")
        if path.parent.name == "tables":
            text = f"---\norphan: true\n---\n\n# Table: {path.stem.replace('_', ' ')}\n\n{text}"
        put(
            sources / path.relative_to(ROOT),
            LINK.sub(lambda link, path=path: linked(link[0], path, sources, folders), drawn(text, path, sources)),
        )
    for folder in sorted(folders):
        listing(folder, sources)
    return [path.relative_to(ROOT).with_suffix("").as_posix() for path in found if path.parent.name != "tables"]


def put(path: Path, text: str) -> None:
    """Write a page and the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def linked(target: str, page: Path, sources: Path, folders: set[Path]) -> str:
    """The target of a relative link in the book, once the file behind it is copied."""
    path = (page.parent / target.partition("#")[0]).resolve()
    if re.match(r"[a-z]+:|#", target) or not path.is_relative_to(ROOT):
        return target
    if path.is_dir():
        folders.add(path)
        return f"{target.rstrip('/')}/index.md"
    if path.is_file() and path.suffix not in (".md", ".ipynb"):
        place = sources / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return target


def listing(folder: Path, sources: Path) -> None:
    """A page for a folder: its pictures, its tables and pages, its other files to download."""
    relative = folder.relative_to(ROOT).as_posix()
    lines = ["---", "orphan: true", "---", "", f"# `{relative}`", ""]
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".css", ".tex", ".pdf")
    )
    for path in files:
        if path.suffix != ".md":
            (sources / relative).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, sources / relative / path.name)
        lines.append(f"- [{path.name}]({path.name})")
    for path in files:
        if path.suffix in (".png", ".gif"):
            lines += ["", f"## {path.stem.replace('_', ' ')}", "", f"![{path.stem}]({path.name})"]
    if not (sources / relative / "index.md").exists():
        put(sources / relative / "index.md", "\n".join(lines) + "\n")


def drawn(text: str, path: Path, sources: Path) -> str:
    """Draw each Mermaid diagram, so that the page needs no script from elsewhere."""
    import mermaidx

    def picture(match: re.Match[str]) -> str:
        name = f"diagram_{path.stem.lower()}_{match.start()}.svg"
        mermaidx.render(match[1]).save(str(sources / name))
        (width,) = re.findall(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+)', (sources / name).read_text(encoding="utf-8"))[:1]
        up = "../" * len(path.relative_to(ROOT).parent.parts)
        return f"```{{image}} {up}{name}\n:alt: diagram\n:width: {min(float(width), 900):.0f}px\n```"

    return re.sub(r"^```mermaid\n(.*?)^```", picture, text, flags=re.MULTILINE | re.DOTALL)


# --- rooms ----------------------------------------------------------------------------------------


def rooms(sources: Path) -> list[str]:
    """A page a room: its docstring, then each public name with signature and docstring."""
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    for room in table:
        package = importlib.import_module(f"prism_lib.{room}")
        blocks = [f".. automodule:: {package.__name__}"]
        for name in sorted(package.__all__, key=str.lower):
            value, address = getattr(package, name), f"{package.__name__}.{name}"
            if isinstance(value, type):
                blocks.append(f".. autoclass:: {address}\n   :members:")
            elif isinstance(value, type(sys)):
                blocks.append(f".. automodule:: {address}\n   :members:\n   :ignore-module-all:")
            elif callable(value):
                blocks.append(f".. autofunction:: {address}")
            else:
                shown = ", ".join(value) if isinstance(value, Mapping) else f"``{value!r}``"
                blocks.append(f".. py:data:: {address}\n\n   {shown}")
        put(sources / "api" / f"{room}.md", f"# {room}\n\n```{{eval-rst}}\n" + "\n\n".join(blocks) + "\n```\n")
    return [f"api/{room}" for room in table]


# --- the whole ------------------------------------------------------------------------------------


def index(shown: list[tuple[str, str, str]], pages: list[str], rooms: list[str]) -> str:
    """The first page: a card a notebook, and the table of contents."""
    cards = "".join(
        CARD.format(
            name=name, question=question[0].upper() + question[1:], picture=f":img-top: {picture}\n" if picture else ""
        )
        for name, question, picture in shown
    )
    first = ["README", "docs/results", "docs/your-data"]
    contents = {
        "Notebooks": [f"{name.replace('_', ' ', 1)} <notebooks/{name}>" for name, *_ in shown],
        "Pages": ["README <README>", *first[1:], *(page for page in pages if page not in first)],
        "API of the subpackages": rooms,
    }
    trees = (TREE.format(caption=caption, entries="\n".join(entries)) for caption, entries in contents.items())
    return INDEX.format(cards=cards) + "".join(trees)


class Links(HTMLParser):
    """The links, scripts, pictures and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[tuple[str, str]] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and not value.startswith(("data:", "mailto:")):
                self.targets.append((tag, value))


def broken(folder: Path) -> list[str]:
    """Every link inside the site that leads nowhere, and everything that a page would load from elsewhere."""
    read = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}
    found = []
    for page, links in read.items():
        for tag, target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if tag != "a":
                    found.append(f"{page.relative_to(folder)}: loads {target}")
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not path.is_file() or (path in read and unquote(parts.fragment) not in read[path].anchors):
                found.append(f"{page.relative_to(folder)}: {target} leads nowhere")
    return sorted(set(found))


def main() -> None:
    """Lay out the sources, build, and check the links; one sentence where something is missing."""
    runs = paths.runs() / "phantom"
    if not any((runs / path.name).is_file() for path in paths.notebooks().glob("*.ipynb")):
        sys.exit(f"There are no executed notebooks in {runs}: run `make figures` first.")
    from sphinx.cmd.build import main as sphinx  # an extra

    sources, book = ROOT / "build" / "book-sources", ROOT / "build" / "book"
    for folder in (sources, book):
        shutil.rmtree(folder, ignore_errors=True)
    sources.mkdir(parents=True)
    shown = list(notebooks(sources, runs))
    put(sources / "index.md", index(shown, pages(sources), rooms(sources)))
    options = [
        "-b",
        "html",
        "-c",
        str(ROOT / "docs"),
        "-d",
        str(ROOT / "build" / "book-doctrees"),
        "-E",
        "-q",
        "-W",
        "--keep-going",
    ]
    if sphinx([*options, str(sources), str(book)]):
        sys.exit("The book has faults: see the lines above.")
    problems = broken(book)
    if problems:
        sys.exit("\n".join([*problems, f"{len(problems)} links of the book lead nowhere."]))
    print(f"The book is at {(book / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
