"""Benches run alone: two at a time would measure each other."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Undo the workers that the tests of this project use."""
    config.option.numprocesses, config.option.dist, config.option.tx = 0, "no", []
