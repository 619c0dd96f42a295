"""What one search may choose: a menu of complete options for each coupled group of this model.

Optuna sees one categorical a knob.  A knob is a channel group with the layers that produce it, or a layer that has no
prunable group; an option says how many channels stay and what those layers compute and are stored in.  So every
combination of options is a valid plan, and coupled layers cannot disagree.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from autocompress.errors import UsageError
from autocompress.hardware.grid import keep_count
from autocompress.methods.quantization import activation_formats, gives_float
from autocompress.patterns import match_layers
from autocompress.plan import (
    FLOAT32,
    CompressionPlan,
    Compute,
    Group,
    Layer,
    LayerPlan,
    ModelGraph,
    NumFormat,
    Original,
    Student,
    digest_of,
)
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.spaces import SearchSpace


@dataclass(frozen=True)
class Option:
    """One choice of a knob; ``keep`` is None where the knob has no channel group."""

    keep: int | None
    format: LayerPlan

    @property
    def label(self) -> str:
        """Such as ``16ch-int8-w4``."""
        width = "" if self.keep is None else f"{self.keep}ch-"
        return f"{width}{self.format.compute}-w{self.format.storage.bits}"


@dataclass(frozen=True)
class Knob:
    """A categorical of the search: its layers share one option."""

    name: str
    group: str | None
    layers: tuple[str, ...]
    options: tuple[Option, ...]


def format_of(compute: Compute, bits: int) -> LayerPlan:
    """A layer plan from its two choices; 32 bits are floating point.

    Weights that are multiplied as integers have no more bits than this machine's processor multiplies exactly.
    """
    if compute == "int8" and bits == 8:
        bits = int8_weight_bits()
    storage = FLOAT32 if bits == 32 else NumFormat(bits=bits)
    return LayerPlan(compute=compute, storage=storage)


def keep_counts(size: int, shares: Iterable[float]) -> tuple[int, ...]:
    """Channel counts for shares of a group, largest first, on the grid where runtimes waste nothing.

    >>> keep_counts(64, [1.0, 0.5, 0.3])
    (64, 32, 24)
    >>> keep_counts(16, [1.0, 0.5, 0.25, 0.125])
    (16, 8, 4, 2)
    """
    return tuple(sorted({keep_count(size, share) for share in shares}, reverse=True))


class Menu:
    """The knobs of one model.

    Args:
        graph: the dense model.
        space: what the user allows.
        freeze: patterns of layers to leave as they are, beside the space's own.
        origin: what to name in errors about patterns.
    """

    def __init__(
        self, graph: ModelGraph, space: SearchSpace, freeze: Sequence[str] = (), origin: str = "--freeze"
    ) -> None:
        self.graph = graph
        names = [*(layer.name for layer in graph.compressible), *(group.id for group in graph.groups)]
        names = list(dict.fromkeys(names))
        space.check_names(names, "search space")
        frozen = match_layers(freeze, names, origin) if freeze else set()
        if space.freeze:
            frozen |= match_layers(space.freeze, names, "search space: freeze")
        self.dropped: dict[str, str] = {name: "frozen" for name in sorted(frozen)}
        self._space = space
        self.knobs = tuple(self._knobs(space, frozen))
        if not self.knobs:
            raise UsageError("the model has no Conv, Linear or constant MatMul layer: there is nothing to compress")
        self._position = {knob.name: index for index, knob in enumerate(self.knobs)}

    def _knobs(self, space: SearchSpace, frozen: set[str]) -> Iterable[Knob]:
        owners = {group.id: _producers(self.graph, group) for group in self.graph.groups}
        owned = {layer.name for layers in owners.values() for layer in layers}
        for layer in self.graph.compressible:
            if layer.name in owned:
                continue
            yield self._knob(layer.name, None, (layer.name,), space, frozen)
        for group in self.graph.groups:
            layers = tuple(layer.name for layer in owners[group.id])
            yield self._knob(group.id, group, layers, space, frozen)

    def _knob(
        self, name: str, group: Group | None, layers: tuple[str, ...], space: SearchSpace, frozen: set[str]
    ) -> Knob:
        local = space.for_name(name)
        held = bool(frozen.intersection(layers)) or name in frozen
        touched = frozen.intersection(_readers(self.graph, group)) if group else set()
        counts: tuple[int | None, ...] = (None,)
        if group is not None:
            whole = held or bool(touched)
            counts = (group.size,) if whole else keep_counts(group.size, (1.0, *local.keep))
        formats = [format_of("fp32", 32)] if held else formats_of(local)
        if any(gives_float(self.graph, self.graph.by_name[layer]) for layer in layers):
            formats = [form for form in formats if form.compute == "fp32"] or [format_of("fp32", 32)]
            self.dropped.setdefault(name, "int8 left out: an integer convolution cannot give the model's float output")
        return Knob(name, group.id if group else None, layers, tuple(Option(c, f) for c in counts for f in formats))

    def check_choice(self, origin: str) -> None:
        """Refuses a search in which every layer can only stay as it is.

        Raises:
            UsageError: citing where the space was named.
        """
        students, float32 = self._space.students, format_of("fp32", 32)
        # Every knob offers its whole width, so a single option is that.
        if all(len(knob.options) == 1 and knob.options[0].format == float32 for knob in self.knobs) and not (
            students.widths or students.depths
        ):
            raise UsageError(
                f"{origin}: there is nothing to choose: every layer can only stay as it is; allow a smaller keep, "
                "int8 or fewer weight_bits, or freeze fewer layers"
            )

    def reduced(self, options: Mapping[str, Sequence[Option]], reasons: Mapping[str, str]) -> Menu:
        """The menu with fewer options for some knobs, and why, by the knob's name."""
        made = copy.copy(self)
        made.__dict__.pop("digest", None)
        made.knobs = tuple(dataclasses.replace(k, options=tuple(options.get(k.name, k.options))) for k in self.knobs)
        made.dropped = dict(self.dropped)
        for name, reason in reasons.items():
            made.dropped[name] = f"{made.dropped[name]}; {reason}" if name in made.dropped else reason
        return made

    def named(self, knob: str) -> frozenset[str]:
        """What a rule of the space sets for this knob alone (``keep``, ``compute``, ``weight_bits``)."""
        return self._space.named(knob)

    @property
    def formats(self) -> list[LayerPlan]:
        """Every number format that some knob offers: what a layer the menu does not know may take."""
        return list(dict.fromkeys(option.format for knob in self.knobs for option in knob.options))

    # ------------------------------------------------------------------------------------------ plans and choices

    @cached_property
    def digest(self) -> str:
        """Identifies the menu: a study may only go on over the same one."""
        return digest_of(self.describe()["knobs"])

    def plan(self, choices: Sequence[int], base: Original | Student | None = None) -> CompressionPlan:
        """The plan of one option index a knob."""
        return self.plan_of([k.options[c] for k, c in zip(self.knobs, choices, strict=True)], base)

    def plan_of(self, options: Sequence[Option], base: Original | Student | None = None) -> CompressionPlan:
        """The plan of one option a knob, whether the menu offers it or not."""
        groups: dict[str, int] = {}
        layers: dict[str, LayerPlan] = {}
        for knob, option in zip(self.knobs, options, strict=True):
            if knob.group is not None and option.keep is not None:
                groups[knob.group] = option.keep
            for layer in knob.layers:
                layers[layer] = option.format
        return complete(self.graph, CompressionPlan(base=base or Original(), groups=groups, layers=layers))

    def choices(self, plan: CompressionPlan) -> tuple[int, ...]:
        """The option of each knob nearest to a plan: in width first (the larger of two as near), then in format."""
        result = []
        for knob in self.knobs:
            wanted = plan.layers.get(knob.layers[0], LayerPlan()) if knob.layers else LayerPlan()
            keep = plan.groups.get(knob.group) if knob.group else None
            best = min(
                range(len(knob.options)),
                key=lambda i, knob=knob, keep=keep, wanted=wanted: (  # type: ignore[misc]
                    abs((knob.options[i].keep or 0) - (keep if keep is not None else 10**9)),
                    _format_distance(knob.options[i].format, wanted),
                ),
            )
            result.append(best)
        return tuple(result)

    def uniform(self, share: float, compute: Compute, bits: int) -> tuple[int, ...]:
        """Every knob at the same share of channels and the same format, as near as its menu allows."""
        layers = {layer: format_of(compute, bits) for knob in self.knobs for layer in knob.layers}
        groups = {g.id: max(1, round(g.size * share)) for g in self.graph.groups}
        return self.choices(CompressionPlan(groups=groups, layers=layers))

    def describe(self) -> dict[str, Any]:
        """The menu as ``space.json`` holds it."""
        return {
            "layers": [layer.name for layer in self.graph.compressible],
            "groups": {group.id: group.size for group in self.graph.groups},
            "knobs": [
                {"name": k.name, "group": k.group, "layers": list(k.layers), "options": [o.label for o in k.options]}
                for k in self.knobs
            ],
            "dropped": self.dropped,
            "skipped": self.graph.skipped,
        }


def complete(graph: ModelGraph, plan: CompressionPlan) -> CompressionPlan:
    """Fills in the activations' formats, which follow from what the layers compute in."""
    return plan.model_copy(update={"activations": activation_formats(graph, plan.layers)})


def formats_of(space: SearchSpace) -> list[LayerPlan]:
    """The number formats a space offers: float weights cannot feed integer kernels, the rest combine freely."""
    pairs = [(compute, bits) for compute in space.compute for bits in space.weight_bits]
    return [format_of(compute, bits) for compute, bits in pairs if not (compute == "int8" and bits == 32)]


def _producers(graph: ModelGraph, group: Group) -> list[Layer]:
    tensors = {m.tensor for m in group.members if m.role in ("out", "through")}
    return [layer for layer in graph.compressible if layer.inputs[1] in tensors]


def _readers(graph: ModelGraph, group: Group) -> set[str]:
    tensors = {m.tensor for m in group.members if m.role == "in"}
    return {layer.name for layer in graph.compressible if layer.inputs[1] in tensors}


def _format_distance(a: LayerPlan, b: LayerPlan) -> int:
    return 100 * (a.compute != b.compute) + abs(a.storage.bits - b.storage.bits)
