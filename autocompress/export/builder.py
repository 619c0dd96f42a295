"""The parts of an ONNX graph, gathered with the fewest bytes: short names, shared initializers, no defaults."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from autocompress.export.integers import pack_int4
from autocompress.plan import Attribute

_ALPHABET = string.ascii_letters + string.digits


def short_names(taken: frozenset[str]) -> Iterator[str]:
    """``a, b, ... 9, aa, ab, ...`` without the names taken: every reference to a tensor costs its name's length."""
    for length in itertools.count(1):
        for letters in itertools.product(_ALPHABET, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name


class GraphBuilder:
    """Collects nodes and initializers; equal initializers are stored once."""

    def __init__(self, taken: frozenset[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._names = short_names(taken)
        self._known: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    def name(self) -> str:
        """A name that nothing has yet."""
        return next(self._names)

    def node(self, op: str, inputs: Sequence[str], output: str = "", **attributes: int) -> str:
        """Adds a node with one output and returns that output's name."""
        made = output or self.name()
        self.layer(op, inputs, [made], attributes)
        return made

    def layer(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Mapping[str, Attribute],
        name: str = "",
        domain: str = "",
    ) -> None:
        """Adds a node of the model."""
        made = onnx.NodeProto(op_type=op, input=inputs, output=outputs)
        if domain:
            made.domain = domain
        if name:
            made.name = name
        made.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self.nodes.append(made)

    def constant(self, values: np.ndarray, int4: bool = False) -> str:
        """The name of an initializer with these values; ``int4`` packs integers two a byte."""
        if int4:
            kind, raw = int(TensorProto.INT4), pack_int4(values).tobytes()
        else:
            kind, raw = int(helper.np_dtype_to_tensor_dtype(values.dtype)), np.ascontiguousarray(values).tobytes()
        key = (kind, values.shape, raw)
        if key not in self._known:
            self._known[key] = self.name()
            self.initializers.append(
                TensorProto(name=self._known[key], data_type=kind, dims=values.shape, raw_data=raw)
            )
        return self._known[key]
