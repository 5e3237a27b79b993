"""Fixtures that several files share."""

from collections import Counter

import pytest

from prism_lib.data.preparation import PrepareConfig, prepare


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that two processes that share out the files end at about the same time."""
    long = Counter(item.path for item in items if item.get_closest_marker("slow"))
    whole = Counter(item.path for item in items if item.get_closest_marker("notebooks"))
    items.sort(key=lambda item: (-(item.path in whole), -long[item.path], str(item.path)))


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory):
    """Sixty phantoms of 32 x 32 pixels, prepared."""
    output = tmp_path_factory.mktemp("prepared") / "phantom"
    return prepare(
        PrepareConfig("phantom", output, size=32, num_images=60, vocabulary="phantom", split=(0.5, 0.2, 0.3))
    )
