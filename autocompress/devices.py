"""Where training happens: the CPU, or a CUDA device where there is one."""

from __future__ import annotations

import contextlib

import torch

from autocompress.errors import UsageError

CPU = torch.device("cpu")
CPU_BATCH, OTHER_BATCH = 32, 256


def forward_batch(device: torch.device) -> int:
    """Samples in a pass that trains nothing.

    On a CPU few: activations of tens of megabytes neither stay in its caches nor in the process, which gives each back
    when it is freed and has the next one's pages zeroed (MobileNetV2 at 28 x 28, two Zen 4 cores: 2.4 ms an image in
    batches of 32, 7.4 ms in batches of 256; ResNet-20 0.41 and 0.54 ms).

    >>> forward_batch(CPU)
    32
    """
    return CPU_BATCH if device.type == "cpu" else OTHER_BATCH


def resolve_device(name: str, repeatable: bool = False) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one.

    Args:
        name: as in the configuration.
        repeatable: whether the same seed must give the same models, which only the CPU does: ``auto`` is the CPU then.

    >>> resolve_device("cpu")
    device(type='cpu')

    Raises:
        UsageError: ``cuda`` is asked for, and torch sees none.
    """
    if name == "cpu" or (name == "auto" and (repeatable or not torch.cuda.is_available())):
        return CPU
    if not torch.cuda.is_available():
        raise UsageError(
            f"device {name!r}: torch {torch.__version__} sees no CUDA device; use cpu, or auto for CUDA if there is one"
        )
    return torch.device("cuda", torch.cuda.current_device())


def device_description(device: torch.device) -> str:
    """What a run says it trained on: ``cpu``, or the name of the CUDA device."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def supports_bfloat16(device: torch.device = CPU) -> bool:
    """Whether it multiplies bfloat16 in hardware; without that, autocasting to it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except AttributeError:  # private names, free to go in another torch
        return False


def autocast_context(device: torch.device = CPU) -> contextlib.AbstractContextManager[object]:
    """Mixed precision for training, where the device gains from it."""
    if supports_bfloat16(device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; to CUDA it is copied from pinned memory while the device goes on with its work."""
    if device.type != "cuda" or value.is_cuda:
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


def finish(device: torch.device) -> None:
    """Waits until the device has done what it was given: it works behind Python's back, and a clock must not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
