"""The engine with one of its parts left out: what that part buys.

``python -m benchmarks.ablations without-ladder --task fashion-mnist --model resnet20 --time-budget 5m --out DIR``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from autocompress import api
from autocompress.config import RunConfig
from autocompress.methods.database import LayerDatabase
from autocompress.search import climb, engine, proposing
from autocompress.search.climb import Climber
from autocompress.search.turns import Turn, Turns

LONGER = 3
"""Without the ladder a structure trains once, for so many first rungs."""


def without_nothing() -> None:
    """The engine as it is, for as long as the others."""


def without_database() -> None:
    """Channels leave, and the weights that stay are what they were."""

    def cut(
        self: LayerDatabase, layer: object, weight: torch.Tensor, bias: torch.Tensor, columns: torch.Tensor, _: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return weight.index_select(1, columns), bias

    patch.object(LayerDatabase, "_narrowed", cut).start()


def without_seeds() -> None:
    """The study begins with what its sampler and the proposals draw."""
    patch.object(engine, "uniform_seeds", lambda *_: []).start()
    for name in ("uniform_seeds", "dp_surface"):
        patch.object(proposing, name, lambda *_: []).start()


def without_ladder() -> None:
    """Every structure is trained once, longer, and delivered in all its formats."""
    possible, first = Turns._possible, Climber._first_steps

    def entrants(self: Turns, *given: Any) -> list[Turn]:
        return [turn for turn in possible(self, *given) if turn.rung == 1]

    patch.object(Turns, "_possible", entrants).start()
    patch.object(climb, "FINE_FIRST", False).start()
    patch.object(Climber, "_first_steps", lambda self: LONGER * first(self)).start()


def without_together() -> None:
    """Trainings follow one another, each with all threads."""
    patch.object(climb, "at_once", lambda step: (1, step())).start()


def without_narrowing() -> None:
    """Every recovery starts from the original's weights."""
    patch.object(Climber, "_parent", lambda *_: None).start()


ABLATIONS: dict[str, Callable[[], None]] = {
    f"without-{part}": left_out
    for part, left_out in (
        ("nothing", without_nothing),
        ("database", without_database),
        ("seeds", without_seeds),
        ("ladder", without_ladder),
        ("together", without_together),
        ("narrowing", without_narrowing),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=ABLATIONS)
    for name, default in (("task", "fashion-mnist"), ("model", "resnet20"), ("time-budget", "5m")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    ABLATIONS[given.part]()
    api.search(
        RunConfig.create(
            task=given.task, model=given.model, time_budget=given.time_budget, seed=given.seed, out=given.out
        )
    )


if __name__ == "__main__":
    main()
