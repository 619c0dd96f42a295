"""Weights that many sub-networks share, trained so that each of them works as it is cut out.

Every step trains the narrowest sub-network and a few drawn ones on the same batch (the sandwich rule and in-place
distillation of Yu and Huang, 1903.05134, and BigNAS, 2003.11142).  The widest one is the trained original, whose
cached answers teach all of them, so it need not be run.  A sub-network keeps the leading channels of each group in the
order of their importance and leaves out residual blocks; its batch norms are estimated anew when it is cut out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from autocompress.graph.blocks import drop_blocks
from autocompress.graph.executor import GraphModule
from autocompress.graph.rewrite import Slices, rewrite, slices_of, take
from autocompress.layout import laid_out, training_layout
from autocompress.methods.distillation import (
    LossFunction,
    TeacherData,
    distillation_loss,
    make_optimizer,
    mixed_precision_pays,
    schedule,
)
from autocompress.methods.quantization import weight_axis
from autocompress.methods.recovery import add_norms, fold_norms
from autocompress.plan import CompressionPlan, ModelGraph, Recipe, Student
from autocompress.progress import Progress
from autocompress.tasks.training import autocast_context

Batches = Iterable[tuple[torch.Tensor, ...]]
Draw = Callable[[torch.Generator], CompressionPlan]
"""Gives the plan of a sub-network to train; only its base's dropped blocks and its groups count."""

REMEMBERED = 256
"""Sub-networks whose modules are kept; the oldest make room."""


@dataclass(frozen=True, eq=False)
class _Part:
    """A sub-network's own graph, and which stored tensors of the whole (and which part of each) are its own."""

    module: GraphModule
    sources: Mapping[str, tuple[str, list[tuple[int, torch.Tensor]]]]

    def given(self, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: take(whole[source], slices) for name, (source, slices) in self.sources.items()}


class ElasticWeights:
    """One set of weights for all sub-networks of a model.

    Args:
        graph: the original.
        weights: its trained weights.
        orders: for each group its channels, the most important first.
        batches: calibration inputs, read more than once.
    """

    def __init__(
        self,
        graph: ModelGraph,
        weights: Mapping[str, torch.Tensor],
        orders: Mapping[str, torch.Tensor],
        batches: Batches,
    ) -> None:
        self.graph, self.orders, self.batches = graph, orders, list(batches)
        self.module = GraphModule(graph, weights)
        add_norms(self.module, self.batches)
        self._tensors = {**dict(self.module.named_parameters()), **_fixed(self.module)}
        self._parts: dict[str, _Part] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What training changes."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def outputs(self, plan: CompressionPlan, inputs: torch.Tensor) -> torch.Tensor:
        """A sub-network's answers with batch norms of the batch, differentiable in the shared weights."""
        part = self._part(plan)
        inputs = laid_out(inputs, training_layout(part.module.graph))
        result: torch.Tensor = functional_call(part.module, part.given(self._tensors), (inputs,))
        return result

    def cut(self, plan: CompressionPlan) -> tuple[ModelGraph, dict[str, torch.Tensor]]:
        """The graph and float weights of a sub-network, its norms estimated on the calibration inputs and folded."""
        part = self._part(plan)
        module = GraphModule(part.module.graph, _stored(part, self._tensors))
        for layer in module.graph.compressible:
            norm = part.module.norm_of(layer)
            if isinstance(norm, nn.BatchNorm2d):
                own = nn.BatchNorm2d(norm.num_features, momentum=None)  # a plain mean over the batches
                module.set_norm(layer, own)
                module.weight(layer.inputs[2]).requires_grad_(False)
        own_names = dict(module.named_parameters())
        with torch.no_grad():
            for name, value in part.given(self._tensors).items():
                if name in own_names:
                    own_names[name].copy_(value)
            module.train()
            for inputs in self.batches:
                module(*inputs)
        fold_norms(module)
        module.eval()
        return module.graph, module.weights()

    def _part(self, plan: CompressionPlan) -> _Part:
        key = plan.shape_digest
        if key not in self._parts:
            if len(self._parts) >= REMEMBERED:
                del self._parts[next(iter(self._parts))]
            self._parts[key] = self._make(plan)
        return self._parts[key]

    def _make(self, plan: CompressionPlan) -> _Part:
        dropped: Sequence[str] = plan.base.dropped if isinstance(plan.base, Student) else ()
        kept = {name: self.orders[name][:count].sort().values for name, count in plan.groups.items()}
        graph = drop_blocks(rewrite(self.graph, plan.groups), dropped)
        slices = slices_of(self.graph, kept)
        module = GraphModule(
            graph, {name: _shape_of(self.module.weight(name), graph, name) for name in graph.weight_names()}
        )
        sources = {}
        whole_names, own_names = _names(self.module), _names(module)
        for name in graph.weight_names():
            sources[own_names[name]] = (whole_names[name], slices.get(name, []))
        for layer in graph.compressible:
            norm = self.module.norm_of(self.graph.by_name[layer.name])
            if isinstance(norm, nn.BatchNorm2d):
                rows = _rows(slices, layer.inputs[1], weight_axis(layer))
                own = nn.BatchNorm2d(graph.tensors[layer.outputs[0]].shape[0])
                module.set_norm(layer, own.train())
                for leaf in ("weight", "bias"):
                    place = f"norms.{layer.name.replace('.', '/')}.{leaf}"
                    sources[place] = (place, [(0, rows)] if rows is not None else [])
        module.train()
        module.to(memory_format=training_layout(graph))  # type: ignore[call-overload]
        return _Part(module, sources)


