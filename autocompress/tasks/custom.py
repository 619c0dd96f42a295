"""A user's own task: ``module:function``, which returns a model, its data and how it is judged.

The function takes no arguments, or any of the keywords ``data`` (the directory given, or None) and ``seed``.  It
returns a ``Task``, or a mapping or object with these names:

========================= ============================================================================================
``model``                 the trained ``torch.nn.Module``; it takes one float32 tensor
``train``, ``validation`` each a ``DataLoader``, a ``Dataset``, a pair of tensors ``(inputs, targets)``, or anything
and ``test``              that can be iterated more than once and yields ``(inputs, targets)`` batches
``calibration``           optional, likewise; without it, up to 512 samples are taken out of ``train``
                          (``train`` and ``calibration`` may come without targets, as one tensor or batches of inputs:
                          recovery then follows the teacher alone)
``loss``                  optional, ``(outputs, targets) -> scalar``; cross-entropy by default
``metric``                optional, a ``Metric``, or a name if higher is better; ``accuracy`` by default
``score``                 optional, ``(outputs, targets) -> [N]``, whose mean is the metric; needed for another metric
``factory``               optional, rebuilds the model untrained; may take ``width`` and ``depth``
``name``, ``model_name``  optional, for reports
========================= ============================================================================================
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from autocompress.errors import UsageError, unknown_name
from autocompress.plan import Metric
from autocompress.registry import import_object
from autocompress.tasks.base import Task, correctness, cross_entropy
from autocompress.tasks.sound import check_sound
from autocompress.tasks.splits import SPLITS, Batch, Source, TensorSource, TensorSplit, make_disjoint

log = logging.getLogger(__name__)

CALIBRATION_SAMPLES = 512
BATCH_SIZE = 128
LIMIT_BYTES = 4 * 2**30
"""The largest split that is collected into memory."""

UNLABELLED = ("train", "calibration")
"""Splits that may come without targets."""

REQUIRED = ("model", "train", "validation", "test")
OPTIONAL = ("calibration", "loss", "metric", "score", "factory", "name", "model_name")


@dataclass(frozen=True)
class LoaderSource:
    """A user's own iterable of batches, beside what one pass over it gave."""

    loader: Iterable[Any]
    split: TensorSplit

    def __iter__(self) -> Iterator[Batch]:
        for item in self.loader:
            inputs, targets = _pair(item, "train")
            yield Batch((inputs,), targets)

    def tensors(self) -> TensorSplit:
        return self.split


def custom_task(reference: str, data: Path | None = None, seed: int = 0) -> Task:
    """Calls a user's function and makes a checked task of what it returns.

    Args:
        reference: ``module:function``.
        data: passed on, if the function takes ``data``.
        seed: passed on, if the function takes ``seed``; also fixes the order in which loaders are read.

    Raises:
        UsageError: something is missing or does not fit; the message says what.
    """
    function = task_function(reference)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        returned = call_function(function, data, seed)
        if isinstance(returned, Task):
            return _checked(dataclasses.replace(returned, model=_own(returned.model)))
        return _checked(_assemble(reference, _fields(reference, returned), seed))


def task_function(reference: str) -> Callable[..., object]:
    """A user's ``module:function``; import it before any seed is set, for a first import may draw random numbers."""
    function = import_object(reference)
    if not callable(function):
        raise UsageError(f"task {reference!r} is a {type(function).__name__}, not a function that returns a task")
    return function  # type: ignore[no-any-return]


def call_function(function: Callable[..., object], data: Path | None, seed: int) -> object:
    """What a user's function returns, given those of ``data`` and ``seed`` that it takes."""
    known = inspect.signature(function).parameters
    return function(**{key: value for key, value in {"data": data, "seed": seed}.items() if key in known})


