"""How recovery sets its training up."""

from __future__ import annotations

import pytest

from autocompress.search import recover
from autocompress.search.recover import BATCH, LEAST_BATCH, batch_for
from tests.graphs import resnet


def test_small_inputs_train_in_full_batches() -> None:
    graph, _ = resnet()
    assert batch_for(graph, BATCH) == BATCH
    assert batch_for(graph, 32) == 32


@pytest.mark.parametrize(("fitting", "expected"), [(200, BATCH), (20, 20), (1, LEAST_BATCH)])
def test_a_step_keeps_to_the_memory_it_may_take(fitting: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = resnet()
    values = sum(graph.tensors[name].elements for layer in graph.layers for name in layer.outputs)
    monkeypatch.setattr(recover, "STEP_BYTES", fitting * values * 4 * recover.HELD)
    assert batch_for(graph, BATCH) == expected
