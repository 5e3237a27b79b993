"""The house: storeys, rooms and their faces. What `docs/architecture.md` draws is what the imports say."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import prism_lib

LIBRARY = Path(prism_lib.__file__).parent
STOREYS = {
    "ground": ("language", "phantom"),
    "product": ("data", "models", "training", "editing"),
    "uses": ("evaluation", "reporting", "studies", "apps"),
}
ROOMS = ("", *(room for rooms in STOREYS.values() for room in rooms))  # a room imports only what stands to its left
MODULES = {
    ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts): path
    for path in sorted(LIBRARY.rglob("*.py"))
    if path.name != "__init__.py"
}


def room_of(module):
    return module.split(".")[1] if module.count(".") > 1 else ""


@cache
def imported(module):
    """The modules of the library that a module imports, also late and for annotations only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "prism_lib":
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (full & MODULES.keys()) or {node.module}
    return frozenset(found)


def test_imports_name_modules_and_never_run_up():
    for module in MODULES:
        for target in imported(module):
            assert target in MODULES or target == "prism_lib", f"{module} imports {target}: name the module"
            upward = target in MODULES and ROOMS.index(room_of(target)) > ROOMS.index(room_of(module))
            assert not upward, f"{module} imports {target}, which stands above it"


def floors(module, above=()):
    """How many modules of its own room stand on each other below and including this one."""
    assert module not in above, f"a circle: {' -> '.join((*above, module))}"
    own = [target for target in imported(module) if target in MODULES and room_of(target) == room_of(module)]
    return 1 + max((floors(target, (*above, module)) for target in own), default=0)


def test_no_circle_and_at_most_six_floors_in_a_room():
    assert max(floors(module) for module in MODULES) <= 6


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_long(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= 400 or module == "prism_lib.phantom.anatomy", f"{module} has {lines} lines"


def test_the_library_is_thin():
    lines = sum(len(path.read_text().splitlines()) for path in LIBRARY.rglob("*.py"))
    assert len(MODULES) <= 70 and lines <= 14_660, f"{len(MODULES)} modules, {lines} lines"


def face(room):
    """Public name -> module that defines it, as the room's stub lists them."""
    tree = ast.parse((LIBRARY / room / "__init__.pyi").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: node.module for node in imports for alias in node.names}


@pytest.mark.parametrize("room", ROOMS[1:])
def test_a_room_says_what_it_is_for_and_shows_what_is_there(room):
    package = importlib.import_module(f"prism_lib.{room}")
    assert len(re.findall(r"\.(?:\s|$)", package.__doc__)) >= 3, f"{room} needs three sentences"
    modules = {path.stem for path in (LIBRARY / room).glob("*.py")}
    for name, module in face(room).items():
        assert name not in modules, f"{room}.{name} is a module as well"
        defined = getattr(importlib.import_module(f"prism_lib.{room}.{module}"), name)
        assert getattr(defined, "__module__", f"prism_lib.{room}.{module}").startswith(f"prism_lib.{room}."), name
        assert getattr(package, name) is defined


def test_a_public_name_has_one_address():
    names = [name for room in ROOMS[1:] for name in face(room)]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prism_lib"):
                passed_on = [alias.name for alias in node.names if alias.asname == alias.name]
                assert not passed_on, f"{module} passes {passed_on} on"


def test_the_drawing_is_the_house():
    text = (LIBRARY.parent / "docs" / "architecture.md").read_text()
    (diagram,) = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
    drawn = set(re.findall(r"(\w+) --> (\w+)", diagram))
    rooms = {room: {room_of(t) for m in MODULES if room_of(m) == room for t in imported(m)} for room in ROOMS[1:]}
    below = {room: targets - {room, ""} for room, targets in rooms.items()}

    def reached(room):
        return below[room].union(*(reached(target) for target in below[room]))

    # An arrow that follows from others is not drawn.
    needed = {
        (room, target)
        for room in below
        for target in below[room]
        if not any(target in reached(other) for other in below[room] - {target})
    }
    assert drawn == needed
    for storey, members in STOREYS.items():
        (drawn_in,) = re.findall(rf"subgraph {storey}\b.*?\n(.*?)\n\s*end", diagram, re.DOTALL)
        assert set(re.findall(r"^\s*(\w+)\[", drawn_in, re.MULTILINE)) == set(members)