def _own(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode: the caller's module stays as it is."""
    return copy.deepcopy(model).cpu().eval()


def _fields(reference: str, returned: object) -> dict[str, Any]:
    """What the user returned, by name."""
    allowed = (*REQUIRED, *OPTIONAL)
    if isinstance(returned, Mapping):
        for name in returned:
            if name not in allowed:
                raise unknown_name(f"entry of task {reference}:", str(name), allowed)
        fields = dict(returned)
    else:
        fields = {name: getattr(returned, name) for name in allowed if hasattr(returned, name)}
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing:
        raise UsageError(
            f"task {reference!r} returned a {type(returned).__name__} without {', '.join(missing)}; "
            f"needed: {', '.join(REQUIRED)}; optional: {', '.join(OPTIONAL)}"
        )
    if not isinstance(fields["model"], nn.Module):
        raise UsageError(f"task {reference!r}: model is a {type(fields['model']).__name__}, not a torch.nn.Module")
    return fields


def _assemble(reference: str, fields: Mapping[str, Any], seed: int) -> Task:
    metric = metric_of(reference, fields.get("metric"), fields.get("score") is not None)
    factory = fields.get("factory")
    accepts = frozenset(inspect.signature(factory).parameters) & {"width", "depth"} if factory else frozenset()
    return Task(
        name=str(fields.get("name") or reference),
        model_name=str(fields.get("model_name") or type(fields["model"]).__name__),
        model=_own(fields["model"]),
        sources=_sources(fields, seed),
        metric=metric,
        factory=factory,
        accepts=frozenset(accepts),
        loss_function=fields.get("loss") or cross_entropy,
        score_function=fields.get("score") or correctness,
    )


def metric_of(reference: str, given: object, has_score: bool) -> Metric:
    """The metric a user gave, or accuracy."""
    metric = Metric() if given is None else Metric(name=given, unit="") if isinstance(given, str) else given
    if metric == Metric(name="accuracy", unit=""):
        metric = Metric()
    if not isinstance(metric, Metric):
        raise UsageError(f"task {reference!r}: metric is a {type(given).__name__}; give a name or a Metric")
    if metric.name != "accuracy" and not has_score:
        raise UsageError(
            f"task {reference!r}: metric {metric.name!r} needs a score: (outputs, targets) -> one number a sample"
        )
    return metric


def _sources(fields: Mapping[str, Any], seed: int) -> dict[str, Source]:
    """The four splits: collected once, made disjoint, and for training the user's own loader where possible."""
    splits = {name: _collect(name, fields[name]) for name in SPLITS if fields.get(name) is not None}
    own_loader = not isinstance(fields["train"], (Tensor, tuple, TensorSplit, Dataset))
    if "calibration" not in splits:
        train = splits["train"]
        if len(train) < 2:
            raise UsageError("the task's train split has 1 sample, none to spare for calibration; give calibration too")
        count = min(CALIBRATION_SAMPLES, max(1, len(train) // 5))
        splits["calibration"], splits["train"] = train.take(slice(0, count)), train.take(slice(count, None))
        own_loader = False  # it would yield the calibration samples too
    disjoint = make_disjoint(splits)
    own_loader = own_loader and len(disjoint["train"]) == len(splits["train"])
    for name, split in disjoint.items():
        if not len(split):
            raise UsageError(f"the task's {name} split is empty once samples of the other splits are left out")
    sources: dict[str, Source] = {name: TensorSource(split, BATCH_SIZE) for name, split in disjoint.items()}
    if own_loader:
        sources["train"] = LoaderSource(fields["train"], disjoint["train"])
    else:
        generator = torch.Generator().manual_seed(seed)
        sources["train"] = TensorSource(disjoint["train"], BATCH_SIZE, generator)
    return sources


def _collect(name: str, given: Any) -> TensorSplit:
    """A split in memory."""
    if isinstance(given, TensorSplit):
        if given.labels is None and name not in UNLABELLED:
            raise UsageError(f"the task's {name} has no targets, on which models are scored; give (inputs, targets)")
        return given
    if isinstance(given, Tensor) or (
        isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given)
    ):
        return TensorSplit(*_pair(given, name))
    if isinstance(given, Dataset):
        given = DataLoader(given, batch_size=BATCH_SIZE)
    if not isinstance(given, Iterable):
        raise UsageError(f"the task's {name} is a {type(given).__name__}; give a DataLoader, a Dataset or two tensors")
    if isinstance(given, Iterator):
        raise UsageError(f"the task's {name} can be read only once; give a DataLoader or a list instead of an iterator")
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    unlabelled = 0
    size = 0
    for item in given:
        batch_inputs, batch_targets = _pair(item, name)
        inputs.append(batch_inputs)
        if batch_targets is None:
            unlabelled += 1
        else:
            targets.append(batch_targets)
        size += batch_inputs.nbytes
        if size > LIMIT_BYTES:
            if name == "train":
                log.warning("train is larger than %d GiB; its first part is used", LIMIT_BYTES >> 30)
                break
            raise UsageError(f"the task's {name} split is larger than {LIMIT_BYTES >> 30} GiB; give a part of it")
    if not inputs:
        raise UsageError(f"the task's {name} split is empty")
    if targets and unlabelled:
        raise UsageError(
            f"{unlabelled} of {len(inputs)} batches of the task's {name} have no targets; give all or none"
        )
    try:
        return TensorSplit(torch.cat(inputs), torch.cat(targets) if targets else None)
    except RuntimeError as error:
        raise UsageError(f"the batches of the task's {name} split differ in shape: {error}") from error


def _pair(item: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Inputs and targets of one batch, on the CPU; None for the targets of a batch that has none and needs none."""
    if isinstance(item, Batch):
        item = (item.inputs, item.target)
    if name in UNLABELLED and isinstance(item, Tensor):
        item = (item, None)
    elif name in UNLABELLED and isinstance(item, (tuple, list)) and len(item) == 1:
        item = (item[0], None)  # a TensorDataset of inputs alone
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise UsageError(f"a batch of the task's {name} is a {type(item).__name__}; expected (inputs, targets)")
    inputs, targets = item
    if isinstance(inputs, (tuple, list)):
        if len(inputs) != 1:
            raise UsageError(f"a batch of the task's {name} has {len(inputs)} inputs; models with one are supported")
        inputs = inputs[0]
    lacking = targets is None and name in UNLABELLED
    if not isinstance(inputs, Tensor) or not (lacking or isinstance(targets, Tensor)):
        kinds = f"({type(inputs).__name__}, {type(targets).__name__})"
        raise UsageError(f"a batch of the task's {name} is {kinds}; expected two tensors")
    if not inputs.is_floating_point():
        raise UsageError(f"the inputs of the task's {name} are {inputs.dtype}; make them normalised float32")
    if not lacking and len(inputs) != len(targets):
        raise UsageError(f"a batch of the task's {name} has {len(inputs)} inputs but {len(targets)} targets")
    return inputs.detach().cpu().to(torch.float32), None if lacking else targets.detach().cpu()


def _checked(task: Task) -> Task:
    """Runs the model, the score and the loss on two samples: what does not fit shows here, in plain words."""
    data = task.split("validation")
    batch = data.batch(slice(0, 2))
    assert batch.target is not None
    try:
        with torch.no_grad():
            outputs = task.forward(task.model, batch)
    except Exception as error:
        shape = tuple(batch.inputs[0].shape)
        raise UsageError(f"task {task.name!r}: the model fails on inputs {shape}: {error}") from error
    if not isinstance(outputs, Tensor):
        raise UsageError(f"task {task.name!r}: the model returns a {type(outputs).__name__}; it must return one tensor")
    if task.score_function is correctness and (
        outputs.ndim != 2 or data.targets.ndim != 1 or data.targets.is_floating_point()
    ):
        raise UsageError(
            f"task {task.name!r}: accuracy needs outputs [N, classes] and integer targets [N], but they are "
            f"{tuple(outputs.shape)} and {data.targets.dtype} {tuple(batch.target.shape)}; give a score and a metric"
        )
    try:
        score = task.score(outputs, batch.target)
        loss = task.loss(outputs, batch.target)
    except Exception as error:
        raise UsageError(
            f"task {task.name!r}: score or loss fails on outputs {tuple(outputs.shape)} and targets "
            f"{tuple(batch.target.shape)}: {error}"
        ) from error
    if tuple(score.shape) != (len(batch),):
        raise UsageError(
            f"task {task.name!r}: score gives shape {tuple(score.shape)}; it must give one number a sample"
        )
    if loss.ndim != 0:
        raise UsageError(f"task {task.name!r}: loss gives shape {tuple(loss.shape)}; it must give one number")
    check_sound(task, outputs, score, loss)
    return task
