"""Which sampler a name stands for, what it is made with, and what is said of a name that nobody knows."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import optuna
import pytest

from autocompress import api, registry
from autocompress.config import load_config
from autocompress.errors import UsageError
from autocompress.registry import Registry
from autocompress.search import samplers
from autocompress.search.samplers import DEFAULT, GP_KNOBS, SAMPLERS, SamplerSettings, make_sampler, resolved
from autocompress.search.study import sampler_settings
from tests.fixtures.search import make_menu


def settings(**changes: int) -> SamplerSettings:
    return SamplerSettings(**{"seed": 0, "population": 12, "objectives": 3, "knobs": 4, **changes})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nsga2", optuna.samplers.NSGAIISampler),
        ("nsga3", optuna.samplers.NSGAIIISampler),
        ("tpe", optuna.samplers.TPESampler),
        ("gp", optuna.samplers.GPSampler),
        ("random", optuna.samplers.RandomSampler),
    ],
)
def test_names(name: str, kind: type[optuna.samplers.BaseSampler]) -> None:
    made = make_sampler(name, settings())
    assert type(made) is kind
    if isinstance(made, optuna.samplers.BaseGASampler):
        assert made.population_size == 12


def test_auto_is_an_entry_that_takes_any_model() -> None:
    assert resolved("auto") == DEFAULT
    assert DEFAULT in SAMPLERS
    make_sampler("auto", settings(knobs=1000))


def test_a_gaussian_process_is_refused_where_it_would_take_too_long() -> None:
    make_sampler("gp", settings(knobs=GP_KNOBS))
    with pytest.raises(UsageError, match=r"'gp' is for at most 16 knobs and this model has 17.*choose another"):
        make_sampler("gp", settings(knobs=GP_KNOBS + 1))


def test_knobs_that_leave_no_choice_do_not_count() -> None:
    menu = make_menu()
    free = sum(len(knob.options) > 1 for knob in menu.knobs)
    assert sampler_settings(menu, 2) == SamplerSettings(seed=0, population=32, objectives=3, knobs=free)
    held = menu.reduced({menu.knobs[0].name: menu.knobs[0].options[:1]}, {})
    assert sampler_settings(held, 2).knobs == free - 1


def test_an_unknown_name_cites_where_it_was_given(tmp_path: Path) -> None:
    config = load_config(flags={"sampler": "nsgaii", "trials": 3, "out": tmp_path / "run"})
    message = r"--sampler: unknown sampler 'nsgaii'; nearest: 'nsga\w*'; known: auto, gp, nsga2, nsga3, random, tpe"
    for call in (api.search, api.dry_run):
        with pytest.raises(UsageError, match=message):
            call(config)
    assert not (tmp_path / "run").exists()


def brute_force(settings: SamplerSettings) -> optuna.samplers.BaseSampler:
    """What another package may bring."""
    return optuna.samplers.BruteForceSampler(seed=settings.seed)


def test_another_package_adds_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("brute", f"{__name__}:brute_force", group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "import_object", lambda reference: brute_force)
    monkeypatch.setattr(samplers, "SAMPLERS", Registry("sampler", dict(SAMPLERS)))
    assert type(make_sampler("brute", settings())) is optuna.samplers.BruteForceSampler
    assert set(asked) == {"autocompress.sampler"}
