"""What is exported: a model with inputs to calibrate on and, where there are labels, data to score it on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.errors import UsageError, unknown_name
from autocompress.exporting.metrics import Origin
from autocompress.exporting.samples import Samples, read_samples
from autocompress.plan import Metric
from autocompress.progress import Progress, SilentProgress
from autocompress.tasks import load_task
from autocompress.tasks.base import Task, correctness
from autocompress.tasks.custom import OPTIONAL, REQUIRED, call_function, metric_of, task_function
from autocompress.tasks.registry import MODELS
from autocompress.tasks.splits import TensorSplit
from autocompress.tasks.weights import load_weights

Score = Callable[[Tensor, Tensor], Tensor]

DEFAULT_TASK = "digits"

HELD_OUT = 256
"""Calibration samples beyond those asked for that outputs are compared on where there is no other data."""

EXAMPLES = 2
"""Samples a model is read with."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and its data.

    Attributes:
        name: what the export is called after.
        model: a copy in evaluation mode on the CPU that takes its inputs by position.
        calibration: what ranges are chosen on.
        compared: what the outputs of original and export are compared on, and ``compared_on``, its name.
        scored: splits with targets, by name.
        metric: what ``score`` measures.
        score: from outputs and targets to one number a sample.
        origin: how to get the data again; None where the caller brought objects.
        output_names: what the model itself calls its outputs; empty where it gives no dict.
    """

    name: str
    model: nn.Module
    calibration: Samples | TensorSplit
    compared: Samples | TensorSplit
    compared_on: str
    scored: Mapping[str, Samples | TensorSplit] = field(default_factory=dict)
    metric: Metric = field(default_factory=Metric)
    score: Score = correctness
    origin: Origin | None = None
    output_names: tuple[str, ...] = ()

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        return self.calibration.batch(slice(0, EXAMPLES)).inputs


def origin_of(model: str, task: str | None, weights: str | Path | None, data: str | Path | None) -> Origin:
    """What was given, with paths that hold from any working directory."""
    paths = [None if path is None else str(Path(path).expanduser().absolute()) for path in (weights, data)]
    return Origin(model=model, task=task, weights=paths[0], data=paths[1])


def load_subject(origin: Origin, samples: int, seed: int = 0, progress: Progress | None = None) -> Subject:
    """What the command line's MODEL means.

    Args:
        origin: a model's name with its task, or ``module:function``, which returns a mapping with ``model`` and
            ``calibration`` (or ``train``) and, where accuracy is wanted, ``validation`` and ``test``.
        samples: how many calibration samples will be used.
        seed: passed to the function, if it takes one.
        progress: told how a training goes.

    Raises:
        UsageError: a name, a file or an entry does not exist or does not fit.
    """
    if origin.task is None and ":" in origin.model:
        return _returned(origin, samples, seed)
    if origin.task is None and origin.model not in MODELS:
        error = unknown_name("model", origin.model, MODELS)
        raise UsageError(
            f"{error}; with --task any torchvision classifier can be named too, and your own model is module:function"
        )
    return _of_task(_task(origin, progress or SilentProgress()), origin)


def make_subject(model: nn.Module, calibration: object, test: object = None, samples: int = 128) -> Subject:
    """A subject of objects in memory: a module, inputs of any form that ``read_samples`` takes, and a test set."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}; give a torch.nn.Module, a name or module:function")
    if calibration is None:
        raise UsageError(
            "there is no calibration data, and the ranges of activations are chosen on it; give calibration=: a "
            "tensor, a dict of tensors or a DataLoader of real inputs"
        )
    fields = {"model": model, "calibration": calibration} | ({} if test is None else {"test": test})
    return _assembled(type(model).__name__, fields, samples)


def _task(origin: Origin, progress: Progress) -> Task:
    name = origin.task or DEFAULT_TASK
    model = None if ":" in name else origin.model
    if model is None and origin.model != name:
        raise UsageError(f"--task {name!r} brings its own model: leave out --task and give {name!r} as MODEL")
    return load_task(name, model, weights=origin.weights, data=origin.data, progress=progress)


def _of_task(task: Task, origin: Origin) -> Subject:
    return Subject(
        name=origin.model,
        model=task.model,
        calibration=task.split("calibration"),
        compared=task.split("test"),
        compared_on="test",
        scored={name: task.split(name) for name in ("validation", "test")},
        metric=task.metric,
        score=task.score_function,
        origin=origin,
    )


def _returned(origin: Origin, samples: int, seed: int) -> Subject:
    """The subject that a user's function describes."""
    reference = origin.model
    function = task_function(reference)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        returned = call_function(function, None if origin.data is None else Path(origin.data), seed)
        if isinstance(returned, Task):
            if origin.weights is not None:
                raise UsageError(f"--weights: {reference!r} returns a whole Task, whose model has its weights already")
            return _of_task(returned, origin)
        if isinstance(returned, nn.Module):
            raise UsageError(
                f"{reference!r} returned a module without calibration data; give --task T, whose data it is for, or "
                "return {'model': module, 'calibration': loader}"
            )
        fields = _fields(reference, returned)
        if origin.weights is not None:
            load_weights(fields["model"], Path(origin.weights).expanduser())
        return _assembled(reference, fields, samples, origin)


