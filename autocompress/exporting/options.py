"""What can be asked of an export.  Imports no torch: what is wrong with a request shows before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autocompress.errors import UsageError, unknown_name
from autocompress.plan import FLOAT16, FLOAT32, Compute, LayerPlan, NumFormat
from autocompress.runtime.cpu import int8_weight_bits

COMPUTES: tuple[Compute, ...] = ("int8", "fp32", "fp16", "int8_dynamic", "weight_only")
"""What a layer can be asked to compute in."""

WEIGHT_BITS: dict[Compute, tuple[int, ...]] = {
    "int8": (2, 3, 4, 5, 6, 7, 8),
    "fp32": (2, 3, 4, 5, 6, 7, 8, 16, 32),
    "fp16": (16,),
    "int8_dynamic": (2, 3, 4, 5, 6, 7, 8),
    "weight_only": (2, 4, 8),
}
"""The bits a weight can be stored in under each type; the last is the default, from 16 on they are floating point.

Under static and dynamic int8 the default is 7 where this machine's processor would saturate products of 8.
"""

BLOCKS = (32, 64, 128)
"""Weights that share a scale under ``weight_only``."""

RANGES = ("auto", "minmax", "percentile", "mse", "entropy")
EQUALIZE = ("auto", "on", "off")


@dataclass(frozen=True)
class LayerRule:
    """``PATTERN=COMPUTE[:BITS]``: what the layers that a pattern matches become."""

    pattern: str
    compute: Compute
    bits: int

    @classmethod
    def parse(cls, text: str) -> LayerRule:
        """Reads one ``--layer``.

        >>> LayerRule.parse("layer1.*=int8:4")
        LayerRule(pattern='layer1.*', compute='int8', bits=4)
        """
        pattern, _, rest = text.rpartition("=")
        compute, colon, bits = rest.partition(":")
        origin = f"--layer {text!r}"
        if not pattern or not compute or (colon and not bits.isdecimal()):
            raise UsageError(f"{origin}: write PATTERN=COMPUTE or PATTERN=COMPUTE:BITS, e.g. 'layer1.*=int8:4'")
        known = _compute(compute, origin)
        return cls(pattern, known, _bits(known, int(bits) if colon else None, origin))

    def layer_plan(self, block: int) -> LayerPlan:
        """The plan of a layer under this rule."""
        return layer_plan(self.compute, self.bits, block)


@dataclass(frozen=True)
class ExportOptions:
    """A checked request.

    Attributes:
        compute: what every layer computes in, as far as it can; int8 by default, unless a plan says it.
        weight_bits: bits its weights are stored in; the largest that the type takes by default.
        block: weights that share a scale under ``weight_only``.
        layers: rules ``PATTERN=COMPUTE[:BITS]`` for some layers; a later one wins.
        plan: a delivered model's folder, its ``plan.json``, or a plan alone, which says it for every layer.
        freeze: patterns of layers that stay float32, whatever else is said of them.
        calibration_samples: inputs that ranges are chosen on.
        ranges: how: one of ``RANGES``.
        equalize: whether scales are moved between layers first: one of ``EQUALIZE``.
        bias_correction: whether biases make up for the mean error of the rounded weights.
        threads: of the timed runs.
        seed: of every sampling.
        archive: whether an entropy-coded copy is written beside the ONNX file.

    Raises:
        UsageError: a value is not one of those allowed.
    """

    compute: str | None = None
    weight_bits: int | None = None
    block: int = 128
    layers: tuple[str, ...] = ()
    plan: Path | None = None
    freeze: tuple[str, ...] = ()
    calibration_samples: int = 128
    ranges: str = "auto"
    equalize: Literal["auto", "on", "off"] = "auto"
    bias_correction: bool = True
    threads: int = 1
    seed: int = 0
    archive: bool = False

    def __post_init__(self) -> None:
        if self.plan is not None and (self.compute, self.weight_bits) != (None, None):
            raise UsageError(
                "--plan says what each layer computes in; leave out --compute and --weight-bits, and change single "
                "layers with --layer"
            )
        self.base  # noqa: B018 (checks compute and bits)
        self.rules  # noqa: B018
        for flag, value, known in (("--ranges", self.ranges, RANGES), ("--equalize", self.equalize, EQUALIZE)):
            if value not in known:
                raise unknown_name(f"{flag} value", value, known)
        least = (("--calibration-samples", self.calibration_samples, 1), ("--threads", self.threads, 1))
        for flag, number, minimum in least:
            if number < minimum:
                raise UsageError(f"{flag} {number}: give {minimum} at least")
        if self.block not in BLOCKS:
            raise UsageError(f"--block {self.block}: give one of {', '.join(map(str, BLOCKS))}; 128 is the fastest")

    @property
    def base(self) -> LayerRule:
        """The rule for every layer that no other rule names."""
        compute = _compute(self.compute or ("int8" if self.plan is None else "fp32"), "--compute")
        return LayerRule("*", compute, _bits(compute, self.weight_bits, "--weight-bits"))

    @property
    def label(self) -> str:
        """What the export is, in a word.

        >>> ExportOptions().label, ExportOptions(weight_bits=4).label
        ('int8', 'int8-w4')
        """
        if self.plan is not None:
            return "plan"
        base = self.base
        return base.compute if base.bits == WEIGHT_BITS[base.compute][-1] else f"{base.compute}-w{base.bits}"

    @property
    def rules(self) -> tuple[LayerRule, ...]:
        return tuple(LayerRule.parse(text) for text in self.layers)


def layer_plan(compute: Compute, bits: int, block: int) -> LayerPlan:
    """A layer's plan from the words of the command line."""
    if bits >= 16:
        storage = FLOAT32 if bits == 32 else FLOAT16
    elif compute == "weight_only":
        storage = NumFormat(bits=bits, granularity="block", block=block)
    else:
        storage = NumFormat(bits=bits)
    return LayerPlan(compute=compute, storage=storage)


def _compute(given: str, origin: str) -> Compute:
    for known in COMPUTES:
        if given == known:
            return known
    raise unknown_name(f"{origin} value", given, COMPUTES)


def _bits(compute: Compute, given: int | None, origin: str) -> int:
    allowed = WEIGHT_BITS[compute]
    if given is None:
        return int8_weight_bits() if compute in ("int8", "int8_dynamic") else allowed[-1]
    if given not in allowed:
        listed = ", ".join(map(str, allowed))
        raise UsageError(f"{origin}: weights of {given} bits under {compute}; it takes {listed}")
    return given
