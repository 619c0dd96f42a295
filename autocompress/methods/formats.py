"""Which weight layers may compute in what, with weights stored how; and why another choice is refused."""

from __future__ import annotations

from collections.abc import Mapping

from autocompress.errors import UsageError
from autocompress.plan import FLOAT16, FLOAT32, Compute, Layer, LayerPlan, NumFormat

BLOCK = 128
"""Weights that share one scale unless another number is asked for: what MatMulNBits is fastest with."""

INTEGERS = tuple(NumFormat(bits=bits) for bits in (8, 7, 6, 5, 4, 3, 2))
"""Integers with a scale for each output channel."""

CODEBOOKS = tuple(
    NumFormat(bits=bits, scheme="codebook", granularity=granularity)
    for granularity in ("tensor", "channel")
    for bits in (4, 3, 2)
)

BLOCKS = tuple(NumFormat(bits=bits, granularity="block", block=block) for block in (128, 64, 32) for bits in (8, 4, 2))

STORAGES: Mapping[Compute, tuple[NumFormat, ...]] = {
    "fp32": (FLOAT32, FLOAT16, *INTEGERS, *CODEBOOKS),
    "fp16": (FLOAT16,),
    "int8": (*INTEGERS, *CODEBOOKS),
    "int8_dynamic": (*INTEGERS, *CODEBOOKS),
    "weight_only": BLOCKS,
}
"""The formats that weights may be stored in, by what their layer computes in."""


def is_integer(storage: NumFormat) -> bool:
    """Whether weights are stored as integers, and so have scales."""
    return storage.scheme in ("affine", "codebook")


def describe(storage: NumFormat) -> str:
    """A format in words.

    >>> describe(NumFormat(bits=4, granularity="block", block=32))
    'affine of 4 bits in blocks of 32'
    """
    text = f"{storage.scheme} of {storage.bits} bits"
    if storage.scheme == "float":
        return text
    text = text if storage.symmetric else f"asymmetric {text}"
    return (
        f"{text} in blocks of {storage.block}" if storage.granularity == "block" else f"{text} a {storage.granularity}"
    )


def refusal(layer: Layer, plan: LayerPlan) -> str:
    """Why a layer cannot be what a plan says, with what it can be instead; empty where it can."""
    if layer.op == "Gather" and (plan.compute != "fp32" or plan.storage.granularity == "block"):
        return "a table of rows computes nothing; give it fp32 with integer storage"
    if layer.op == "Conv" and plan.compute in ("int8_dynamic", "weight_only"):
        kernel = (
            "ONNX Runtime executes ConvInteger 4 to 20 times slower than the float convolution"
            if plan.compute == "int8_dynamic"
            else "MatMulNBits multiplies matrices only"
        )
        instead = "int8" if plan.compute == "int8_dynamic" else "int8 or fp32 with integer storage"
        return f"a convolution cannot compute in {plan.compute}: {kernel}; give it {instead}"
    if plan.compute in ("int8_dynamic", "weight_only"):
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
        odd = [name for name, usual in plain.items() if layer.attributes.get(name, usual) != usual]
        if odd:
            return f"a Gemm with {', '.join(odd)} cannot compute in {plan.compute}; give it fp32 or int8"
    known = {_shape(storage) for storage in STORAGES[plan.compute]}
    if _shape(plan.storage) not in known:
        allowed = ", ".join(dict.fromkeys(describe(storage) for storage in STORAGES[plan.compute]))
        return f"{plan.compute} cannot take weights stored as {describe(plan.storage)}; allowed: {allowed}"
    return ""


def _shape(storage: NumFormat) -> tuple[object, ...]:
    """What tells formats apart; of floats only their bits do."""
    if storage.scheme == "float":
        return ("float", storage.bits)
    return (storage.scheme, storage.bits, storage.symmetric, storage.granularity, storage.block)


def check_layer(layer: Layer, plan: LayerPlan) -> None:
    """Raises UsageError where ``refusal`` has something to say."""
    reason = refusal(layer, plan)
    if reason:
        raise UsageError(f"layer {layer.name!r}: {reason}")
