"""What ONNX Runtime puts between kernels on a CPU: each tensor's layout and number format under many plans.

* Int8 convolutions, additions and poolings run on NHWC; at an edge to anything else the tensor is transposed.
* Every float32 reader of an int8 tensor has a dequantizer of its own; a tensor is quantized once.
* Readers of a tensor share a change of its layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from autocompress.hardware.kernels import Number, layout_work, move_work, round_up
from autocompress.hardware.placement import Placement
from autocompress.hardware.steps import Mask


@dataclass
class Layouts(Placement):
    """Where tensors are packed or channels last, and who reads them otherwise; kernels are emitted by a subclass."""

    packed: dict[str, Mask] = field(default_factory=dict)
    channels_last: dict[str, Mask] = field(default_factory=dict)
    unpack: dict[str, Mask] = field(default_factory=dict)
    pack: dict[str, Mask] = field(default_factory=dict)
    to_plain: dict[str, Mask] = field(default_factory=dict)
    to_channels_last: dict[str, Mask] = field(default_factory=dict)

    def _positions(self, tensor: str) -> int:
        """Places of an image, each with all its channels."""
        return self.batch * int(np.prod([int(size) for size in self.dims[tensor][1:]]))

    def _packed_elements(self, tensor: str) -> Number:
        shape = self.dims[tensor]
        count: Number = self.batch * round_up(shape[0], self.block) if shape else self.batch
        for size in shape[1:]:
            count = count * size
        return count

    def _read_float(self, tensor: str, mask: Mask, wants_packed: Mask | None = None) -> None:
        """A kernel that runs under ``mask`` reads the tensor as float32, packed where it wants that."""
        if not mask.any():
            return
        held = self._is_held(tensor) & mask
        if held.any():
            elements = self._elements(tensor)
            self.emit(tensor, "dequantize", move_work(elements, 4 * elements), held, True)
            self._mark(self.to_plain, tensor, held & self.channels_last.get(tensor, self.none))
            if wants_packed is not None and (held & wants_packed).any():
                work = move_work(4 * elements, 4 * self._packed_elements(tensor))
                self.emit(tensor, "reorder_input", work, held & wants_packed, True)
        direct = mask & ~held
        packed = self.packed.get(tensor, self.none)
        wanted = self.none if wants_packed is None else wants_packed
        self._mark(self.unpack, tensor, direct & packed & ~wanted)
        self._mark(self.pack, tensor, direct & ~packed & wanted)

    def _read_int8(self, tensor: str, mask: Mask, wants: Mask) -> None:
        """A kernel that runs under ``mask`` reads the tensor as integers, channels last where it ``wants`` that."""
        last = self.channels_last.get(tensor, self.none)
        self._mark(self.to_channels_last, tensor, mask & ~last & wants)
        self._mark(self.to_plain, tensor, mask & last & ~wants)

    def _mark(self, table: dict[str, Mask], tensor: str, mask: Mask) -> None:
        if mask.any():
            table[tensor] = table[tensor] | mask if tensor in table else mask

    def _quantize(self, tensor: str, computed_float: Mask) -> None:
        """The tensor was computed in float32: where it is held in int8, it is quantized."""
        mask = self._is_held(tensor) & computed_float
        if mask.any():
            elements = self._elements(tensor)
            self.emit(tensor, "quantize", move_work(4 * elements, elements), mask, True)
            self._mark(self.unpack, tensor, mask & self.packed.get(tensor, self.none))

    def _conversions(self) -> None:
        """Changes of layout, which all readers of a tensor share."""
        for tensor, mask in self.unpack.items():
            work = move_work(4 * self._packed_elements(tensor), 4 * self._elements(tensor))
            self.emit(tensor, "reorder_output", work, mask, True)
        for tensor, mask in self.pack.items():
            work = move_work(4 * self._elements(tensor), 4 * self._packed_elements(tensor))
            self.emit(tensor, "reorder_input", work, mask, True)
        for table in (self.to_plain, self.to_channels_last):
            for tensor, mask in table.items():
                work = layout_work(self._elements(tensor), self._positions(tensor))
                self.emit(tensor, "transpose_int8", work, mask, True)
        for tensor in self.graph.outputs:
            packed = self.packed.get(tensor, self.none) & ~self.unpack.get(tensor, self.none)
            if packed.any():
                work = move_work(4 * self._packed_elements(tensor), 4 * self._elements(tensor))
                self.emit(tensor, "reorder_output", work, packed, True)
