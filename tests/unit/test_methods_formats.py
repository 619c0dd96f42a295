"""Rounding to any stored format, and what the runtime does to inputs, simulated."""

from __future__ import annotations

import pytest
import torch

from autocompress.errors import UsageError
from autocompress.methods.formats import BLOCKS, CODEBOOKS, INTEGERS, describe
from autocompress.methods.input_rounding import block_tap, dynamic_tap
from autocompress.methods.rounding import integer_range, round_with_compensation
from autocompress.methods.rounding_formats import column_scales, format_scales, round_to_format, round_to_table
from autocompress.plan import FLOAT16, NumFormat


def weights(rows: int = 12, columns: int = 200, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        * torch.linspace(0.1, 3, rows)[:, None]
    )


@pytest.mark.parametrize("storage", [*INTEGERS, *BLOCKS, *CODEBOOKS], ids=describe)
def test_rounded_weights_are_integers_times_their_scales(storage: NumFormat) -> None:
    weight = weights()
    rounded, scales = round_to_format(weight, storage)
    assert scales is not None
    assert scales.shape == ((12,) if storage.block is None else (12, -(-200 // storage.block)))
    integers = rounded / column_scales(scales, storage, 200)
    torch.testing.assert_close(integers, integers.round(), atol=1e-3, rtol=0)
    low, high = integer_range(8 if storage.scheme == "codebook" else storage.bits)
    assert low <= integers.round().min()
    assert integers.round().max() <= high
    again, _ = round_to_format(rounded, storage)
    if storage.bits >= 7:
        torch.testing.assert_close(again, rounded, rtol=0.02, atol=0.02)
    error = float((rounded - weight).square().mean() / weight.square().mean())
    assert error < {8: 1e-4, 7: 1e-3, 6: 2e-3, 5: 5e-3, 4: 0.02, 3: 0.06, 2: 0.25}[storage.bits]


def test_a_table_of_its_own_beats_one_for_all_and_both_beat_even_steps() -> None:
    heavy = weights() ** 3
    errors = {}
    for granularity in ("channel", "tensor"):
        storage = NumFormat.model_validate({"bits": 3, "scheme": "codebook", "granularity": granularity})
        errors[granularity] = float((round_to_format(heavy, storage)[0] - heavy).square().sum())
    even = float((round_to_format(heavy, NumFormat(bits=3))[0] - heavy).square().sum())
    assert errors["channel"] < errors["tensor"] < even


def test_a_table_finds_the_values_that_there_are() -> None:
    values = torch.tensor([-100.0, -3.0, 4.0, 120.0])
    integers = values[torch.randint(4, (5, 300), generator=torch.Generator().manual_seed(0))]
    for granularity in ("tensor", "channel"):
        storage = NumFormat.model_validate({"bits": 2, "scheme": "codebook", "granularity": granularity})
        assert torch.equal(round_to_table(integers, torch.ones(5), storage), integers)


def test_halves() -> None:
    rounded, scales = round_to_format(torch.tensor([[1.0, 1 / 3]]), FLOAT16)
    assert scales is None
    assert rounded.tolist() == [[1.0, 0.333251953125]]
    with pytest.raises(UsageError, match="1e\\+05 is beyond"):
        round_to_format(torch.tensor([[1e5]]), FLOAT16)


def test_compensated_rounding_takes_scales_by_block() -> None:
    weight, storage = weights(), NumFormat(bits=4, granularity="block", block=32)
    inputs = torch.randn(400, 200, generator=torch.Generator().manual_seed(1)) @ weights(200, 200, 2) / 20
    full = torch.cat([inputs, torch.ones(400, 1)], dim=1).double()
    scales = format_scales(weight, storage)
    steps = column_scales(scales, storage, 200)
    found, bias = round_with_compensation(weight, torch.zeros(12), full.T @ full / 400, steps, 4)
    integers = found / steps
    torch.testing.assert_close(integers, integers.round(), atol=1e-3, rtol=0)
    wanted = inputs @ weight.T
    nearest = round_to_format(weight, storage)[0]
    better = float((inputs @ found.T + bias - wanted).square().mean())
    assert better < 0.7 * float((inputs @ nearest.T - wanted).square().mean())


def test_inputs_are_rounded_over_their_own_range() -> None:
    value = torch.tensor([[0.5, 2.0, 5.1], [1.0, 0.0, 3.0]])
    torch.testing.assert_close(dynamic_tap()(value), (value / 0.02).round() * 0.02)
    assert torch.equal(dynamic_tap()(torch.zeros(2, 3)), torch.zeros(2, 3))
    low = dynamic_tap()(torch.tensor([-1.0, -2.55]))
    torch.testing.assert_close(low, torch.tensor([-1.0, -2.55]))


def test_inputs_are_rounded_block_by_block() -> None:
    value = torch.tensor([[127.0, 0.4, 1.27, 0.006, 9.0]])
    torch.testing.assert_close(block_tap(2)(value), torch.tensor([[127.0, 0.0, 1.27, 0.01, 9.0]]))
    assert torch.equal(block_tap(4)(torch.zeros(2, 6)), torch.zeros(2, 6))
    value.requires_grad_()
    block_tap(2)(value).sum().backward()
    assert torch.equal(value.grad, torch.ones(1, 5))
