"""What OpenVINO converts on the way between kernels: quantizing, dequantizing and reordering tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from autocompress.hardware.kernels import move_work
from autocompress.hardware.openvino_patterns import never_negative
from autocompress.hardware.placement import Placement
from autocompress.hardware.steps import Mask
from autocompress.methods.quantization import FOLLOWERS
from autocompress.plan import Layer, is_weight_layer


@dataclass
class OpenvinoTensors(Placement):
    """Where each tensor lies, as integers or floats and in which layout; conversions are emitted as readers ask."""

    integers: dict[str, Mask] = field(default_factory=dict)
    """Under which plans a tensor lies in memory as integers."""
    channels_last: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._results = {step.layer.name: step.result for step in self.steps}
        self._wants: dict[str, Mask] = {}
        self._dequantized: dict[tuple[str, bool], Mask] = {}
        self._pending: dict[str, tuple[Mask, bool]] = {}
        self._from_zero = never_negative(self.graph)

    def _in_integers(self, tensor: str) -> Mask:
        return self.integers.get(tensor, self.none)

    def _all_held(self, layer: Layer) -> Mask:
        """Whether an operator without weights computes in integers."""
        mask = self._is_held(self._results[layer.name])
        for tensor in layer.activations:
            mask = mask & self._is_held(tensor)
        return mask

    def _integer_readers(self, tensor: str) -> Mask:
        """Under which plans an int8 kernel reads the tensor."""
        if tensor not in self._wants:
            mask = self.none
            for layer in self.graph.consumers.get(tensor, ()):
                if is_weight_layer(layer):
                    mask = mask | self.int8.get(layer.name, self.none)
                elif layer.op in FOLLOWERS and layer.name in self._results:
                    mask = mask | self._all_held(layer)
            self._wants[tensor] = mask
        return self._wants[tensor]

    def _quantize(self, tensor: str, computed_float: Mask) -> None:
        """The tensor was computed in float32: where the plan holds it in int8, a kernel makes integers of it."""
        mask = self._is_held(tensor) & computed_float
        if mask.any():
            elements = self._elements(tensor)
            self.emit(tensor, "quantize", move_work(4 * elements, elements), mask, True)
            self.integers[tensor] = self._in_integers(tensor) | mask

    def _written_int8(self, tensor: str, computed_int8: Mask) -> Mask:
        """An int8 kernel computed the tensor: under which plans it writes integers."""
        mask: Mask = computed_int8 & self._is_held(tensor)
        adds = any(layer.op == "Add" for layer in self.graph.consumers.get(tensor, ()))
        if tensor in self._from_zero and not adds:
            mask = mask & self._integer_readers(tensor)
        self.integers[tensor] = self._in_integers(tensor) | mask
        return mask

    def _read_float(self, tensor: str, mask: Mask, between: Mask | None = None) -> None:
        """A float kernel reads the tensor; ``between``: under which plans it is a layer whose result is int8 too."""
        self._settle(tensor, mask)
        mask = mask & self._in_integers(tensor)
        inner = self.none if between is None else between
        for per_channel, wanted in ((True, mask & inner), (False, mask & ~inner)):
            known = self._dequantized.get((tensor, per_channel), self.none)
            new = wanted & ~known
            self._dequantized[tensor, per_channel] = known | new
            if not new.any():
                continue
            elements = self._elements(tensor)
            self.emit(tensor, "dequantize", move_work(elements, 4 * elements), new, True)
            if not per_channel and tensor in self.channels_last and tensor not in self._from_zero:
                self.emit(tensor, "transpose_int8", move_work(elements, elements), new, True)
                self.emit(tensor, "reorder_input", move_work(4 * elements, 4 * elements), new, True)

    def _settle(self, tensor: str, mask: Mask) -> None:
        """Elementwise operators behind an int8 product wait for a reader, which may take them in; this one does not."""
        waiting, curve = self._pending.get(tensor, (self.none, False))
        new = waiting & mask
        if new.any():
            elements = self._elements(tensor)
            kind = "curve_fp32" if curve else "dequantize"
            self.emit(tensor, kind, move_work(elements, 4 * elements), new, True)
            self._pending[tensor] = (waiting & ~new, curve)

    def _wrote_both(self, tensor: str, mask: Mask) -> None:
        """An elementwise kernel wrote the tensor for int8 and float readers alike."""
        for per_channel in (False, True):
            self._dequantized[tensor, per_channel] = self._dequantized.get((tensor, per_channel), self.none) | mask

    def _make_channels_last(self, tensor: str) -> None:
        shape = self.dims[tensor]
        if tensor in self.channels_last or len(shape) < 2:
            return
        self.channels_last.add(tensor)
        if not isinstance(shape[0], np.ndarray) and shape[0] == 1:
            return  # one channel: the same memory either way
        self._reorder(tensor, "reorder_input")

    def _reorder(self, tensor: str, kind: str) -> None:
        elements = self._elements(tensor)
        integers = self._in_integers(tensor)
        self.emit(tensor, "transpose_int8", move_work(elements, elements), integers, True)
        self.emit(tensor, kind, move_work(4 * elements, 4 * elements), ~integers, True)

    def _join(self, source: str, result: str, kind: str, mask: Mask) -> Mask:
        """An elementwise operator behind integers joins their dequantizer, and the quantizer behind if there is one."""
        waiting, curve = self._pending.pop(source, (self.none, False))
        curve = curve or kind.startswith(("curve", "gelu"))
        joined: Mask = mask & (waiting | self._in_integers(source))
        held = joined & self._is_held(result)
        if held.any():
            elements = self._elements(result)
            self.emit(result, "curve_int8" if curve else "add_int8", move_work(elements, elements), held, True)
            self.integers[result] = self._in_integers(result) | held
            self._wrote_both(result, held)
        self._pending[result] = (joined & ~held, curve)
        return joined
