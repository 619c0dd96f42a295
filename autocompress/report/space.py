"""What the plans of a run decide on: its layers in order, and the size of each channel group."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autocompress.plan import CompressionPlan


@dataclass(frozen=True)
class SpaceSummary:
    """The layers a plan decides on, in execution order, and the full size of each channel group."""

    layers: tuple[str, ...]
    group_sizes: Mapping[str, int]

    def keep_ratio(self, plan: CompressionPlan, group: str) -> float:
        """The share of the original's channels that a plan keeps in a group."""
        size = self.group_sizes[group]
        width = plan.base.width if plan.base.kind == "student" else 1.0
        return plan.groups.get(group, round(size * width)) / size if size else 1.0


def read_space(path: Path, plans: Iterable[CompressionPlan]) -> SpaceSummary:
    """The summary from ``space.json`` (its ``layers`` and ``groups``), completed by what the plans mention.

    ``groups`` may be ``{id: size}``, ``{id: {"size": n}}`` or ``[{"id", "size"}]``, ``layers`` names or
    ``[{"name"}]``, both at the top or under ``graph``.  Without a file, the largest count seen is a group's size.
    """
    layers: dict[str, None] = {}
    sizes: dict[str, int] = {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = {}
    for holder in (stored, stored.get("graph")) if isinstance(stored, dict) else ():
        if isinstance(holder, dict):
            layers.update(dict.fromkeys(_names(holder.get("layers"))))
            sizes.update(_sizes(holder.get("groups")))
    known_layers, known_groups = bool(layers), set(sizes)
    decided: dict[str, None] = {}
    for plan in plans:
        decided.update(dict.fromkeys(plan.layers))
        for group, count in plan.groups.items():
            if group not in known_groups:
                sizes[group] = max(sizes.get(group, 0), count)
    if known_layers and decided:
        # space.json may list every operator; only those that some plan decides on are worth a row.
        ordered = [name for name in layers if name in decided]
        decided = dict.fromkeys([*ordered, *decided])
    return SpaceSummary(tuple(decided or layers), sizes)


def _names(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(key) for key in value]
    if not isinstance(value, list):
        return []
    found = [item.get("name") if isinstance(item, dict) else item for item in value]
    return [name for name in found if isinstance(name, str)]


def _sizes(value: Any) -> dict[str, int]:
    if isinstance(value, list):
        value = {item.get("id"): item for item in value if isinstance(item, dict)}
    if not isinstance(value, dict):
        return {}
    found = {key: item.get("size") if isinstance(item, dict) else item for key, item in value.items()}
    return {str(key): size for key, size in found.items() if isinstance(size, int) and not isinstance(size, bool)}
