"""Settings of every kind say in one sentence what is wrong with them."""

import importlib
import json
import pickle
from dataclasses import fields, replace

import pytest

from prism_lib.configs import checked, read
from prism_lib.data.preparation import PrepareConfig
from prism_lib.editing.settings import EditConfig, Recommendation
from prism_lib.models.classifier import ClassifierConfig
from prism_lib.training.config import FinetuneConfig
from tests.test_architecture import MODULES


@checked(kw_only=True)
class Inner:
    count: int = 1


@checked()
class Outer:
    name: str
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name is bad")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Outer(), "name is missing"),
        (lambda: Outer(3), "name is 3: input should be a valid string"),
        (lambda: Outer("bad"), "name is bad"),
        (lambda: Outer("a", nmae="b"), "unknown setting 'nmae'; did you mean 'name'?"),
        (lambda: Outer("a", inner={"count": "x"}), "inner.count is 'x': input should be a valid integer, unable to"),
        (lambda: Outer("a", inner={"xyz": 1}), "unknown setting 'inner.xyz'"),
        (lambda: Outer("a", inner={"inne": 1}), "unknown setting 'inner.inne'"),
        (lambda: replace(Outer("a"), name="bad"), "name is bad"),
        (lambda: read(Outer, b'{"name": "bad"}', "file.json"), "file.json: name is bad"),
        (lambda: read(Outer, b"[1]", "file.json"), "file.json: it is no mapping"),
        (lambda: FinetuneConfig("data", "out", schedule="step"), "schedule is 'step': input should be 'constant', "),
        (lambda: PrepareConfig("phantm", "out"), "dataset is 'phantm': input should be 'phantom', 'films', "),
        (lambda: ClassifierConfig(contrast=0), "contrast is 0: input should be greater than 0"),
        (lambda: EditConfig(confine=2), "confine is 2: input should be less than or equal to 1"),
        (lambda: Recommendation(defaults={"confin": 2}), "unknown setting 'confin'; did you mean 'confine'?"),
    ],
)
def test_an_error_is_one_sentence_with_field_value_and_what_is_allowed(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make()
    assert str(error.value).startswith(message) and ("did you" in message) == ("did you" in str(error.value))
    assert "\n" not in str(error.value) and error.value.__cause__ is None


def test_settings_are_frozen_and_survive_pickle_and_json():
    one = Outer("a", {"count": 2})
    assert pickle.loads(pickle.dumps(one)) == one == read(Outer, json.dumps({"name": "a", "inner": {"count": 2}}), "")
    with pytest.raises(AttributeError):
        one.name = "b"


def test_all_settings_of_the_library_are_checked_in_one_way():
    kinds = {
        kind for name in MODULES for kind in vars(importlib.import_module(name)).values() if isinstance(kind, type)
    }
    pydantic = [kind for kind in kinds if hasattr(kind, "__pydantic_config__") and kind.__module__ in MODULES]
    assert len(pydantic) > 20
    for kind in pydantic:
        assert kind.__pydantic_config__["extra"] == "forbid", kind
        assert "explained" in kind.__init__.__code__.co_name and fields(kind), kind
