"""Names for the parts that can be extended: each maps to ``module:attribute`` and is imported on first use.

Another package adds to a registry with an entry point in the group ``autocompress.<kind>``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from autocompress.errors import UsageError, unknown_name


class Registry(Mapping[str, str]):
    """Maps a name to the object it stands for, importing it when it is first asked for.

    >>> Registry("number", {"tau": "math:tau"}).load("tau") > 6
    True
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._plugins_read = False

    def _all(self) -> dict[str, str]:
        if not self._plugins_read:
            for point in entry_points(group=f"autocompress.{self.kind}"):
                self._entries.setdefault(point.name, point.value)
            self._plugins_read = True
        return self._entries

    def __getitem__(self, name: str) -> str:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def load(self, name: str) -> Any:
        """The object registered as ``name``; an unknown name lists the known ones."""
        if name not in self:
            raise unknown_name(self.kind, name, self)
        return import_object(self[name])


def import_object(reference: str) -> Any:
    """Imports ``package.module:attribute``."""
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"{reference!r} is not of the form 'module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not module_name.startswith(error.name):
            raise
        raise UsageError(
            f"no module named {module_name!r} (from {reference!r}); is its folder on PYTHONPATH?"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise unknown_name(f"attribute of {module_name}", attribute, public) from error
