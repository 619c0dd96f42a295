"""Splits: batches, augmentation, hashes, disjointness."""

from __future__ import annotations

import pytest
import torch

from autocompress.tasks.splits import (
    Augmentation,
    Normalisation,
    TensorSource,
    TensorSplit,
    augment,
    iterate_batches,
    make_disjoint,
)


def numbered(first: int, count: int) -> TensorSplit:
    """Samples that are told apart by their value, which is their target too."""
    values = torch.arange(first, first + count)
    return TensorSplit(values.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), values)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bytes_are_normalised_on_the_way_out() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    split = TensorSplit(images, torch.tensor([0, 1]), Normalisation((0.5,), (0.25,)))
    assert split.inputs.flatten().tolist() == [-2.0, 2.0]
    assert torch.equal(split.batch(torch.tensor([1])).inputs[0], split.inputs[1:])
    assert images.flatten().tolist() == [0, 255]


def test_without_a_generator_all_samples_come_in_order() -> None:
    targets = [batch.target for batch in iterate_batches(numbered(0, 10), 4)]
    assert [len(t) for t in targets if t is not None] == [4, 4, 2]
    assert torch.cat([t for t in targets if t is not None]).tolist() == list(range(10))


def test_with_a_generator_the_order_is_random_and_repeatable() -> None:
    def order(seed: int) -> list[int]:
        batches = iterate_batches(numbered(0, 10), 4, seeded(seed))
        return torch.cat([b.target for b in batches if b.target is not None]).tolist()

    assert order(0) == order(0) != order(1)
    assert len(set(order(0))) == 8  # whole batches only


def test_training_batches_differ_between_passes_and_not_between_runs() -> None:
    def two_passes() -> list[torch.Tensor]:
        source = TensorSource(numbered(0, 64), 16, seeded(), Augmentation(flip=True, shift=1))
        assert len(source) == 4
        return [torch.cat([batch.inputs[0] for batch in source]) for _ in range(2)]

    first, second = two_passes()
    assert not torch.equal(first, second)
    assert torch.equal(torch.stack(two_passes()), torch.stack([first, second]))


def test_flips_and_shifts_move_pixels_by_no_more_than_asked() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 3] = 1.0
    batch = image.expand(400, -1, -1, -1)
    flipped = augment(batch, seeded(), flip=True)
    assert {tuple(i[0].nonzero()[0].tolist()) for i in flipped} == {(4, 3), (4, 5)}
    shifted = augment(batch, seeded(), shift=1)
    assert {tuple(i[0].nonzero()[0].tolist()) for i in shifted} == {(y, x) for y in (3, 4, 5) for x in (2, 3, 4)}
    assert batch.sum() == 400  # the caller's images stay as they are


def test_a_digest_changes_with_content_order_targets_and_normalisation() -> None:
    split = numbered(0, 8)
    same = numbered(0, 8)
    assert split.digest == same.digest
    others = [
        split.take(torch.arange(7, -1, -1)),
        TensorSplit(split.stored, split.targets + 1),
        TensorSplit(split.stored + 1, split.targets),
        TensorSplit(split.stored, split.targets, Normalisation((0.5,), (0.5,))),
    ]
    assert len({split.digest, *(other.digest for other in others)}) == 5


def test_repeated_samples_stay_in_the_more_important_split_only(caplog: pytest.LogCaptureFixture) -> None:
    splits = {
        "train": numbered(0, 10),
        "calibration": numbered(8, 4),
        "validation": numbered(11, 4),
        "test": numbered(14, 4),
    }
    disjoint = make_disjoint(splits)
    assert {name: split.targets.tolist() for name, split in disjoint.items()} == {
        "train": list(range(8)),
        "calibration": [8, 9, 10],
        "validation": [11, 12, 13],
        "test": [14, 15, 16, 17],
    }
    assert "2 of 10 train samples repeat" in caplog.text


def test_as_many_targets_as_inputs_are_needed() -> None:
    with pytest.raises(ValueError, match="3 inputs but 2 targets"):
        TensorSplit(torch.zeros(3, 1), torch.zeros(2))
