"""Structures over depths and widths: drawn, priced, judged by shared weights and searched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import optuna
import pytest
import torch

from autocompress.graph.blocks import find_blocks
from autocompress.graph.executor import build_module
from autocompress.graph.read import read_model
from autocompress.hardware.models import cost_model
from autocompress.methods.database import LayerDatabase
from autocompress.methods.distillation import teach
from autocompress.methods.statistics import collect
from autocompress.plan import Original, Student
from autocompress.progress import SilentProgress
from autocompress.search.bases import Base, build_student
from autocompress.search.context import Context
from autocompress.search.elastic import ElasticStage, Structures
from autocompress.search.evaluate import StitchedEvaluator
from autocompress.search.menu import Menu
from autocompress.search.recover import Trainer
from autocompress.spaces import SearchSpace
from autocompress.tasks import load_task
from tests.fixtures.search import make_profile


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A run over a trained digits network, as far as this stage looks at it."""
    task = load_task("digits", "resnet8")
    graph, weights = read_model(task.model, task.example_inputs)
    dense = build_module(graph, weights)
    database = LayerDatabase(graph, weights, collect(dense, [(task.split("calibration").inputs,)], 0))
    pricer = cost_model(make_profile())
    run = tmp_path_factory.mktemp("run")
    menu = Menu(graph, SearchSpace(keep=(0.25, 0.5, 1.0)), (), "")
    found = SimpleNamespace(
        task=task, run=run, dense=dense, cost_model=pricer, menu=menu, costs=("latency_ms", "size_bytes"), hard={},
        original=Base(Original(), graph, weights, pricer.lower(graph)), progress=SilentProgress(),
        evaluator=StitchedEvaluator(database, dense, task, 0), storage=f"sqlite:///{run / 'study.db'}",
        config=SimpleNamespace(seed=0),
        formats={layer: [o.format for o in k.options] for k in menu.knobs for layer in k.layers},
    )  # fmt: skip
    return cast(Context, found)


@pytest.fixture(scope="module")
def structures(context: Context) -> Structures:
    bases: dict[Student, Base | None] = {}

    def base(spec: Original | Student) -> Base | None:
        if isinstance(spec, Original):
            return context.original
        if spec not in bases:
            bases[spec] = build_student(context.task, context.original, spec, context.cost_model, 0)
        return bases[spec]

    return Structures(context, [block.name for block in find_blocks(context.original.graph)], base)


def test_drawn_structures_are_of_every_depth_and_on_the_menu(structures: Structures, context: Context) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [structures.draw(generator) for _ in range(60)]
    assert {isinstance(plan.base, Student) for plan in drawn} == {True, False}
    for plan in drawn:
        assert all(count in structures.options[group] for group, count in plan.groups.items())
    assert len({plan.shape_digest for plan in drawn}) > 20
    assert set(structures.narrowest.groups.values()) <= {min(o) for o in structures.options.values()}


def test_fewer_channels_cost_less(structures: Structures) -> None:
    prices = []
    for share in (1.0, 0.5, 0.25):
        plan = structures.plan(0, structures.near(share))
        assert plan is not None
        prices.append(structures.costs(plan, structures.context.original))
    assert prices[0]["latency_ms"] > prices[1]["latency_ms"] > prices[2]["latency_ms"]
    assert prices[0]["size_bytes"] > prices[1]["size_bytes"] > prices[2]["size_bytes"]


def test_shared_weights_judge_better_than_the_database_and_are_taken_up_again(
    structures: Structures, context: Context
) -> None:
    taught = teach(context.dense, context.task.split("train"), False, SilentProgress())
    trainer = Trainer(context.task, taught, 0, repeatable=True)
    stage = ElasticStage(context, structures, trainer)
    assert not stage.trained
    before = stage.judge(structures.narrowest)
    stage._judged.clear()
    stage.train(60, None)
    assert stage.judge(structures.narrowest).divergence < before.divergence
    judged = stage.search(12, None)
    assert len({j.plan.shape_digest for j in judged}) == len(judged) >= 8
    assert {j.base.spec.kind for j in judged} == {"original", "student"}
    assert all(0.0 <= j.error <= 1.0 and set(j.costs) == set(context.costs) for j in judged)

    again = ElasticStage(context, structures, trainer)
    assert again.trained
    again.train(60, None)
    for a, b in zip(stage.weights.parameters, again.weights.parameters, strict=True):
        assert torch.equal(a, b)
    trials = len(optuna.load_study(study_name=None, storage=context.storage).trials)
    assert len(again.search(12, None)) == len(judged)
    assert len(optuna.load_study(study_name=None, storage=context.storage).trials) >= trials
