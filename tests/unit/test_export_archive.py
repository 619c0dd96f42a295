"""An archive gives back the very file, is smaller, and refuses what is damaged without writing anything."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from autocompress.errors import UsageError
from autocompress.export.archive import ArchiveStats, pack, unpack
from autocompress.export.metadata import describe
from autocompress.export.onnx import write_onnx
from autocompress.plan import INT4_WEIGHT, INT8_WEIGHT, LayerPlan
from tests.graphs import compress, resnet


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ArchiveStats]:
    folder = tmp_path_factory.mktemp("archive")
    graph, weights = resnet()
    plans = [LayerPlan(compute="int8", storage=storage) for storage in (INT8_WEIGHT, INT4_WEIGHT)]
    made = compress(graph, weights, {layer.name: plans[i % 2] for i, layer in enumerate(graph.compressible[2:])})
    write_onnx(made, folder / "model.onnx", describe(made.plan))
    return folder / "model.onnx", folder / "model.acz", pack(folder / "model.onnx", folder / "model.acz")


def test_an_archive_is_smaller_and_gives_the_file_back(packed: tuple[Path, Path, ArchiveStats], tmp_path: Path) -> None:
    model, archive, stats = packed
    assert stats == ArchiveStats(model.stat().st_size, archive.stat().st_size)
    assert stats.ratio < 0.92
    assert unpack(archive, tmp_path / "again.onnx") == stats.onnx_bytes
    assert (tmp_path / "again.onnx").read_bytes() == model.read_bytes()


SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.lists(st.tuples(st.sampled_from(["float32", "int8", "int64", "float16"]), SHAPES), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_any_weights_survive(tensors: list, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:  # type: ignore[type-arg]
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("any")
    graph = onnx.GraphProto(name="g")
    for number, (kind, shape) in enumerate(tensors):
        values = (rng.standard_normal(shape) * 20).astype(kind)
        graph.initializer.append(numpy_helper.from_array(np.asarray(values), str(number)))
    (folder / "a").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    pack(folder / "a", folder / "acz")
    unpack(folder / "acz", folder / "b")
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_archive_writes_nothing(packed: tuple[Path, Path, ArchiveStats], seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    content = bytearray(packed[1].read_bytes())
    # Half of them in the header, where a changed size could do most.
    place = rng.randrange(600 if seed % 2 else len(content))
    if seed % 3 == 0:
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    (tmp_path / "model.acz").write_bytes(content)
    with pytest.raises(UsageError, match="cannot unpack"):
        unpack(tmp_path / "model.acz", tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


def claiming(content: bytes, **changes: object) -> bytes:
    (length,) = struct.unpack_from("<I", content, 4)
    header = json.loads(content[8 : 8 + length])
    for stream in header["streams"]:
        stream.update({key: value for key, value in changes.items() if key in stream})
    header.update({key: value for key, value in changes.items() if key != "coder"})
    text = json.dumps(header).encode()
    return content[:4] + struct.pack("<I", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 1 << 40}, "less than or equal"),
        ({"size": -1}, "greater than or equal"),
        ({"sha256": "0" * 64}, "not what was packed"),
        ({"coder": "pickle"}, "header is damaged"),
        ({"path": "/etc/passwd"}, "header is damaged"),
        ({"size": 1000}, "do not add up"),
    ],
)
def test_a_hostile_header_is_refused(
    packed: tuple[Path, Path, ArchiveStats], changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "model.acz").write_bytes(claiming(packed[1].read_bytes(), **changes))
    with pytest.raises(UsageError, match=reason):
        unpack(tmp_path / "model.acz", tmp_path / "model.onnx")


def test_what_cannot_be_packed_or_is_too_large_is_said(packed: tuple[Path, Path, ArchiveStats], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 1000 are allowed"):
        unpack(packed[1], tmp_path / "model.onnx", max_bytes=1000)
    (tmp_path / "text").write_text("no model")
    with pytest.raises(UsageError, match="not an ONNX model"):
        pack(tmp_path / "text", tmp_path / "model.acz")
    for missing in (lambda: pack(tmp_path / "no", tmp_path / "a"), lambda: unpack(tmp_path / "no", tmp_path / "a")):
        with pytest.raises(UsageError, match="cannot read"):
            missing()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]
