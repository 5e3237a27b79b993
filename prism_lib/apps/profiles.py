"""Profiles, `notebooks/profiles/<name>.yaml`: the parameters of each notebook, checked before anything runs."""

import ast
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prism_lib import paths

FIGURES_PARAMETER = "FIGURES_DIR"


class UsageError(ValueError):
    """The command cannot start as it was given."""


@dataclass(frozen=True)
class Profile:
    """Parameter values per notebook, by the notebook's stem."""

    name: str
    description: str
    figures: str  # "figures": the committed figures/<dataset>/; "runs": the run's own folder
    sections: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """A notebook and the parameters it will get; ``key`` changes with both and with any notebook before."""

    notebook: Path
    parameters: Mapping[str, Any]
    key: str

    @property
    def name(self) -> str:
        return self.notebook.stem


def available_profiles() -> list[str]:
    """Names of the profiles beside the notebooks."""
    return sorted(path.stem for path in (paths.notebooks() / "profiles").glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """Read and check a profile's form; `plan` checks it against the notebooks."""
    path = paths.notebooks() / "profiles" / f"{name}.yaml"
    if name not in available_profiles():
        raise UsageError(f"no profile {name!r}; there are: {', '.join(available_profiles()) or 'none'}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    keys = {"description", "figures", "notebooks"}
    if not isinstance(content, dict) or set(content) != keys or not isinstance(content["notebooks"], dict):
        raise UsageError(f"{path.name} must hold exactly {', '.join(sorted(keys))}, the last a section each")
    if content["figures"] not in ("figures", "runs"):
        raise UsageError(f"{path.name}: figures must be 'figures' or 'runs', not {content['figures']!r}")
    sections = {str(key): value or {} for key, value in sorted(content["notebooks"].items())}
    if odd := [name for name, values in sections.items() if not isinstance(values, dict)]:
        raise UsageError(f"{path.name}: section {odd[0]} must be a mapping of parameters")
    return Profile(name, str(content["description"]), content["figures"], sections)


def declared_parameters(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook with their default values: the assignments in its cell tagged "parameters"."""
    try:  # not by papermill, which takes a second to import
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
        body = ast.parse("".join(tagged[0]["source"])).body if tagged else []
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise UsageError(f"{notebook.name} cannot be read as a notebook: {error}") from None
    defaults = {}
    for statement in body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            name = ast.unparse(statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0])
            try:
                defaults[name] = ast.literal_eval(statement.value or "")
            except (ValueError, SyntaxError):
                raise UsageError(f"{notebook.name}: the default of {name} is no literal") from None
    return defaults


def coerce(name: str, value: Any, default: Any) -> Any:
    """``value`` in the type of the notebook's ``default``; text (`-p`, YAML's 1e-4) is read as a literal."""
    if isinstance(default, str) and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            with suppress(yaml.YAMLError):  # YAML's `true`, `[a, b]`, `1e-4`; else text as it is
                value = yaml.safe_load(value)
    if default is None:
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return list(value)
    if type(value) is not type(default):
        raise UsageError(f"{name} takes {type(default).__name__} (such as {default!r}), not {value!r}")
    return value


def plan(
    profile: Profile,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    start: str | None = None,
    only: Sequence[str] = (),
    figures_dir: Path | None = None,
) -> list[Job]:
    """The notebooks to run, in order, with every parameter checked; `start` and `only` are numbers or names.

    `overrides` (`-p`) go to every selected notebook that has the name, or as "01.NAME" to that one; `figures_dir`
    replaces `figures/<dataset>/`.
    """
    if not profile.sections:
        raise UsageError(f"profile {profile.name!r} has no notebooks yet")
    chosen = _select(list(profile.sections), start, only)
    declared = {name: _declared(name, profile) for name in profile.sections}
    known = sorted({parameter for name in chosen for parameter in declared[name]})
    numbered = {f"{name.split('_')[0]}.{parameter}" for name in chosen for parameter in declared[name]}
    if unknown := [name for name, _ in overrides if name not in numbered.union(known)]:
        raise UsageError(f"no selected notebook has a parameter {unknown[0]!r}{_did_you_mean(unknown[0], known)}")

    jobs, key = [], ""
    for name, section in profile.sections.items():
        defaults = declared[name]
        own = {parameter.removeprefix(f"{name.split('_')[0]}."): value for parameter, value in overrides}
        given = {**section, **{parameter: value for parameter, value in own.items() if parameter in defaults}}
        values = {parameter: coerce(parameter, value, defaults[parameter]) for parameter, value in given.items()}
        if figures_dir is not None and FIGURES_PARAMETER not in values:
            if FIGURES_PARAMETER not in defaults:
                raise UsageError(f"{name} has no parameter {FIGURES_PARAMETER}: it would write committed figures")
            values[FIGURES_PARAMETER] = str(figures_dir)
        notebook = paths.notebooks() / f"{name}.ipynb"
        content = [key, json.dumps(values, sort_keys=True), notebook.read_text(encoding="utf-8")]
        key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
        jobs.append(Job(notebook, values, key))
    return [job for job in jobs if job.name in chosen]


def _declared(name: str, profile: Profile) -> dict[str, Any]:
    notebook = paths.notebooks() / f"{name}.ipynb"
    if not notebook.is_file():
        found = [path.stem for path in paths.notebooks().glob("*.ipynb")]
        raise UsageError(f"{profile.name}.yaml: there is no notebook {name}{_did_you_mean(name, found)}")
    declared = declared_parameters(notebook)
    if unknown := [parameter for parameter in profile.sections[name] if parameter not in declared]:
        hint = _did_you_mean(str(unknown[0]), declared)
        raise UsageError(f"{profile.name}.yaml: {name} has no parameter {unknown[0]!r}{hint}")
    return declared


def _select(names: Sequence[str], start: str | None, only: Sequence[str]) -> list[str]:
    def find(wanted: str) -> str:
        number = wanted.zfill(2) if wanted.isdigit() else None
        for name in names:
            if wanted in (name, f"{name}.ipynb") or name.split("_")[0] == number:
                return name
        raise UsageError(f"no notebook {wanted!r} in this profile; it has {', '.join(names)}")

    chosen = {find(wanted) for wanted in only or names}
    first = names.index(find(start)) if start else 0
    if selected := [name for name in names[first:] if name in chosen]:
        return selected
    raise UsageError("--from and --only leave no notebook to run")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(sorted(known)) or 'none'}"
