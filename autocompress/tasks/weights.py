"""Reads checkpoints without ever unpickling code."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autocompress.errors import UsageError, nearest_names

log = logging.getLogger(__name__)

NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net", "ema", "weights")
"""Keys under which training scripts put the state dict beside their own state."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pt`` file by parameter name.

    Raises:
        UsageError: the file is missing, is of another kind, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise UsageError(f"weights {str(path)!r} do not exist; give a .safetensors or .pt file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"weights {str(path)!r} are not a readable safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"weights {str(path)!r} hold Python objects or are no checkpoint at all, and unpickling could run any "
            "code; save only the tensors: torch.save(model.state_dict(), PATH)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"weights {str(path)!r} are not a readable checkpoint: {first_line}") from error
    return _find_tensors(content, path)


def _find_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, which may lie beside an optimizer's state."""
    if isinstance(content, Mapping):
        for key in NESTED_UNDER:
            if isinstance(content.get(key), Mapping):
                return _find_tensors(content[key], path)
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise UsageError(
        f"weights {str(path)!r} hold a {type(content).__name__} without tensors; "
        f"expected a state dict, or one under any of {', '.join(NESTED_UNDER)}"
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a checkpoint into a model, every tensor of it.

    Raises:
        UsageError: the file cannot be read, or its names or shapes are not the model's.
    """
    wanted = model.state_dict()
    given = _without_prefix(read_state_dict(path), wanted)
    # A count of batches seen: absent from old checkpoints, and without effect on the outputs.
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in given and name not in optional]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} is {tuple(given[name].shape)} but the model's is {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    problems = [
        _summary("missing", missing),
        _summary("not in the model", unexpected),
        _summary("of another shape", shapes),
    ]
    if any(problems):
        hint = ""
        if missing and unexpected:
            hint = f"; nearest to {missing[0]!r}: {nearest_names(missing[0], unexpected)[0]!r}"
        raise UsageError(
            f"weights {str(path)!r} do not fit the model ({len(wanted)} tensors): "
            f"{'; '.join(p for p in problems if p)}{hint}; check the model's name, its classes and its channels"
        )
    model.load_state_dict(given, strict=False)


def _without_prefix(given: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Drops prefixes that every name has and the model's names don't."""
    names = dict(given)
    known = set(wanted)
    dropped = True
    while dropped and not known & set(names):
        dropped = False
        for prefix in PREFIXES:
            if names and all(name.startswith(prefix) for name in names):
                names = {name.removeprefix(prefix): value for name, value in names.items()}
                dropped = True
    return names


def _summary(problem: str, names: list[str], shown: int = 4) -> str:
    if not names:
        return ""
    more = f", ... ({len(names)} in all)" if len(names) > shown else ""
    return f"{len(names)} {problem}: {', '.join(names[:shown])}{more}"
