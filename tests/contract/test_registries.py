"""Every name that can be chosen stands for something that can be had."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from autocompress.methods.registry import METHODS, RANGE_METHODS, SUMMARIES
from autocompress.registry import Registry
from autocompress.search import samplers
from autocompress.search.samplers import AUTO, SAMPLERS
from autocompress.tasks.registry import DEFAULT_MODELS, FALLBACK_MODEL, MODELS, TASKS

ENTRIES = [(registry, name) for registry in (METHODS, RANGE_METHODS, SAMPLERS, TASKS, MODELS) for name in registry]


@pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=[f"{r.kind}-{n}" for r, n in ENTRIES])
def test_every_entry_is_a_documented_function(registry: Registry, name: str) -> None:
    found = registry.load(name)
    assert callable(found)
    assert inspect.getdoc(found)
    assert inspect.signature(found).return_annotation is not inspect.Signature.empty


def test_every_method_is_described() -> None:
    assert set(SUMMARIES) == set(METHODS)
    assert set(samplers.SUMMARIES) == {AUTO, *SAMPLERS}
    summaries = [*SUMMARIES.values(), *samplers.SUMMARIES.values()]
    assert all(summary and summary == summary.strip() and not summary.endswith(".") for summary in summaries)


@pytest.mark.parametrize("name", MODELS)
def test_networks_take_classes_and_channels(name: str) -> None:
    parameters = inspect.signature(MODELS.load(name)).parameters
    assert {"classes", "channels"} <= set(parameters)
    assert all(p.default is not p.empty for key, p in parameters.items() if key in ("width", "depth"))


def test_default_networks_exist() -> None:
    assert set(DEFAULT_MODELS) <= set(TASKS)
    assert {*DEFAULT_MODELS.values(), FALLBACK_MODEL} <= set(MODELS)


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from autocompress.methods.registry import METHODS, SUMMARIES; "
        "from autocompress.tasks.registry import TASKS, MODELS; from autocompress.search.samplers import SAMPLERS; "
        "list(METHODS); list(TASKS); list(MODELS); list(SAMPLERS); "
        "sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
