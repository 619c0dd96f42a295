"""The names of built-in tasks and networks.  Imports no torch, so that listing them is instant."""

from __future__ import annotations

from autocompress.registry import Registry

TASKS = Registry(
    "tasks",
    {
        "digits": "autocompress.tasks.builtin:digits",
        "fashion-mnist": "autocompress.tasks.builtin:fashion_mnist",
        "cifar10": "autocompress.tasks.builtin:cifar10",
        "cifar100": "autocompress.tasks.builtin:cifar100",
    },
)
"""Data sets by name; each entry is a function ``(DataRequest) -> DataSet``."""

MODELS = Registry(
    "models",
    {
        "resnet8": "autocompress.tasks.models:resnet8",
        "resnet20": "autocompress.tasks.models:resnet20",
        "resnet56": "autocompress.tasks.models:resnet56",
        "mobilenetv2": "autocompress.tasks.models:mobilenetv2",
    },
)
"""Networks by name; each entry is a function of ``classes``, ``channels`` and, if it can, ``width`` and ``depth``."""

DEFAULT_MODELS = {"digits": "resnet8"}
"""The network of a task that names none; ``resnet20`` for the others."""

FALLBACK_MODEL = "resnet20"
