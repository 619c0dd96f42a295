"""Numbers of any width are packed without loss, and in the bytes that their bits need."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from autocompress.errors import UsageError
from autocompress.export.integers import codebook, pack_fields, pack_planes, unpack_fields, unpack_planes
from autocompress.plan import NumFormat


@st.composite
def integers(draw: st.DrawFn, widths: tuple[int, ...]) -> tuple[int, bool, np.ndarray]:
    bits, signed = draw(st.sampled_from(widths)), draw(st.booleans())
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=4, max_side=7))
    values = draw(arrays.arrays(np.int8 if signed else np.uint8, shape, elements=st.integers(low, high)))
    return bits, signed, values


@given(integers(tuple(range(1, 9))))
def test_planes_lose_nothing(drawn: tuple[int, bool, np.ndarray]) -> None:
    bits, signed, values = drawn
    packed = pack_planes(values, bits)
    assert packed.nbytes == bits * ((values.size + 7) // 8)
    found = unpack_planes(packed, bits, values.shape, signed)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@given(integers((2, 4, 8)))
def test_fields_lose_nothing(drawn: tuple[int, bool, np.ndarray]) -> None:
    bits, signed, values = drawn
    packed = pack_fields(values, bits)
    assert packed.nbytes == (values.size * bits + 7) // 8
    found = unpack_fields(packed, bits, values.shape, signed)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_codebook_gives_its_integers_back(granularity: str, axis: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(-127, 128, (6, 4)).astype(np.int8)
    values = np.take_along_axis(
        table if granularity == "channel" else table[:1].repeat(6, 0), rng.integers(0, 4, (6, 50)), 1
    )
    values = values if axis == 0 else np.ascontiguousarray(values.T)
    storage = NumFormat.model_validate({"bits": 2, "scheme": "codebook", "granularity": granularity})
    tables, indices = codebook(values, storage, axis, "fc")
    assert tables.shape == (6 if granularity == "channel" else 1, 4)
    assert indices.shape == values.shape
    assert indices.max() < 4
    rows = np.moveaxis(indices, axis, 0).reshape(len(tables), -1)
    np.testing.assert_array_equal(np.moveaxis(values, axis, 0).reshape(rows.shape), np.take_along_axis(tables, rows, 1))
    with pytest.raises(UsageError, match="'fc' has 5 different weights"):
        codebook(np.arange(5, dtype=np.int8)[None], storage, 0, "fc")
