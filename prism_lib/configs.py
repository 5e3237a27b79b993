"""Settings that are checked when they are made: pydantic's frozen dataclasses, whose errors are one sentence."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic

Made = TypeVar("Made")
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def checked(*, eq: bool = True, kw_only: bool = False, **config: Any) -> Callable[[type[Made]], type[Made]]:
    """Decorate a class as a frozen dataclass with checked fields and no others; ``config`` is more of pydantic's.

    ValueError names the first wrong field, its value and what is expected.
    """

    def decorated(plain: type) -> type:
        settings: Any = {"extra": "forbid", **config}
        made: Any = pydantic.dataclasses.dataclass(plain, frozen=True, eq=eq, kw_only=kw_only, config=settings)
        init, known = made.__init__, [field.name for field in dataclasses.fields(made)]

        @wraps(init)
        def explained(self: object, *values: Any, **named: Any) -> None:
            try:
                init(self, *values, **named)
            except pydantic.ValidationError as error:
                first: Any = error.errors()[0]
                raise ValueError(_sentence(known, **first)) from None

        made.__init__ = explained
        return made

    return decorated


def read(kind: Callable[..., Made], content: bytes | Mapping[str, Any], fault: str) -> Made:
    """A `checked` object from JSON or a mapping; ValueError begins with ``fault``."""
    try:
        found = content if isinstance(content, Mapping) else json.loads(content)
        if not isinstance(found, Mapping):
            raise ValueError("it is no mapping of names to values")
        return kind(**found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{fault}: {error}") from None


def _sentence(known: list[str], type: str, loc: tuple[Any, ...], msg: str, input: Any, **_: Any) -> str:
    named = [known[place] if isinstance(place, int) else place for place in loc[:1]]  # an argument without a name
    where = ".".join(str(part) for part in (*named, *loc[1:]) if part != "[key]")
    said = msg.removeprefix("Value error, ")
    if type == "unexpected_keyword_argument":
        close = difflib.get_close_matches(where, known, n=1) if len(loc) == 1 else []  # `known` are those of the whole
        return f"unknown setting {where!r}; did you mean {close[0]!r}?" if close else f"unknown setting {where!r}"
    if type == "missing":
        return f"{where} is missing"
    return f"{where} is {input!r}: {said[:1].lower()}{said[1:]}" if where else said
