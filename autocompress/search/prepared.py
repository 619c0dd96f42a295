"""What a search needs before it begins: everything that can fail for a reason of the caller's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from autocompress.config import RunConfig
from autocompress.devices import resolve_device
from autocompress.hardware.profile import HardwareProfile, load_hardware
from autocompress.progress import Progress
from autocompress.runtime.base import load_runtime
from autocompress.search.reuse import Identity
from autocompress.search.samplers import resolved
from autocompress.search.target import check_known
from autocompress.spaces import SearchSpace, load_space
from autocompress.tasks import load_task
from autocompress.tasks.base import Task
from autocompress.tasks.splits import Normalisation


@dataclass(frozen=True)
class Prepared:
    """The loaded subjects of a configuration.

    Args:
        space: what is searched.
        task: the original and its data.
        teacher: the model that recovery follows; the original itself unless another was named.
        profile: what plans are priced on.
        identity: what a later search has to share to take up the run.
    """

    space: SearchSpace
    task: Task
    teacher: nn.Module
    profile: HardwareProfile
    identity: Identity


def prepare(config: RunConfig, progress: Progress) -> Prepared:
    """Loads what a configuration names, before a run directory is made.

    Raises:
        UsageError: something named does not exist or does not fit, said with the flag or file it came from.
    """
    with config.citing("runtime"):
        load_runtime(config.runtime)
    with config.citing("sampler"):
        resolved(config.sampler)
    with config.citing("device"):
        resolve_device(config.device)
    space = load_space(config.space)
    task = task_of(config, progress)
    teacher = teacher_of(config, task, progress)
    profile = load_hardware(config.hardware, config.threads, config.batch, runtime=config.runtime, progress=progress)
    check_known(config, profile)
    return Prepared(space, task, teacher, profile, Identity.of(config, space, task, profile))


def task_of(config: RunConfig, progress: Progress) -> Task:
    """The task that a configuration names; what is wrong with it is said with the flag or file it came from."""
    given = config.normalisation
    with config.citing("task", "model", "weights", "data"):
        return load_task(
            config.task,
            config.model,
            weights=config.weights,
            data=config.data,
            progress=progress,
            input_size=config.input_size,
            normalisation=None if given is None else Normalisation(given.mean, given.std),
        )


def teacher_of(config: RunConfig, task: Task, progress: Progress) -> nn.Module:
    """The model that teaches: another one of the same task where ``teacher`` names it, else the original."""
    if config.teacher is None:
        return task.model
    with config.citing("teacher"):
        return task_of(config.model_copy(update={"model": config.teacher, "weights": None}), progress).model
