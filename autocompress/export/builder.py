"""The parts of an ONNX graph, gathered with the fewest bytes: short names, shared initializers, no defaults."""

from __future__ import annotations

import hashlib
import itertools
import string
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from autocompress.export.integers import pack_fields
from autocompress.plan import Attribute

OPSET = 21
"""The newest operators that a file needs as a rule."""

OPSET_2_BITS = 25
"""The first with a type of two bits."""

IR_VERSIONS = {OPSET: 10, OPSET_2_BITS: 13}

RUNTIME_DOMAIN = "com.microsoft"
"""Where ONNX Runtime keeps its own operators."""

_FIELDS = {int(TensorProto.INT2): 2, int(TensorProto.UINT2): 2, int(TensorProto.INT4): 4, int(TensorProto.UINT4): 4}
_ALPHABET = string.ascii_letters + string.digits


def short_names(taken: frozenset[str]) -> Iterator[str]:
    """``a, b, ... 9, aa, ab, ...`` without the names taken: every reference to a tensor costs its name's length."""
    for length in itertools.count(1):
        for letters in itertools.product(_ALPHABET, repeat=length):
            name = "".join(letters)
            if name not in taken:
                yield name


class GraphBuilder:
    """Collects nodes and initializers; equal initializers are stored once.

    Attributes:
        nodes: in execution order.
        model: the model, which has the stored tensors already; they are not copied again.
        opset: the version of ONNX's operators that they need.
        domains: other domains whose operators are among them.
    """

    def __init__(self, taken: frozenset[str]) -> None:
        self.opset = OPSET
        self.domains: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.model = onnx.ModelProto()
        self._names = short_names(taken)
        self._known: dict[tuple[int, tuple[int, ...], bytes], str] = {}

    def name(self) -> str:
        """A name that nothing has yet."""
        return next(self._names)

    def node(self, op: str, inputs: Sequence[str], output: str = "", **attributes: Attribute) -> str:
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
        if name:
            made.name = name
        if domain:
            made.domain = domain
            self.domains.add(domain)
        made.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self.nodes.append(made)

    def constant(self, values: np.ndarray | np.generic, kind: int = 0) -> str:
        """The name of an initializer with these values, of ``TensorProto`` type ``kind`` (by default their own).

        Integers of a type of 2 or 4 bits are packed four or two a byte.
        """
        if kind in _FIELDS:
            raw = pack_fields(np.asarray(values), _FIELDS[kind]).tobytes()
            if _FIELDS[kind] == 2:
                self.opset = OPSET_2_BITS
        else:
            kind, raw = int(helper.np_dtype_to_tensor_dtype(values.dtype)), np.ascontiguousarray(values).tobytes()
        # A digest, so that the bytes of a large model are not kept twice.
        key = (kind, values.shape, raw if len(raw) <= 32 else hashlib.sha256(raw).digest())
        if key not in self._known:
            self._known[key] = self.name()
            self.model.graph.initializer.add(name=self._known[key], data_type=kind, dims=values.shape, raw_data=raw)
        return self._known[key]