def _fields(reference: str, returned: object) -> dict[str, Any]:
    """What the function returned, by name; only a model and data to calibrate on are needed."""
    allowed = (*REQUIRED, *OPTIONAL)
    if isinstance(returned, Mapping):
        for name in returned:
            if name not in allowed:
                raise unknown_name(f"entry of {reference}:", str(name), allowed)
        fields = {str(key): value for key, value in returned.items() if value is not None}
    else:
        fields = {name: getattr(returned, name) for name in allowed if getattr(returned, name, None) is not None}
    if not isinstance(fields.get("model"), nn.Module):
        given = type(fields["model"]).__name__ if "model" in fields else "missing"
        raise UsageError(f"{reference!r} must return a mapping with 'model', a torch.nn.Module; it is {given}")
    if "calibration" not in fields and "train" not in fields:
        raise UsageError(
            f"{reference!r} returned no calibration data, on which the ranges of activations are chosen; add "
            "'calibration' (or 'train'): tensors, a Dataset or a DataLoader of real inputs"
        )
    return fields


def _assembled(name: str, fields: Mapping[str, Any], samples: int, origin: Origin | None = None) -> Subject:
    model = copy.deepcopy(fields["model"]).cpu().eval()
    source = "calibration" if "calibration" in fields else "train"
    read = read_samples(model, fields[source], source, max(samples, EXAMPLES) + HELD_OUT)
    if len(read) < EXAMPLES:
        raise UsageError(f"{source} has {len(read)} sample; a model is read with {EXAMPLES} at least")
    scored: dict[str, Samples | TensorSplit] = {}
    for split in ("validation", "test"):
        if split in fields:
            found = read_samples(model, fields[split], split)
            if found.names != read.names or len(found.inputs) != len(read.inputs):
                raise UsageError(f"the batches of {split} hold other inputs than those of {source}")
            scored[split] = found
    model, output_names = by_position(model, read)
    score = fields.get("score") or correctness
    for split, judged in scored.items():
        _check_score(model, judged, score, split)
    kept, rest = read.take(slice(0, samples)), read.take(slice(samples, None))
    compared: tuple[str, Samples | TensorSplit] = ("calibration", kept)
    if len(rest):
        compared = ("held-out calibration", rest)
    for split in ("validation", "test"):
        compared = (split, scored[split]) if split in scored else compared
    return Subject(
        name=str(fields.get("model_name") or name),
        model=model,
        calibration=kept if len(kept) >= EXAMPLES else read,
        compared=compared[1],
        compared_on=compared[0],
        scored={split: found for split, found in scored.items() if found.targets is not None},
        metric=metric_of(name, fields.get("metric"), fields.get("score") is not None),
        score=score,
        origin=origin,
        output_names=output_names,
    )


def _check_score(model: nn.Module, samples: Samples | TensorSplit, score: Score, split: str) -> None:
    """Scores two samples: what does not fit shows before any work is done."""
    batch = samples.batch(slice(0, EXAMPLES))
    if batch.target is None:
        return
    with torch.no_grad():
        outputs = model(*batch.inputs)
    outputs = outputs if isinstance(outputs, Tensor) else outputs[0]
    shapes = f"outputs {tuple(outputs.shape)} and targets {tuple(batch.target.shape)}"
    try:
        given = score(outputs, batch.target)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"the score fails on the {shapes} of {split}: {error}; give 'score', or no targets") from error
    if tuple(given.shape) != (len(batch),):
        raise UsageError(
            f"the score gives shape {tuple(given.shape)} for the {shapes} of {split}; it must give one number a "
            "sample: give 'score', or no targets"
        )


def by_position(model: nn.Module, samples: Samples) -> tuple[nn.Module, tuple[str, ...]]:
    """A model that takes the samples' inputs by position and gives tensors; ``model`` itself where it does already.

    Returns:
        That model, and what it called its outputs where it gave a dict of them.

    Raises:
        UsageError: it fails on its own data, or what it gives holds no tensors.
    """
    names, parameters = samples.names, inspect.signature(model.forward).parameters
    unknown = [name for name in names or () if name not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise unknown_name(f"argument of {type(model).__name__}.forward:", unknown[0], parameters)
    example = samples.batch(slice(0, EXAMPLES)).inputs
    shapes = ", ".join(f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in example)
    try:
        with torch.no_grad():
            outputs = model(*example) if names is None else model(**dict(zip(names, example, strict=True)))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"{type(model).__name__} fails on inputs {shapes}: {error}") from error
    first = names or tuple(parameters)[: len(example)]
    output_names: tuple[str, ...] = ()
    if isinstance(outputs, Mapping) or tuple(parameters)[: len(first)] != first:
        model = _named(model, first)
    if isinstance(outputs, Mapping):
        output_names = tuple(str(key) for key, value in outputs.items() if isinstance(value, Tensor))
        outputs = tuple(value for value in outputs.values() if isinstance(value, Tensor))
    flat = (outputs,) if isinstance(outputs, Tensor) else outputs
    if not isinstance(flat, (tuple, list)) or not flat or not all(isinstance(value, Tensor) for value in flat):
        raise UsageError(
            f"{type(model).__name__} gives a {type(outputs).__name__}; it must give tensors or a dict of them"
        )
    return model, output_names


def _named(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The same module, whose ``forward`` takes just these arguments and gives a tuple instead of a dict.

    A subclass rather than a wrapper: layers keep the names they have in the user's own module.
    """
    kind = type(model)

    def forward(self: nn.Module, *inputs: Tensor) -> Any:
        outputs = kind.forward(self, **dict(zip(names, inputs, strict=True)))
        if isinstance(outputs, Mapping):
            return tuple(value for value in outputs.values() if isinstance(value, Tensor))
        return outputs

    parameter = inspect.Parameter
    arguments = [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    made = copy.copy(model)
    made.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return made
