"""Knowledge distillation (Hinton et al., 1503.02531) from cached teacher outputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from autocompress.devices import CPU, autocast_context, finish, forward_batch, moved
from autocompress.graph.executor import GraphModule
from autocompress.layout import laid_out, training_layout
from autocompress.plan import Recipe
from autocompress.progress import Progress
from autocompress.tasks.splits import TensorSplit

TIMED_MACS, TIMED_LEAST = 8 * 10**9, 4
"""Multiply-accumulates of a forward pass that is long enough to be timed, and samples that it has at least."""

WEIGHT_DECAY = 1e-4

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def penultimate(module: GraphModule) -> str | None:
    """The activation that the last weight layer reads: what a classifier's head sees."""
    layers = module.graph.compressible
    if len(layers) < 2 or layers[-1].op == "Conv":
        return None
    return layers[-1].inputs[0]


class TeacherData:
    """Training samples with what the teacher says of them, for each view of a sample (as it is, and mirrored).

    The teacher may be asked bit by bit: what it has not been asked about is not trained on.

    Args:
        teacher: the model that is followed; its ``taps`` are used and given back.
        split: the samples.
        mirror: whether mirrored images are samples, too.
        batch_size: of the teacher's batches; by default, what suits the device.
        device: where the teacher answers.

    Attributes:
        known: pairs of a sample and a view that the teacher has answered for, of ``len(order)``.
        logits: ``[known, classes]``, as answered.
        features: ``[known, F]`` penultimate features, or None where the model has no such layer.
    """

    def __init__(
        self,
        teacher: GraphModule,
        split: TensorSplit,
        mirror: bool,
        batch_size: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.split, self.batch_size, self.device = split, batch_size or forward_batch(device), device
        self._teacher, self._feature = teacher, penultimate(teacher)
        pairs = (2 if mirror else 1) * len(split)
        self.order = torch.randperm(pairs, generator=torch.Generator().manual_seed(0))
        self.known = 0
        self.logits = torch.zeros(0, 0)
        self.features: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        return self.known == len(self.order)

    def extend(self, seconds: float | None = None, progress: Progress | None = None) -> None:
        """Asks the teacher for more answers: for at most so many seconds, but one batch at least, or for all."""
        started, known = time.monotonic(), self.known
        outputs, captured = [self.logits] if known else [], [] if self.features is None else [self.features]
        taps = dict(self._teacher.taps)
        if self._feature is not None:

            def capture(value: torch.Tensor) -> torch.Tensor:
                captured.append(value.detach().float().flatten(1).cpu())
                return value

            self._teacher.taps[self._feature] = capture
        self._teacher.on(self.device)
        try:
            with torch.no_grad(), autocast_context(self.device):
                while known < len(self.order):
                    pairs = self.order[known : known + self.batch_size]
                    inputs = laid_out(moved(self._inputs(pairs), self.device), torch.channels_last)
                    outputs.append(self._teacher(inputs).float().cpu())
                    known += len(pairs)
                    if progress is not None:
                        progress.advance()
                    if seconds is not None and time.monotonic() - started >= seconds:
                        break
        finally:
            self._teacher.on(CPU).taps = taps
        self.known = known
        if outputs:
            self.logits = torch.cat(outputs)
        if captured:
            self.features = torch.cat(captured)

    def batches(
        self, size: int, generator: torch.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        """(inputs, targets or None, teacher logits, teacher features) without end, reshuffled on every pass."""
        count = self.known
        size = min(size, count)
        empty = torch.zeros(size, 0)
        while True:
            shuffled = torch.randperm(count, generator=generator)
            for start in range(0, count - size + 1, size):
                index = shuffled[start : start + size]
                pairs = self.order[index]
                labels = self.split.labels
                targets = None if labels is None else labels[pairs % len(self.split)]
                features = empty if self.features is None else self.features[index]
                yield self._inputs(pairs), targets, self.logits[index], features

    def _inputs(self, pairs: torch.Tensor) -> torch.Tensor:
        """The samples of pairs, mirrored where the pair says so."""
        inputs = self.split.batch(pairs % len(self.split)).inputs[0]
        mirrored = (pairs >= len(self.split)).reshape(-1, *([1] * (inputs.dim() - 1)))
        return torch.where(mirrored, inputs.flip(-1), inputs) if bool(mirrored.any()) else inputs


def teach(
    teacher: GraphModule,
    split: TensorSplit,
    mirror: bool,
    progress: Progress,
    seconds: float | None = None,
    device: torch.device = CPU,
) -> TeacherData:
    """Asks the teacher about the samples once, so that no training step has to: about all, or for some seconds."""
    data = TeacherData(teacher, split, mirror, device=device)
    progress.stage("teacher", None if seconds is not None else -(-len(data.order) // data.batch_size))
    data.extend(seconds, progress)
    return data


def similarity_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Distance between the two models' sample-to-sample similarities (Tung and Mori, 1907.09682).

    It compares ``[batch, batch]`` matrices, so student and teacher may have different widths.
    """

    def similarities(features: torch.Tensor) -> torch.Tensor:
        flat = features.flatten(1)
        return F.normalize(flat @ flat.t(), dim=1)

    return (similarities(student) - similarities(teacher)).square().sum(1).mean()


def distillation_loss(
    outputs: torch.Tensor, targets: torch.Tensor | None, teacher: torch.Tensor, recipe: Recipe, task_loss: LossFunction
) -> torch.Tensor:
    """``alpha T^2 KL(teacher || student)`` at temperature T plus ``(1 - alpha)`` of the task's own loss.

    Raises:
        ValueError: the recipe weighs labels, and there are none.
    """
    temperature = recipe.temperature
    soft = F.kl_div(
        F.log_softmax(outputs / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    loss = recipe.alpha * temperature**2 * soft
    if recipe.alpha < 1.0:
        if targets is None:
            raise ValueError(f"alpha {recipe.alpha:g} weighs labels, but the samples have none; without them it is 1")
        loss = loss + (1.0 - recipe.alpha) * task_loss(outputs, targets)
    return loss


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a training: a linear rise, a plateau, and a fall along a cosine.

    With a long plateau a training can be gone on with from where its fall began, at little loss against a single one
    of the whole length (Hägele et al., 2405.18392).

    >>> [round(Schedule(rise=0.1, fall=0.3)(part), 2) for part in (0.0, 0.1, 0.7, 0.85, 1.0)]
    [0.1, 1.0, 1.0, 0.5, 0.0]

    Attributes:
        rise: share of the training over which it rises.
        fall: share of it over which it falls.
    """

    rise: float = 0.1
    fall: float = 0.9

    def __call__(self, part: float) -> float:
        """The learning rate at a part of the way, as a share of its peak."""
        if part < self.rise:
            return 0.1 + 0.9 * part / self.rise
        return 0.5 * (1.0 + math.cos(math.pi * max(0.0, part - self.plateau_end) / self.fall))

    @property
    def plateau_end(self) -> float:
        """The part of the way at which it begins to fall."""
        return 1.0 - self.fall


def distill(
    module: GraphModule,
    data: TeacherData,
    recipe: Recipe,
    *,
    steps: int,
    learning_rate: float,
    task_loss: LossFunction,
    generator: torch.Generator,
    extra_parameters: list[nn.Parameter] | None = None,
    batch_size: int = 128,
    seconds: float | None = None,
    mixed_precision: bool = True,
    schedule: Schedule | None = None,
    falling: Callable[[], None] | None = None,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> int:
    """Trains a module in place against cached teacher outputs.

    Args:
        seconds: where given, training ends when they are over, the schedule being stretched to end with them.
        mixed_precision: whether to compute in bfloat16 where the device has it (see ``mixed_precision_pays``).
        schedule: of the learning rate.
        falling: called once, before the learning rate begins to fall.
        device: where the steps are computed; the module comes back to the CPU.

    Returns:
        The number of steps taken.

    Raises:
        FloatingPointError: the loss is no finite number: the recovery diverged.
    """
    schedule = schedule or Schedule()
    module.on(device)
    own = [p for p in module.parameters() if p.requires_grad]
    optimizer = make_optimizer(own, learning_rate, extra_parameters or ())
    name = penultimate(module) if recipe.feature_weight and data.features is not None else None
    seen: list[torch.Tensor] = []
    inner = module.taps.get(name) if name else None
    if name is not None:

        def capture(value: torch.Tensor) -> torch.Tensor:
            value = inner(value) if inner else value
            seen.append(value)
            return value

        module.taps[name] = capture
    module.train()
    layout = training_layout(module.graph)
    module.to(memory_format=layout)  # type: ignore[call-overload]
    started = time.monotonic()
    taken = 0
    last: torch.Tensor | None = None
    try:
        for inputs, targets, logits, features in data.batches(batch_size, generator):
            elapsed = time.monotonic() - started
            part = taken / max(steps, 1) if seconds is None else elapsed / max(seconds, 1e-9)
            if part >= 1.0 or taken >= steps:
                break
            if falling is not None and part >= schedule.plateau_end:
                falling()
                falling = None
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(part)
            seen.clear()
            inputs, logits, features = (moved(value, device) for value in (inputs, logits, features))
            targets = None if targets is None else moved(targets, device)
            _require_finite(last, taken - 1)
            with autocast_context(device) if mixed_precision else nullcontext():
                outputs = module(laid_out(inputs, layout))
            loss = distillation_loss(outputs.float(), targets, logits, recipe, task_loss)
            if seen:
                loss = loss + recipe.feature_weight * similarity_loss(seen[0].float(), features)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(own, 5.0)
            optimizer.step()
            last = loss.detach()
            taken += 1
            if progress is not None:
                progress.advance()
    finally:
        if name is not None:
            if inner is not None:
                module.taps[name] = inner
            else:
                module.taps.pop(name, None)
        module.on(CPU).eval()
    _require_finite(last, taken - 1)
    return taken


def _require_finite(loss: torch.Tensor | None, step: int) -> None:
    """Looked at one step late: a CUDA device works on a step while the next one's samples are fetched."""
    if loss is not None and not torch.isfinite(loss):
        raise FloatingPointError(f"the distillation loss became {float(loss)} at step {step}")


def make_optimizer(
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    undecayed: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW that decays matrices, and neither vectors nor what is ``undecayed``."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [*(p for p in parameters if p.dim() <= 1), *undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate)


def mixed_precision_pays(module: GraphModule, inputs: torch.Tensor, device: torch.device = CPU) -> bool:
    """Times a training step both ways: narrow layers are often slower in bfloat16 than in float32."""
    taken = _step_times(module, inputs, device)
    return taken[True] < taken[False]


def step_time(module: GraphModule, inputs: torch.Tensor, device: torch.device = CPU) -> float:
    """Seconds of a forward and a backward pass over the inputs, in the precision that is faster."""
    return min(_step_times(module, inputs, device).values())


def _step_times(module: GraphModule, inputs: torch.Tensor, device: torch.device) -> dict[bool, float]:
    """Seconds of a step without and with mixed precision; on the CPU, of large models, reckoned up from some inputs."""
    taken = {}
    module.on(device).train()
    # A CUDA device takes as long for a few samples as for a batch.
    count = max(TIMED_LEAST, TIMED_MACS // max(module.graph.macs(), 1)) if device.type == "cpu" else len(inputs)
    some = inputs[:count]
    images = laid_out(moved(some, device), training_layout(module.graph))
    for mixed in (False, True, False, True):
        finish(device)
        started = time.perf_counter()
        with autocast_context(device) if mixed else nullcontext():
            outputs = module(images)
        outputs.float().square().mean().backward()
        finish(device)
        # The second time counts, once buffers are warm.
        taken[mixed] = (time.perf_counter() - started) * len(inputs) / len(some)
    module.zero_grad(set_to_none=True)
    module.on(CPU).eval()
    return taken
