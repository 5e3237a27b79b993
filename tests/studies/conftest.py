"""Fixtures of the studies."""

import pytest

from prism_lib import devices


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """A process of its own would not see what a test replaces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "processes_for", lambda asked=0: asked or 1)
        yield
