"""The vocabulary: frozen, typed values that pass between the parts of autocompress.

Nothing here imports torch.  Every value is immutable, compares by content and round-trips through JSON
(``value.model_dump_json()`` / ``Type.model_validate_json(text)``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Compute = Literal["fp32", "fp16", "int8", "int8_dynamic", "weight_only"]
Searched = Literal["fp32", "int8"]
Source = Literal["measured", "fitted", "analytic", "unknown"]
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...]

PLAN_VERSION = 1


class Value(BaseModel):
    """Base of all vocabulary values: frozen, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields replaced; what was derived from the old fields is derived anew."""
        made = super().model_copy(update=update, deep=deep)
        for name in made.__dict__.keys() - type(self).model_fields.keys():
            del made.__dict__[name]
        return made


def digest_of(payload: Any) -> str:
    """A short, stable digest of a JSON-serialisable payload."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- the model


class Tensor(Value):
    """A tensor of the model; ``shape`` leaves the batch axis out for activations and is complete for weights."""

    id: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class Layer(Value):
    """One operator of the deployed graph, in ONNX terms.

    ``inputs`` is the operator's full ONNX input list (``""`` for an absent optional input); ``weights`` are those
    of the inputs that are stored tensors (parameters and constants).  Layers stand in execution order.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    attributes: dict[str, Attribute] = Field(default_factory=dict)
    module_path: str | None = None
    shared_with: tuple[str, ...] = ()

    @property
    def activations(self) -> tuple[str, ...]:
        """The inputs that are computed at run time."""
        return tuple(i for i in self.inputs if i and i not in self.weights)


class Member(Value):
    """One axis of one tensor that a group shrinks.

    Channel ``c`` of the group stands at ``offset + c * repeat ... offset + (c + 1) * repeat - 1`` along ``axis``.
    ``role`` says whether the axis produces the group's channels (``out``), consumes them (``in``), does both
    (``through``: depthwise weights, normalisation) or is an ``activation``, whose axis counts without the batch.
    """

    tensor: str
    axis: int
    role: Literal["out", "in", "through", "activation"]
    offset: int = 0
    repeat: int = 1


class Group(Value):
    """Channels that must shrink together; its ``id`` is the module path of its first producer."""

    id: str
    kind: Literal["channel", "head", "mlp", "block"]
    size: int
    align: int = 1
    members: tuple[Member, ...] = ()


class ModelGraph(Value):
    """A model as the runtime will see it: batch norms folded, operators in execution order, shapes for batch 1."""

    layers: tuple[Layer, ...]
    tensors: dict[str, Tensor]
    groups: tuple[Group, ...] = ()
    skipped: dict[str, str] = Field(default_factory=dict)
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def producers(self) -> Mapping[str, Layer]:
        """The layer that computes each activation."""
        return {out: layer for layer in self.layers for out in layer.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Layer, ...]]:
        """The layers that read each tensor, in execution order."""
        table: dict[str, list[Layer]] = {}
        for layer in self.layers:
            for name in dict.fromkeys(i for i in layer.inputs if i):
                table.setdefault(name, []).append(layer)
        return {name: tuple(layers) for name, layers in table.items()}

    @cached_property
    def compressible(self) -> tuple[Layer, ...]:
        """The layers with a weight matrix that a plan may give a format: Conv, Gemm and MatMul by a constant."""
        return tuple(layer for layer in self.layers if is_weight_layer(layer))

    @cached_property
    def stored(self) -> tuple[Layer, ...]:
        """The layers whose weights a plan may store in a format: the compressible ones, and tables of rows."""
        tables = {layer.name for layer in self.layers if is_embedding(layer) and self._is_table(layer.inputs[0])}
        return tuple(layer for layer in self.layers if is_weight_layer(layer) or layer.name in tables)

    def _is_table(self, weight: str) -> bool:
        tensor = self.tensors[weight]
        return len(tensor.shape) == 2 and tensor.dtype.startswith("float")

    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(layer_macs(self, layer) for layer in self.layers)

    def parameters(self) -> int:
        """Stored floating-point numbers."""
        return sum(self.tensors[w].elements for w in self.weight_names() if self.tensors[w].dtype.startswith("float"))

    def weight_names(self) -> Iterator[str]:
        seen: set[str] = set()
        for layer in self.layers:
            for name in layer.weights:
                if name not in seen:
                    seen.add(name)
                    yield name


def is_weight_layer(layer: Layer) -> bool:
    """Whether the layer multiplies its input by a stored weight."""
    if layer.op in ("Conv", "Gemm", "MatMul") and len(layer.inputs) > 1:
        return layer.inputs[1] in layer.weights
    return False


def is_embedding(layer: Layer) -> bool:
    """Whether the layer reads rows of a stored tensor, by numbers that are computed or given."""
    reads = layer.op == "Gather" and bool(layer.inputs) and layer.inputs[0] in layer.weights
    return reads and bool(layer.activations) and not layer.attributes.get("axis")


def weight_of(layer: Layer) -> str:
    """The name of what ``ModelGraph.stored`` layers store."""
    return layer.inputs[0] if layer.op == "Gather" else layer.inputs[1]


def layer_macs(graph: ModelGraph, layer: Layer) -> int:
    """Multiply-accumulates of one layer for one sample (0 for elementwise operators)."""
    if layer.op == "Conv":
        weight = graph.tensors[layer.inputs[1]].shape
        out = graph.tensors[layer.outputs[0]].shape
        positions = 1
        for size in out[1:]:
            positions *= size
        taps = 1
        for size in weight[1:]:
            taps *= size
        return out[0] * positions * taps
    if layer.op in ("Gemm", "MatMul"):
        first = graph.tensors[layer.inputs[0]].shape
        return graph.tensors[layer.outputs[0]].elements * first[-1]
    return 0


# ---------------------------------------------------------------------------------------------------- the plan


class NumFormat(Value):
    """How numbers are stored.

    ``affine``: integers of ``bits`` times a float32 scale, one for the ``tensor``, an output ``channel``, or a
    ``block`` of ``block`` consecutive inputs of an output channel.  ``codebook``: indices of ``bits`` into a table of
    8-bit integers (one table a tensor or an output channel), times a scale an output channel.  ``float``: of 16 or 32
    bits.
    """

    bits: int
    scheme: Literal["affine", "codebook", "log", "float"] = "affine"
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "block"] = "channel"
    block: int | None = None


FLOAT32 = NumFormat(bits=32, scheme="float", granularity="tensor")
FLOAT16 = NumFormat(bits=16, scheme="float", granularity="tensor")
INT8_WEIGHT = NumFormat(bits=8)
INT4_WEIGHT = NumFormat(bits=4)
UINT8_ACTIVATION = NumFormat(bits=8, symmetric=False, granularity="tensor")


class LayerPlan(Value):
    """What one weight layer becomes: the type it computes in, and the format its weights are stored in.

    ``int8`` takes activations whose scales are known before; ``int8_dynamic`` quantizes its input while it runs, over
    the range of that whole tensor; ``weight_only`` multiplies few-bit weights that have a scale a block.
    """

    compute: Compute = "fp32"
    storage: NumFormat = FLOAT32
    transform: None = None
    sparsity: float = 0.0


class Original(Value):
    """The plan starts from the caller's model."""

    kind: Literal["original"] = "original"


