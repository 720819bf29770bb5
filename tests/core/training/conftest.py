"""For this room alone."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever level a command line that ran before has left."""
    caplog.set_level(logging.WARNING, "hf_efx")