def train_elastic(
    elastic: ElasticWeights,
    data: TeacherData,
    draw: Draw,
    narrowest: CompressionPlan,
    recipe: Recipe,
    *,
    steps: int,
    learning_rate: float,
    task_loss: LossFunction,
    generator: torch.Generator,
    drawn: int = 2,
    weight_decay: float = 1e-4,
    batch_size: int = 128,
    seconds: float | None = None,
    mixed_precision: bool = True,
    progress: Progress | None = None,
) -> int:
    """Trains the shared weights: each step the narrowest sub-network and ``drawn`` others, against the teacher.

    The learning rate rises over the first tenth and falls along a cosine.

    Args:
        seconds: where given, training ends when they are over, the schedule being stretched to end with them.
        mixed_precision: whether to compute in bfloat16 where it pays.

    Returns:
        The number of steps taken.

    Raises:
        FloatingPointError: the loss is no finite number.
    """
    own = elastic.parameters
    optimizer = make_optimizer(own, learning_rate, weight_decay)
    mixed = False
    if mixed_precision:
        sample = next(data.batches(batch_size, torch.Generator().manual_seed(0)))[0]
        some = GraphModule(*elastic.cut(draw(torch.Generator().manual_seed(0))))
        mixed = mixed_precision_pays(some, sample)
    started = time.monotonic()
    taken = 0
    for inputs, targets, logits, _ in data.batches(batch_size, generator):
        part = taken / max(steps, 1) if seconds is None else (time.monotonic() - started) / max(seconds, 1e-9)
        if part >= 1.0 or taken >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(part)
        optimizer.zero_grad(set_to_none=True)
        for plan in (narrowest, *(draw(generator) for _ in range(drawn))):
            with autocast_context() if mixed else nullcontext():
                outputs = elastic.outputs(plan, inputs)
            loss = distillation_loss(outputs.float(), targets, logits, recipe, task_loss)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss of shared weights became {float(loss.detach())} at step {taken}")
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(own, 5.0)
        optimizer.step()
        taken += 1
        if progress is not None:
            progress.advance()
    return taken


def _shape_of(whole: torch.Tensor, graph: ModelGraph, name: str) -> torch.Tensor:
    """What stands for a part's own tensor, which is taken from the whole at every run; single numbers are kept."""
    if whole.numel() <= 1:
        return whole.detach()
    return torch.empty(graph.tensors[name].shape, dtype=whole.dtype, device="meta")


def _names(module: GraphModule) -> dict[str, str]:
    """For each stored tensor of the graph its name as a parameter or buffer of the module."""
    places = {id(value): name for name, value in [*module.named_parameters(), *module.named_buffers()]}
    return {name: places[id(module.weight(name))] for name in module.graph.weight_names()}


def _fixed(module: GraphModule) -> dict[str, torch.Tensor]:
    stored = set(_names(module).values())
    return {name: value for name, value in module.named_buffers() if name in stored}


def _stored(part: _Part, whole: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    given = part.given(whole)
    return {name: given[place].detach() for name, place in _names(part.module).items()}


def _rows(slices: Slices, weight: str, axis: int) -> torch.Tensor | None:
    """The output channels of a layer that remain; None for all."""
    return next((index for place, index in slices.get(weight, []) if place == axis), None)