class Student(Value):
    """The plan starts from a narrower (or shallower) model.

    ``inherit`` keeps the original's best channels and leaves out the residual blocks ``dropped``; ``fresh`` builds the
    model anew with random weights.
    """

    kind: Literal["student"] = "student"
    width: float
    depth: float = 1.0
    init: Literal["inherit", "fresh"] = "inherit"
    dropped: tuple[str, ...] = ()


class Recipe(Value):
    """How a candidate is recovered: distillation steps and their settings (``steps=0``: post-training only).

    ``alpha`` weighs the teacher against the labels, ``temperature`` softens both, ``feature_weight`` weighs the
    similarity of penultimate features, ``qat_steps`` are the steps trained with the plan's formats simulated.
    """

    steps: int = 0
    qat_steps: int = 0
    alpha: float = 0.5
    temperature: float = 2.0
    feature_weight: float = 0.0
    learning_rate: float = 1e-2


class CompressionPlan(Value):
    """The one value that says what a candidate is."""

    version: int = PLAN_VERSION
    base: Original | Student = Field(default_factory=Original, discriminator="kind")
    groups: dict[str, int] = Field(default_factory=dict)
    layers: dict[str, LayerPlan] = Field(default_factory=dict)
    activations: dict[str, NumFormat] = Field(default_factory=dict)
    recipe: Recipe = Field(default_factory=Recipe)

    @cached_property
    def structure_digest(self) -> str:
        """Identifies what is built, whatever its recovery: two plans that share it are evaluated once."""
        return digest_of(self.model_dump(mode="json", exclude={"recipe"}))

    @cached_property
    def shape_digest(self) -> str:
        """Identifies the widths alone, whatever the number formats."""
        return digest_of(self.model_dump(mode="json", include={"base", "groups"}))

    @cached_property
    def digest(self) -> str:
        """Identifies the whole candidate, its recovery included."""
        return digest_of(self.model_dump(mode="json"))


