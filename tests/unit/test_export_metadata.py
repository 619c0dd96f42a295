"""What a file says of itself survives the round trip, costs little, and never touches the graph."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autocompress.errors import UsageError
from autocompress.export.metadata import (
    FACTS,
    PLAN,
    ArtifactMetadata,
    ArtifactMetrics,
    Provenance,
    Score,
    describe,
    graph_digest,
    read_metadata,
    stamp,
)
from autocompress.export.onnx import write_onnx
from autocompress.methods.compressed import CompressedModel
from autocompress.plan import (
    INT4_WEIGHT,
    INT8_WEIGHT,
    UINT8_ACTIVATION,
    CompressionPlan,
    LayerPlan,
    Metric,
    NumFormat,
    Original,
    Recipe,
    Student,
)
from autocompress.runtime.onnxruntime import make_session
from tests.graphs import compress, resnet

METRICS = ArtifactMetrics(
    metric=Metric(),
    quality={
        "validation": Score(value=0.9123),
        "test": Score(value=0.91, interval=(0.9, 0.92), drop_interval=(0, 0.01)),
    },
    latency_ms=0.245457, latency_p95_ms=0.2557, predicted_ms=0.231243, threads=1, batch=1, params=270_000,
    macs=40_000_000, agreement=0.996, kernels={"int8": 30, "fp32": 2, "convert": 4, "other": 3},
)  # fmt: skip


@pytest.fixture(scope="module")
def resnet20() -> CompressedModel:
    graph, weights = resnet()
    int8, int4 = (LayerPlan(compute="int8", storage=storage) for storage in (INT8_WEIGHT, INT4_WEIGHT))
    plans = (int8, int4, LayerPlan())
    return compress(graph, weights, {layer.name: plans[i % 3] for i, layer in enumerate(graph.compressible)})


def origin(compressed: CompressedModel) -> Provenance:
    cpu = "AMD EPYC 9R14 96-Core Processor"
    return Provenance.here(compressed.plan, cpu, task="fashion-mnist", model="resnet20", seed=3)


def test_a_file_says_what_it_is_in_under_a_kilobyte(resnet20: CompressedModel, tmp_path: Path) -> None:
    plain, path = write_onnx(resnet20, tmp_path / "plain.onnx"), tmp_path / "model.onnx"
    provenance = origin(resnet20)
    size = write_onnx(resnet20, path, describe(resnet20.plan, provenance))
    before, graph = graph_digest(path), onnx.load(path).graph
    # What was measured changes neither the graph nor the size, which is one of the things measured.
    assert stamp(path, METRICS) == size == path.stat().st_size
    assert stamp(path, METRICS.model_copy(update={"latency_ms": 12.75})) == stamp(path, METRICS) == size
    assert graph_digest(path) == before == graph_digest(tmp_path / "plain.onnx")
    assert onnx.load(path).graph == graph
    onnx.checker.check_model(str(path), full_check=True)
    assert size - plain < 1000
    found = read_metadata(path)
    assert found == ArtifactMetadata(plan=resnet20.plan, metrics=METRICS, provenance=provenance)
    assert found.plan is not None
    assert found.plan.digest == provenance.plan
    assert set(make_session(path).get_modelmeta().custom_metadata_map) == {PLAN, FACTS}


NAMES = st.text(min_size=1, max_size=12)
LAYERS = st.sampled_from([LayerPlan(), LayerPlan(storage=INT4_WEIGHT), LayerPlan(compute="int8", storage=INT8_WEIGHT)])


@given(
    layers=st.dictionaries(NAMES, LAYERS, max_size=8),
    activations=st.dictionaries(NAMES, st.sampled_from([UINT8_ACTIVATION, INT8_WEIGHT])),
    groups=st.dictionaries(NAMES, st.integers(1, 2048)),
    base=st.sampled_from([Original(), Student(width=0.3), Student(width=1, depth=0.5, dropped=("a",), init="fresh")]),
    recipe=st.builds(Recipe, steps=st.integers(0, 9), alpha=st.floats(0, 1), learning_rate=st.floats(1e-5, 1)),
)
def test_any_plan_is_read_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    layers: dict[str, LayerPlan],
    activations: dict[str, NumFormat],
    groups: dict[str, int],
    base: Original | Student,
    recipe: Recipe,
) -> None:
    plan = CompressionPlan(layers=layers, activations=activations, groups=groups, base=base, recipe=recipe)
    path = tmp_path_factory.mktemp("plan") / "model.onnx"
    path.write_bytes(foreign(describe(plan)))
    found = read_metadata(path).plan
    assert found == plan
    assert found.digest == plan.digest


def foreign(entries: dict[str, str]) -> bytes:
    model = onnx.helper.make_model(onnx.GraphProto(name="g"), producer_name="someone else")
    onnx.helper.set_model_props(model, entries)
    return model.SerializeToString()


def test_foreign_files_keep_what_they_say(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(foreign({"author": "A", PLAN: "0123456789abcdef"}))  # what earlier versions wrote there
    assert read_metadata(path) == ArtifactMetadata(other={"author": "A"})
    before = graph_digest(path)
    stamp(path, METRICS)
    assert read_metadata(path) == ArtifactMetadata(other={"author": "A"}, metrics=METRICS)
    assert graph_digest(path) == before
    assert onnx.load(path).producer_name == "someone else"


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x3a\xff\xff\xff\xff\x7f", b"\xff" * 40, b"\x08\x0a"])
def test_what_is_no_model_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for read in (read_metadata, graph_digest, lambda p: stamp(p, METRICS)):
        with pytest.raises(UsageError, match=r"model\.onnx"):
            read(path)
    assert path.read_bytes() == content
    with pytest.raises(UsageError, match="cannot read"):
        read_metadata(tmp_path / "nothing.onnx")


def bomb() -> str:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.b85encode(coder.compress(b" " * (1 << 26)) + coder.flush()).decode()


@pytest.mark.parametrize("key", [PLAN, FACTS])
@pytest.mark.parametrize("value", ["1", "1~~~ä", "1" + "0" * 50, "1" + bomb()])
def test_damaged_entries_are_usage_errors(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(foreign({key: value}))
    with pytest.raises(UsageError, match="cannot be read"):
        read_metadata(path)
