"""Weights beside the model: checked by path, opened by a plain session, the same outputs, both files counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from autocompress.export.external import PAGE, stored_bytes
from autocompress.export.metadata import ArtifactMetrics, describe, read_metadata, stamp
from autocompress.export.onnx import write_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import INT4_WEIGHT, INT8_WEIGHT, LayerPlan
from autocompress.runtime.onnxruntime import make_session
from tests.graphs import compress, resnet


@pytest.fixture(scope="module")
def compressed() -> CompressedModel:
    graph, weights = resnet(blocks=1)
    plans = [
        LayerPlan(compute="int8", storage=INT8_WEIGHT),
        LayerPlan(compute="int8", storage=INT4_WEIGHT),
        LayerPlan(),
    ]
    return compress(graph, weights, {layer.name: plans[i % 3] for i, layer in enumerate(graph.compressible)})


def test_a_model_forced_out_of_its_file_is_the_same_model(compressed: CompressedModel, tmp_path: Path) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "folder" / "two.onnx"
    size = write_onnx(compressed, one, describe(compressed.plan))
    both = write_onnx(compressed, two, describe(compressed.plan), external_above=10_000)
    assert sorted(path.name for path in two.parent.iterdir()) == ["two.onnx", "two.onnx.data"]
    assert both == stored_bytes(two) == two.stat().st_size + (two.parent / "two.onnx.data").stat().st_size
    # A few kilobytes go to alignment; the weights lie in the second file.
    assert two.stat().st_size < size / 4
    onnx.checker.check_model(str(two), full_check=True)
    model = onnx.load(two, load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    assert {entry["location"] for entry in entries} == {"two.onnx.data"}
    assert all(int(entry["offset"]) % PAGE == 0 for entry in entries)
    image = np.random.default_rng(0).random((3, 1, 28, 28), np.float32)
    first, second = (make_session(path).run(None, {"image": image})[0] for path in (one, two))
    np.testing.assert_array_equal(first, second)
    # Moving both files together keeps them a model; what it says of itself is read without its weights.
    two.parent.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "two.onnx"
    stamp(moved, ArtifactMetrics(latency_ms=1.0))
    np.testing.assert_array_equal(make_session(moved).run(None, {"image": image})[0], first)
    assert read_metadata(moved).plan == compressed.plan


def test_weights_of_an_earlier_model_do_not_stay_behind(compressed: CompressedModel, tmp_path: Path) -> None:
    write_onnx(compressed, tmp_path / "model.onnx", external_above=0)
    size = write_onnx(compressed, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert stored_bytes(tmp_path / "model.onnx") == size


def test_a_model_that_the_checker_refuses_leaves_nothing(
    compressed: CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("no")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    for limit in (0, 1 << 30):
        with pytest.raises(onnx.checker.ValidationError):
            write_onnx(compressed, tmp_path / "model.onnx", external_above=limit)
    assert list(tmp_path.iterdir()) == []
