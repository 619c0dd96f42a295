"""What this machine's processor makes of integer products."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_FLAGS_OF_VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8"})
_ARM = ("arm", "aarch")


def needs_reduced_range(machine: str | None = None, cpuinfo: Path = CPUINFO) -> bool:
    """Whether int8 weights should keep to 7 bits (-64 ... 63) on this machine.

    An x86 processor without VNNI multiplies unsigned by signed bytes with ``vpmaddubsw``, which adds two products into
    16 bits and saturates at 32,767: 2 * 255 * 127 does not fit, 2 * 255 * 64 does (onnxruntime's quantization guide,
    "when and why do I need to try U8U8 / reduce_range").  VNNI and ARM's dot products add into 32 bits, so there the
    full range is exact.  Where an x86 processor's flags cannot be read, the answer is the safe one.

    Args:
        machine: the architecture, as ``platform.machine()`` names it (the default).
        cpuinfo: where Linux lists the processor's flags.
    """
    if (machine or platform.machine()).lower().startswith(_ARM):
        return False
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])
    return not _FLAGS_OF_VNNI & set(flags)


@cache
def int8_weight_bits() -> int:
    """The most bits of int8 weights whose products are exact on this machine: 8, or 7 where sums would saturate."""
    return 7 if needs_reduced_range() else 8
