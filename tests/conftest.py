"""Fixtures that several files share."""

import pytest

from prism_lib.data.preparation import PrepareConfig, prepare


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory):
    """Sixty phantoms of 32 x 32 pixels, prepared."""
    output = tmp_path_factory.mktemp("prepared") / "phantom"
    return prepare(
        PrepareConfig("phantom", output, size=32, num_images=60, vocabulary="phantom", split=(0.5, 0.2, 0.3))
    )
