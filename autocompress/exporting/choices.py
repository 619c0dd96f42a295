"""From a request to the plan of this model: what each layer becomes, and why some stay in float."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from autocompress.errors import UsageError, nearest_names
from autocompress.exporting.options import ExportOptions
from autocompress.methods.post_training import stays_float, suited
from autocompress.patterns import match_layers
from autocompress.plan import CompressionPlan, Layer, LayerPlan, ModelGraph

MOST_LEFT = 0.5
"""Share of the weights that may stay in float before a request for the whole model is refused."""


@dataclass(frozen=True)
class Chosen:
    """A plan, and for each layer that stays in float32 against the request as a whole, the reason."""

    plan: CompressionPlan
    reasons: dict[str, str]


def choose(graph: ModelGraph, options: ExportOptions) -> Chosen:
    """Applies a request to a model: ``--compute`` or ``--plan``, then each ``--layer``, then ``--freeze``.

    Raises:
        UsageError: a pattern matches nothing, a layer is asked for what it cannot do, or no layer can do it.
    """
    names = [layer.name for layer in graph.compressible]
    if not names:
        raise UsageError("the model has no Conv, Linear or constant MatMul layer: there is nothing to compress")
    wanted = options.base.layer_plan(options.block)
    layers: dict[str, LayerPlan] = {}
    reasons: dict[str, str] = {}
    for layer in graph.compressible:
        reason = _unable(graph, layer, wanted)
        layers[layer.name] = LayerPlan() if reason else wanted
        if reason:
            reasons[layer.name] = reason
    left = sum(graph.tensors[graph.by_name[name].inputs[1]].elements for name in reasons)
    total = sum(graph.tensors[layer.inputs[1]].elements for layer in graph.compressible)
    if left > MOST_LEFT * total:
        first, reason = next(iter(reasons.items()))
        raise UsageError(
            f"--compute {wanted.compute}: {left / total:.0%} of the weights lie in layers that cannot be, such as "
            f"{first!r}: {reason}; where only some layers are meant, say --compute fp32 --layer "
            f"'PATTERN={wanted.compute}'"
        )
    layers |= suited(graph, {name: form for name, form in layers.items() if form != LayerPlan()})
    names = [layer.name for layer in graph.stored]
    if options.plan is not None:
        for name, given in _read_layers(options.plan, names).items():
            _require(graph, name, given, f"--plan {str(options.plan)!r}")
            layers[name] = given
            reasons.pop(name, None)
    for rule in options.rules:
        origin = f"--layer '{rule.pattern}={rule.compute}'"
        for name in sorted(match_layers([rule.pattern], names, origin)):
            layers[name] = rule.layer_plan(options.block)
            _require(graph, name, layers[name], origin)
            reasons.pop(name, None)
    for name in match_layers(options.freeze, names) if options.freeze else ():
        layers[name] = LayerPlan()
        reasons[name] = "frozen"
    ordered = {name: reasons[name] for name in names if name in reasons}
    return Chosen(CompressionPlan(layers={n: p for n, p in layers.items() if p != LayerPlan()}), ordered)


def _unable(graph: ModelGraph, layer: Layer, plan: LayerPlan) -> str:
    """Why a layer cannot be what a plan says; empty where it can."""
    return "" if plan == LayerPlan() else stays_float(graph, layer, plan)


def _require(graph: ModelGraph, name: str, plan: LayerPlan, origin: str) -> None:
    reason = _unable(graph, graph.by_name[name], plan)
    if reason:
        raise UsageError(f"{origin}: layer {name!r} cannot be {plan.compute}: {reason}")


def _read_layers(path: Path, names: Iterable[str]) -> dict[str, LayerPlan]:
    """The layers of a stored plan; its widths and recipe are another model's and are not applied."""
    names = list(names)
    plan = _read_plan(path)
    unknown = [name for name in plan.layers if name not in names]
    if unknown:
        raise UsageError(
            f"--plan {str(path)!r} names layer {unknown[0]!r}, which this model does not have; "
            f"nearest: {nearest_names(unknown[0], names)[0]!r}; it was made for another model"
        )
    return plan.layers


def _read_plan(path: Path) -> CompressionPlan:
    from autocompress.export.checkpoint import PLAN, read_plan

    file = path / PLAN if path.is_dir() else path
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--plan {str(path)!r} cannot be read as a plan ({error}); give RUN/models/ID, its plan.json, or the JSON "
            "of a CompressionPlan"
        ) from error
    if isinstance(stored, dict) and "schema" in stored:
        return read_plan(file)[1]
    try:
        return CompressionPlan.model_validate(stored)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"--plan {str(path)!r} is no plan: {where}: {first['msg']}") from error
