"""Post-training quantization: a trained model and some calibration data in, a plan's compressed model out.

Whatever is left to choose (``auto``) is chosen by what it is for: the signal-to-noise ratio of the compressed model's
outputs against the float model's, on calibration batches that no range was taken from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from autocompress.errors import UsageError
from autocompress.graph.executor import GraphModule, build_module
from autocompress.methods.bias_correction import correct_biases
from autocompress.methods.calibration import range_method
from autocompress.methods.calibration_report import CalibrationReport
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.equalization import channel_maxima, equalize, find_links
from autocompress.methods.exact import ExactModule
from autocompress.methods.formats import BLOCK, refusal
from autocompress.methods.quantization import activation_formats, assign_ranges, fused_output
from autocompress.methods.registry import RANGE_METHODS
from autocompress.methods.rounding import FINE_BITS, round_with_compensation
from autocompress.methods.rounding_formats import column_scales, format_scales, round_to_format
from autocompress.methods.statistics import CalibrationStatistics, collect, from_matrix, merge, weight_matrix
from autocompress.plan import (
    FLOAT16,
    FLOAT32,
    CompressionPlan,
    Compute,
    Layer,
    LayerPlan,
    ModelGraph,
    NumFormat,
    weight_of,
)
from autocompress.progress import Progress, SilentProgress

Batch = tuple[torch.Tensor, ...]
Choice = Literal["auto", "on", "off"]

HELD_OUT = 4
"""One in so many calibration samples is held out to choose by."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What post-training quantization may do.

    Attributes:
        ranges: a name of ``RANGE_METHODS`` (minmax, percentile, mse, entropy), or ``auto``: the best of them.
        equalize: whether scales move between layers: ``on``, ``off``, or ``auto``: where it helps.
        bias_correction: whether biases may take back what rounding shifts; it is kept where it helps.
        rounding: of 8-bit weights: to the ``nearest`` integer, ``compensated`` (GPTQ), or ``auto``: the better one.
            Below 8 bits rounding is always compensated.
        seed: of the sample that ranges are chosen from.
    """

    ranges: str = "auto"
    equalize: Choice = "auto"
    bias_correction: bool = True
    rounding: Literal["auto", "nearest", "compensated"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ranges != "auto":
            range_method(self.ranges)
        if self.equalize not in ("auto", "on", "off"):
            raise UsageError(f"equalize={self.equalize!r}: give one of auto, on, off")
        if self.rounding not in ("auto", "nearest", "compensated"):
            raise UsageError(f"rounding={self.rounding!r}: give one of auto, nearest, compensated")


def uniform_plan(graph: ModelGraph, compute: Compute, bits: int) -> tuple[CompressionPlan, dict[str, str]]:
    """Every weight layer in one format, as far as it can be.

    Args:
        graph: the model.
        compute: what layers compute in.
        bits: their weights are stored in; 32 and 16 are floating point.

    Returns:
        The plan, and for each weight layer that stays fp32 the reason.

    Raises:
        UsageError: no layer can take the format.
    """
    form = LayerPlan(compute=compute, storage=_storage(compute, bits))
    layers: dict[str, LayerPlan] = {}
    left: dict[str, str] = {}
    for layer in graph.compressible:
        reason = stays_float(graph, layer, form)
        if reason:
            left[layer.name] = reason
        else:
            layers[layer.name] = form
    if left and not layers:
        raise UsageError(f"no layer can be {compute} with {bits}-bit weights: {next(iter(left.values()))}")
    layers = suited(graph, layers)
    plan = CompressionPlan(layers=layers)
    return plan.model_copy(update={"activations": activation_formats(graph, layers)}), left


def suited(graph: ModelGraph, layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """One format for all layers, as each is served best by it.

    Products in int8 of what comes in float (attention, behind layer norms) quantize it while they run: that needs no
    second tensor format, and is faster and more exact than a range fixed beforehand.  Behind int8 layers, where
    integers come in, products stay as they are.  Tables of rows are stored in as few bits as the layers' weights.

    Args:
        graph: the model.
        layers: the format of each weight layer that has one.
    """
    products = [
        layer
        for layer in graph.compressible
        if layer.op != "Conv" and layer.name in layers and layers[layer.name].compute == "int8"
    ]
    found = dict(layers)
    for layer in products:
        dynamic = layers[layer.name].model_copy(update={"compute": "int8_dynamic"})
        if not refusal(layer, dynamic):
            found[layer.name] = dynamic
    formats = activation_formats(graph, found)
    for layer in products:
        if layer.inputs[0] in formats or layer.inputs[0] in graph.inputs:
            found[layer.name] = layers[layer.name]
            formats = activation_formats(graph, found)
    whole = [form.storage for form in layers.values() if form.storage != FLOAT32]
    for layer in graph.stored if whole else ():
        if layer.op == "Gather" and len(graph.consumers[weight_of(layer)]) == 1:
            bits = 8 if whole[0].granularity == "block" else whole[0].bits
            found[layer.name] = LayerPlan(storage=FLOAT16 if bits == 16 else NumFormat(bits=bits))
    return found


def _storage(compute: Compute, bits: int) -> NumFormat:
    if bits >= 16:
        return FLOAT32 if bits == 32 else FLOAT16
    if compute == "weight_only":
        return NumFormat(bits=bits, granularity="block", block=BLOCK)
    return NumFormat(bits=bits)


def stays_float(graph: ModelGraph, layer: Layer, form: LayerPlan) -> str:
    """Why a weight layer cannot take a format and stays fp32; empty where it can."""
    if layer.op in ("Gemm", "MatMul") and len(graph.tensors[layer.inputs[1]].shape) != 2:
        return "its weight is no matrix, so it has no output channels to scale"
    if layer.op == "Conv" and form.compute == "int8" and fused_output(graph, layer) in graph.outputs:
        return "an integer convolution cannot give the model's float output"
    return refusal(layer, form)


def quantize_model(
    graph: ModelGraph,
    weights: Mapping[str, torch.Tensor],
    plan: CompressionPlan,
    batches: Iterable[Batch],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> CompressedModel:
    """Carries out a plan's number formats on trained weights.

    Args:
        graph: the model (already pruned, where the plan prunes).
        weights: its float weights.
        plan: the formats of its layers; activations follow from them where the plan names none.
        batches: calibration inputs, a tuple of tensors each; a few dozen samples do.
        options: what may be chosen; all of it by default.
        progress: is told of each step.

    Returns:
        The compressed model; its ``calibration`` says what was chosen and what that brought.

    Raises:
        UsageError: there are no batches, or they hold something that is not a finite number.
    """
    chosen = options or CalibrationOptions()
    return _Quantizer(graph, weights, plan, batches, chosen, progress or SilentProgress()).run()


@dataclass(frozen=True)
class _Variant:
    """Float weights of one function, and what calibration data say of them."""

    equalization: str
    weights: Mapping[str, torch.Tensor]
    seen: CalibrationStatistics
    unseen: CalibrationStatistics


@dataclass(frozen=True)
class _Candidate:
    """A compressed model with how it was made and what it is worth."""

    model: CompressedModel
    variant: _Variant
    ranges: str
    rounding: str
    corrected: bool
    snr_db: float


class _Quantizer:
    def __init__(
        self,
        graph: ModelGraph,
        weights: Mapping[str, torch.Tensor],
        plan: CompressionPlan,
        batches: Iterable[Batch],
        options: CalibrationOptions,
        progress: Progress,
    ) -> None:
        self.graph, self.weights, self.options, self.progress = graph, dict(weights), options, progress
        activations = plan.activations or activation_formats(graph, plan.layers)
        self.plan = plan.model_copy(update={"activations": activations})
        self.fit, self.held = held_out(checked(graph, batches))
        self.reference = outputs_of(build_module(graph, weights), self.held)
        if not all(bool(torch.isfinite(value).all()) for value in self.reference):
            raise UsageError("the float model gives NaN or infinite values on the calibration data")
        self.tried: dict[str, float] = {}
        self._gathered: dict[str, Mapping[str, torch.Tensor]] = {}
        # In few bits rounding to the nearest loses too much to be worth a try.
        self.needs_hessians = any(
            layer.storage.scheme == "affine" and layer.storage.bits < FINE_BITS for layer in plan.layers.values()
        )

    def run(self) -> CompressedModel:
        methods = list(RANGE_METHODS) if self.options.ranges == "auto" else [self.options.ranges]
        rounding = "nearest" if self.options.rounding == "auto" else self.options.rounding
        plain = self._observed("none", self.weights)
        first = best = max((self._candidate(plain, method, rounding) for method in methods), key=_worth)
        if self.options.equalize != "off":
            moved = [self._candidate(variant, best.ranges, rounding) for variant in self._equalized()]
            if moved:
                best = max(moved if self.options.equalize == "on" else [best, *moved], key=_worth)
        if self.options.rounding == "auto":
            best = max(best, self._candidate(best.variant, best.ranges, "compensated"), key=_worth)
        # What was held out to choose by is no reason to saturate there: final ranges are those of all data.
        everything = merge(best.variant.seen, best.variant.unseen)
        final = replace(best.model, ranges=self._ranges(everything, best.ranges))
        if self.options.bias_correction:
            corrected = self._measured(replace(best, model=self._corrected(best.model, best.variant), corrected=True))
            if corrected.snr_db > best.snr_db:
                best, final = corrected, self._corrected(final, best.variant)
        report = CalibrationReport(
            ranges=best.ranges,
            equalization=best.variant.equalization,
            rounding=best.rounding,
            bias_correction=best.corrected,
            samples=sum(len(batch[0]) for batch in (*self.fit, *self.held)),
            held_out=sum(len(batch[0]) for batch in self.held),
            uncorrected_snr_db=first.snr_db,
            snr_db=best.snr_db,
            tried=self.tried,
        )
        return replace(final, calibration=report)

    # -------------------------------------------------------------------------------------------------- one try

    def _candidate(self, variant: _Variant, method: str, rounding: str) -> _Candidate:
        compensated = rounding == "compensated"
        hessians = self._hessians(variant) if compensated or self.needs_hessians else {}
        rounded, scales = round_weights(self.graph, variant.weights, self.plan, hessians, compensated)
        model = CompressedModel(self.graph, rounded, self.plan, scales, self._ranges(variant.seen, method))
        return self._measured(_Candidate(model, variant, method, rounding, False, 0.0))

    def _measured(self, candidate: _Candidate) -> _Candidate:
        snr_db = signal_to_noise_db(self.reference, outputs_of(ExactModule(candidate.model), self.held))
        moved, corrected = candidate.variant.equalization, ["biases corrected"] if candidate.corrected else []
        words = [candidate.ranges, *([] if moved == "none" else [f"{moved} equalized"]), candidate.rounding, *corrected]
        self.tried[", ".join(words)] = round(snr_db, 2)
        return replace(candidate, snr_db=snr_db)

    def _corrected(self, model: CompressedModel, variant: _Variant) -> CompressedModel:
        return correct_biases(model, variant.weights, self.fit)

    def _equalized(self) -> Iterator[_Variant]:
        links = find_links(self.graph)
        if links:
            maxima = channel_maxima(self.graph, self.weights, links, self.fit)
            yield self._observed("activations", equalize(self.weights, links, maxima))
            if any(link.maker.op != "LayerNormalization" for link in links):
                yield self._observed("weights", equalize(self.weights, links))

    def _ranges(self, seen: CalibrationStatistics, method: str) -> dict[str, tuple[float, float]]:
        choose = range_method(method)
        formats = self.plan.activations
        return assign_ranges(self.graph, formats, lambda name: choose(seen.samples[name], formats[name].bits))

    def _observed(self, equalization: str, weights: Mapping[str, torch.Tensor]) -> _Variant:
        """Statistics of both parts of the data."""
        module = build_module(self.graph, weights)
        self.progress.stage("calibration", len(self.fit) + len(self.held))
        seen = collect(module, self._counted(self.fit), self.options.seed, hessians=False)
        unseen = collect(module, self._counted(self.held), self.options.seed, hessians=False)
        return _Variant(equalization, weights, seen, unseen)

    def _hessians(self, variant: _Variant) -> Mapping[str, torch.Tensor]:
        """Second moments of the variant's inputs: dear to gather, so only where rounding makes use of them."""
        if variant.equalization not in self._gathered:
            module = build_module(self.graph, variant.weights)
            self.progress.stage("second moments", len(self.fit))
            gathered = collect(module, self._counted(self.fit), self.options.seed)
            self._gathered = {variant.equalization: gathered.hessians}
        return self._gathered[variant.equalization]

    def _counted(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            self.progress.advance()


def _worth(candidate: _Candidate) -> float:
    return candidate.snr_db


def round_weights(
    graph: ModelGraph,
    weights: Mapping[str, torch.Tensor],
    plan: CompressionPlan,
    hessians: Mapping[str, torch.Tensor],
    compensated: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights as their storage formats hold them, and the scales of those held as integers."""
    made = dict(weights)
    scales: dict[str, torch.Tensor] = {}
    for layer in graph.stored:
        storage = plan.layers.get(layer.name, LayerPlan()).storage
        if storage == FLOAT32:
            continue
        name = weight_of(layer)
        matrix = weight_matrix(layer, weights[name]).float().contiguous()
        hessian = None if layer.shared_with else hessians.get(layer.name)
        if hessian is None or storage.scheme != "affine" or (storage.bits >= FINE_BITS and not compensated):
            rounded, step = round_to_format(matrix, storage)
        else:
            step = format_scales(matrix, storage)
            each = step if step.dim() == 1 else column_scales(step, storage, matrix.shape[1])
            rounded, bias = _compensated(layer, weights, matrix, hessian, each, storage.bits)
            if bias is not None:
                made[layer.inputs[2]] = bias
        shape = graph.tensors[name].shape
        made[name] = from_matrix(layer, rounded, shape).contiguous()
        if step is not None:
            scales[layer.name] = step
    return made, scales


def _compensated(
    layer: Layer,
    weights: Mapping[str, torch.Tensor],
    matrix: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rounded weights, and the bias where the layer has one of its own to take what is left."""
    if len(layer.inputs) > 2 and layer.inputs[2] and weights[layer.inputs[2]].shape == (len(matrix),):
        return round_with_compensation(matrix, weights[layer.inputs[2]], hessian, scales, bits)
    alone = hessian.clone()
    alone[-1, :-1] = alone[:-1, -1] = 0.0
    return round_with_compensation(matrix, torch.zeros(len(matrix)), alone, scales, bits)[0], None


# ---------------------------------------------------------------------------------------------------- the data


def checked(graph: ModelGraph, batches: Iterable[Batch]) -> list[Batch]:
    """The batches, each a tuple of as many finite tensors as the model has inputs."""
    data: list[Batch] = []
    for number, batch in enumerate(batches):
        batch = batch if isinstance(batch, tuple) else (batch,)
        if len(batch) != len(graph.inputs):
            raise UsageError(
                f"calibration batch {number} holds {len(batch)} tensors, but the model's inputs are "
                f"{', '.join(graph.inputs)}"
            )
        for name, value in zip(graph.inputs, batch, strict=True):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UsageError(f"calibration batch {number} has NaN or infinite values in {name!r}; leave it out")
        if len(batch[0]):
            data.append(tuple(value.detach().cpu() for value in batch))
    if not data:
        raise UsageError("no calibration samples were given; ranges are taken from them, so give a few dozen")
    return data


def held_out(data: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The batches to calibrate on, and the last quarter of the samples to choose by (all, where there is one)."""
    total = sum(len(batch[0]) for batch in data)
    keep = total - total // HELD_OUT if total >= HELD_OUT else total
    fit: list[Batch] = []
    held: list[Batch] = []
    for batch in data:
        size = len(batch[0])
        taken = max(0, min(size, keep))
        keep -= size
        if taken:
            fit.append(tuple(value[:taken] for value in batch))
        if taken < size:
            held.append(tuple(value[taken:] for value in batch))
    return fit, held or fit


def outputs_of(module: GraphModule, batches: Iterable[Batch]) -> list[torch.Tensor]:
    """Each floating output of the module over all batches."""
    parts: list[tuple[torch.Tensor, ...]] = []
    with torch.no_grad():
        for batch in batches:
            given = module(*batch)
            given = given if isinstance(given, tuple) else (given,)
            parts.append(tuple(value for value in given if value.is_floating_point()))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def signal_to_noise_db(expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> float:
    """Ten times the decimal logarithm of signal over error power; several outputs weigh alike.  At most 200.

    >>> signal_to_noise_db([torch.tensor([10.0])], [torch.tensor([9.0])])
    20.0
    """
    shares = []
    for wanted, value in zip(expected, given, strict=True):
        signal = float(wanted.double().square().sum())
        noise = float((wanted.double() - value.double()).square().sum())
        shares.append(noise / max(signal, 1e-30))
    noise_share = sum(shares) / max(len(shares), 1)
    return round(float(-10 * torch.tensor(max(noise_share, 1e-20), dtype=torch.float64).log10()), 6)