# ------------------------------------------------------------------------------------- estimates, measurements


class Quantity(Value):
    """A number with its bounds and where it came from."""

    value: float
    low: float
    high: float
    source: Source


class Estimate(Value):
    """What a cost model says of a plan.

    ``unmodelled`` names the kernels it has never measured, ``notes`` say what else the user must know: a plan that does
    not fit the device's memory, say.
    """

    target: str
    costs: dict[str, Quantity]
    per_kernel: dict[str, float] = Field(default_factory=dict)
    unmodelled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Measurement(Value):
    """What one evaluation of a plan found; ``interval`` bounds the quality at 95%."""

    quality: float
    interval: tuple[float, float]
    costs: dict[str, float] = Field(default_factory=dict)
    fidelity: str
    seed: int
    seconds: float


class Quality(Value):
    """The task's metric on both splits; ``drop_ci95`` bounds the paired test drop against the original.

    The test split is scored once, for the models that a finished search delivers; of others nothing is known there.
    """

    validation: float
    test: float | None = None
    test_ci95: tuple[float, float] | None = None
    drop_ci95: tuple[float, float] | None = None


class Latency(Value):
    """Milliseconds of one run at the target's threads and batch."""

    predicted: float | None
    measured: float | None
    measured_p95: float | None
    error_band: tuple[float, float] | None = None


class FrontPoint(Value):
    """One delivered model; paths are relative to the run directory."""

    id: str
    plan: CompressionPlan
    quality: Quality
    latency_ms: Latency
    size_bytes: int
    params: int
    macs: int
    peak_memory_bytes: int | None = None
    energy_mj: float | None = None
    artifact: str
    checkpoint: str | None
    runtime_agreement: float | None = None
    kernels: dict[str, int] = Field(default_factory=dict)
    tied_with: tuple[str, ...] = ()
    feasible: bool = True


class Metric(Value):
    name: str = "accuracy"
    unit: str = "fraction"
    higher_is_better: bool = True


class Target(Value):
    hardware: str
    runtime: str
    version: str
    threads: int = 1
    batch: int = 1


class SplitGap(Value):
    """Validation minus test quality over the points of a front, and what chance alone gives.

    The 95% intervals are those of samples drawn from one population: choices made on validation data look better there
    than they are where a difference lies above them.
    """

    mean: float
    mean_by_chance: tuple[float, float]
    largest: float
    largest_by_chance: tuple[float, float]


class SearchSummary(Value):
    trials: int
    seconds: float
    hypervolume: float
    stages: dict[str, float] = Field(default_factory=dict)
    split_gap: SplitGap | None = None


class Front(Value):
    """``front.json``: everything a run found, as measured."""

    version: int = Field(default=1, alias="schema")
    status: Literal["running", "complete"]
    verified: bool
    task: str
    model: str
    metric: Metric
    target: Target
    seed: int
    objectives: tuple[str, ...]
    constraints: dict[str, float]
    reference: FrontPoint
    baselines: tuple[FrontPoint, ...] = ()
    points: tuple[FrontPoint, ...]
    search: SearchSummary

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), populate_by_name=True)
