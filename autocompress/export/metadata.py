"""What an ONNX file says of itself: its plan, what was measured on it, and where it came from.

Two entries of ``metadata_props`` hold it, in few bytes (a small model is 20 kB, its plan's JSON 7): JSON without
defaults, each distinct layer plan stored once, compressed with a dictionary of the words that always occur, in base 85.

* ``autocompress.plan`` is written with the graph and depends on nothing else.
* ``autocompress.facts`` is provenance and metrics.  It is padded, so that a file does not change its size, which is
  one of its metrics, when the others become known.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
from pydantic import Field, ValidationError

from autocompress.errors import UsageError
from autocompress.export.files import write_atomic
from autocompress.export.wire import METADATA, metadata_of, opened
from autocompress.plan import CompressionPlan, FrontPoint, Metric, Target, Value
from autocompress.version import __version__

PLAN, FACTS = "autocompress.plan", "autocompress.facts"

FACTS_WIDTH = 288
"""Characters of the facts at least; longer ones are padded to whole multiples of ``FACTS_STEP``."""

FACTS_STEP = 64

MAX_JSON = 1 << 24
"""Bytes that an entry may unpack to: a plan of 10,000 layers takes a twentieth."""

_FORM = "1"
"""First character of an entry: how the rest is coded.  ``_WORDS`` belongs to it."""

_WORDS = (
    b"layer1.0.downsample.0features.0.conv.0.0classifier.1encoder.layers.encoder_layer_0.self_attention.out_proj.mlp.0"
    b"getitem_1conv2drelu_1add_1val_0flattenimagexmeandense.query.key.value.attention.output.block.se.fc1"
    b'"granularity":"tensor","symmetric":false"scheme":"float","block":128,"kind":"student","width":0.5'
    b'{"layers":[[{"compute":"int8","storage":{"bits":8}},{"storage":{"bits":4}}],[0],["conv1","fc"],'
    b'"activations":[[{"bits":8,"symmetric":false,"granularity":"tensor"}],[0,0,0,0],["input"'
    b'"recipe":{"steps":400,"qat_steps":"alpha":"temperature":"feature_weight":"learning_rate":0.01}}'
    b'"groups":{"layer1.0.conv1":16,"layer2.0.conv1":32,"layer3.0.conv1":64}'
    b'{"metrics":{"metric":{"name":"accuracy","unit":"fraction"},"quality":{"validation":{"value":0.9"interval":[0.9'
    b'"drop_interval":[-0.00"test":{"value":0.9"latency_ms":0.1"latency_p95_ms":"predicted_ms":"original_ms":'
    b'"threads":1,"batch":1,"params":"macs":"agreement":0.99"kernels":{"int8":"fp32":0,"convert":1,"other":1}}'
    b',"provenance":{"autocompress":"0.1.0","torch":"2.13.0+cpu","onnxruntime":"1.31.1","cpu":"AMD EPYC Intel(R) '
    b'Xeon(R) Platinum CPU Core Processor","date":"2026-01-01T00:00:00Z","task":"digitsfashion-mnistimagefolder"'
    b',"model":"resnet20","seed":0,"plan":"'
)


class Provenance(Value):
    """Where a file came from.

    Attributes:
        autocompress: version.
        torch: version.
        onnxruntime: version.
        cpu: of the machine that wrote it.
        date: when, in UTC.
        task: data it was compressed for; None where nothing was given.
        model: the original's name.
        seed: of the search or of calibration.
        plan: digest of its plan.
    """

    autocompress: str
    torch: str
    onnxruntime: str
    cpu: str
    date: str
    task: str | None = None
    model: str | None = None
    seed: int | None = None
    plan: str | None = None

    @classmethod
    def here(
        cls,
        plan: CompressionPlan,
        cpu: str,
        *,
        task: str | None = None,
        model: str | None = None,
        seed: int | None = None,
    ) -> Provenance:
        """Of a file that is written now, by these versions."""
        return cls(
            autocompress=__version__,
            torch=_version("torch"),
            onnxruntime=_version("onnxruntime"),
            cpu=cpu,
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            task=task,
            model=model,
            seed=seed,
            plan=plan.digest,
        )


class Score(Value):
    """The metric on one split; ``interval`` and ``drop_interval`` (original minus this) bound it at 95%."""

    value: float
    interval: tuple[float, float] | None = None
    drop_interval: tuple[float, float] | None = None


class ArtifactMetrics(Value):
    """What was measured on a file; None where it was not.  Numbers are kept to 6 digits.

    Attributes:
        metric: what ``quality`` is.
        quality: by split (``validation``, ``test``).
        latency_ms: median of one run at ``threads`` and ``batch``, and its 95th percentile beside it.
        predicted_ms: what the latency was predicted to be.
        original_ms: median of the original, timed in turn.
        params: floating-point numbers that the model has.
        macs: multiply-accumulates of one sample.
        agreement: share of samples on which the torch simulation gives the same answer.
        kernels: what the runtime executed, by kind.
    """

    metric: Metric | None = None
    quality: dict[str, Score] = Field(default_factory=dict)
    latency_ms: float | None = None
    latency_p95_ms: float | None = None
    predicted_ms: float | None = None
    original_ms: float | None = None
    threads: int | None = None
    batch: int | None = None
    params: int | None = None
    macs: int | None = None
    agreement: float | None = None
    kernels: dict[str, int] = Field(default_factory=dict)

    @classmethod
    def of(cls, point: FrontPoint, metric: Metric, target: Target) -> ArtifactMetrics:
        """Of a delivered model."""
        quality = point.quality
        scores = {"validation": Score(value=quality.validation)}
        if quality.test is not None:
            scores["test"] = Score(value=quality.test, interval=quality.test_ci95, drop_interval=quality.drop_ci95)
        return cls(
            metric=metric,
            quality=scores,
            latency_ms=point.latency_ms.measured,
            latency_p95_ms=point.latency_ms.measured_p95,
            predicted_ms=point.latency_ms.predicted,
            threads=target.threads,
            batch=target.batch,
            params=point.params,
            macs=point.macs,
            agreement=point.runtime_agreement,
            kernels=point.kernels,
        )


class ArtifactMetadata(Value):
    """All that a file says of itself; ``other`` are entries that are not ours."""

    plan: CompressionPlan | None = None
    metrics: ArtifactMetrics | None = None
    provenance: Provenance | None = None
    other: dict[str, str] = Field(default_factory=dict)


def describe(
    plan: CompressionPlan, provenance: Provenance | None = None, metrics: ArtifactMetrics | None = None
) -> dict[str, str]:
    """The entries of ``metadata_props`` for a file: what ``to_onnx`` and ``write_onnx`` take as metadata.

    >>> sorted(describe(CompressionPlan()))
    ['autocompress.facts', 'autocompress.plan']
    """
    return {PLAN: _pack(_plan_to_json(plan)), FACTS: _facts(provenance, metrics)}


def stamp(path: Path | str, metrics: ArtifactMetrics, provenance: Provenance | None = None) -> int:
    """Adds or replaces the metrics of a file in one step, and leaves every other byte of it as it is.

    Args:
        path: an ONNX file, ours or not.
        metrics: what was measured on it.
        provenance: replaces what the file says; None keeps that.

    Returns:
        The file's bytes, which change only where the facts outgrow their padding.

    Raises:
        UsageError: the file is missing, or is no ONNX model.
    """
    file = Path(path)
    with opened(file) as (data, fields):
        entries = metadata_of(data, fields)
        kept = provenance or _read_facts(entries.get(FACTS, ""), file).provenance
        entries[FACTS] = _facts(kept, metrics)
        parts = [data[field.start : field.stop] for field in fields if field.number != METADATA]
    tail = onnx.ModelProto(
        metadata_props=[onnx.StringStringEntryProto(key=key, value=value) for key, value in entries.items()]
    )
    whole = b"".join([*parts, tail.SerializeToString()])
    write_atomic(file, whole)
    return len(whole)


def read_metadata(path: Path | str) -> ArtifactMetadata:
    """What an ONNX file says of itself; of a foreign file only ``other``.

    Raises:
        UsageError: the file is missing, is no ONNX model, or its entries are damaged or of a later version.
    """
    file = Path(path)
    with opened(file) as (data, fields):
        entries = metadata_of(data, fields)
    plan, facts = entries.pop(PLAN, ""), _read_facts(entries.pop(FACTS, ""), file)
    if not plan.startswith(_FORM):
        return facts.model_copy(update={"other": entries})
    try:
        found = CompressionPlan.model_validate(_plan_from_json(_unpack(plan)))
    except (ValidationError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: its plan cannot be read: {error}") from error
    return facts.model_copy(update={"plan": found, "other": entries})


def graph_digest(path: Path | str) -> str:
    """SHA-256 of a file without its metadata: what stamping leaves as it is.

    Raises:
        UsageError: the file is missing, or is no ONNX model.
    """
    digest = hashlib.sha256()
    with opened(Path(path)) as (data, fields):
        for field in fields:
            if field.number != METADATA:
                digest.update(data[field.start : field.stop])
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- the coding


def _facts(provenance: Provenance | None, metrics: ArtifactMetrics | None) -> str:
    facts = ArtifactMetadata(provenance=provenance, metrics=metrics)
    text = _pack(_rounded(facts.model_dump(mode="json", exclude_defaults=True)))
    steps = max(0, -(-(len(text) - FACTS_WIDTH) // FACTS_STEP))
    return text.ljust(FACTS_WIDTH + steps * FACTS_STEP)


def _read_facts(text: str, path: Path) -> ArtifactMetadata:
    if not text.startswith(_FORM):
        return ArtifactMetadata()
    try:
        return ArtifactMetadata.model_validate(_unpack(text))
    except ValueError as error:
        raise UsageError(f"{path}: its provenance and metrics cannot be read: {error}") from error


def _plan_to_json(plan: CompressionPlan) -> dict[str, Any]:
    content = plan.model_dump(mode="json", exclude_defaults=True, exclude={"layers", "activations", "base"})
    if plan.base != type(plan)().base:
        content["base"] = plan.base.model_dump(mode="json")
    for key, table in (("layers", plan.layers), ("activations", plan.activations)):
        if table:
            content[key] = _table(table)
    return content


def _table(values: Mapping[str, Value]) -> list[Any]:
    """Distinct values, the place of each name's value among them, and the names."""
    dumped = [json.dumps(value.model_dump(mode="json", exclude_defaults=True)) for value in values.values()]
    distinct = list(dict.fromkeys(dumped))
    return [[json.loads(text) for text in distinct], [distinct.index(text) for text in dumped], list(values)]


def _plan_from_json(content: dict[str, Any]) -> dict[str, Any]:
    for key in ("layers", "activations"):
        if key in content:
            distinct, places, names = content[key]
            content[key] = {name: distinct[place] for name, place in zip(names, places, strict=True)}
    return content


def _pack(content: dict[str, Any]) -> str:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_WORDS)
    return _FORM + base64.b85encode(coder.compress(text) + coder.flush()).decode()


def _unpack(text: str) -> dict[str, Any]:
    """The content of an entry.

    Raises:
        ValueError: it is damaged.
    """
    decoder = zlib.decompressobj(-15, zdict=_WORDS)
    try:
        found = decoder.decompress(base64.b85decode(text[len(_FORM) :].rstrip()), MAX_JSON)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not decoder.eof:
        raise ValueError("it is cut off, or unpacks to more than a plan can take")
    content = json.loads(found)
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, Iterable) and not isinstance(value, str) else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
