"""Tests marked ``slow`` run when asked for: ``pytest --slow``, or ``-m slow`` for them alone."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore Ctrl-C; tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or "slow" in config.getoption("-m", default=""):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run it with --slow"))
