"""What the command line shows of an export: the fp32 original beside it, and what is worth knowing."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autocompress.exporting.metrics import ExportMetrics, SplitQuality
from autocompress.front import points_per_unit
from autocompress.plan import Metric
from autocompress.report.describe import quality_text
from autocompress.units import format_bytes, format_ms, format_ratio

SHOWN_REASONS = 4


def export_view(metrics: ExportMetrics) -> RenderableType:
    """A table of both models, and lines on what was compared, what is executed and what stayed in float."""
    packages = metrics.environment.packages
    heading = (
        f"{metrics.name}, {metrics.label}, onnxruntime {packages.get('onnxruntime', '')} on {metrics.environment.cpu}, "
        f"{metrics.threads} thread{'s' if metrics.threads > 1 else ''}, batch 1"
    )
    parts: list[RenderableType] = [Text(heading, style="dim"), Text(""), _table(metrics), Text("")]
    parts += [Text(line) for line in (_outputs_line(metrics), _kernels_line(metrics), *_notes(metrics))]
    return Group(*parts)


def _table(metrics: ExportMetrics) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("", "fp32", metrics.label, ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for split, found in metrics.quality.items():
        table.add_row(
            f"{split} {metrics.metric.name}",
            quality_text(metrics.metric, found.original),
            quality_text(metrics.metric, found.export),
            _drop_text(metrics.metric, found),
        )
    size, latency = metrics.size_bytes, metrics.latency_ms
    table.add_row("size", format_bytes(size.original), format_bytes(size.export), _times(metrics.shrink, "smaller"))
    if size.archive is not None:
        ratio = _times(size.original / size.archive, "smaller")
        table.add_row("archived", "", format_bytes(size.archive), ratio)
    medians = latency.original.median, latency.export.median
    table.add_row("latency", format_ms(medians[0]), format_ms(medians[1]), _times(metrics.speedup, "faster"))
    return table


def _times(ratio: float, word: str) -> str:
    opposite = {"smaller": "larger", "faster": "slower"}[word]
    return f"{format_ratio(ratio)} {word}" if ratio >= 1.0 else f"{format_ratio(1.0 / ratio)} {opposite}"


def _drop_text(metric: Metric, found: SplitQuality) -> str:
    scale = points_per_unit(metric)
    # A drop is shown as what changes: the accuracy goes down where the drop is positive.
    change, low, high = (0.0 - value * scale for value in (found.drop, *reversed(found.drop_ci95)))
    unit = " points" if metric.unit == "fraction" else ""
    return f"{change:+.2f}{unit} (95%: {low:+.2f} to {high:+.2f})"


def _outputs_line(metrics: ExportMetrics) -> str:
    outputs, simulation = metrics.outputs, metrics.simulation
    noise = outputs.signal_to_noise_db
    text = "outputs equal fp32's" if noise is None else f"signal to noise {noise:.1f} dB"
    on = f"{outputs.samples} {outputs.data} samples"
    if outputs.top1_agreement is None:
        return f"{text} over {on}"
    text = f"agrees with fp32 on {outputs.top1_agreement:.1%} of {on}, {text}"
    if simulation.top1_agreement is not None:
        text += f"; with its torch simulation on {simulation.top1_agreement:.1%}"
    return text


def _kernels_line(metrics: ExportMetrics) -> str:
    layers = ", ".join(f"{count} {compute}" for compute, count in sorted(metrics.layers.items()))
    kernels = ", ".join(f"{count} {kind}" for kind, count in metrics.kernels.items() if count)
    return f"layers as executed: {layers}; kernels: {kernels}"


def _notes(metrics: ExportMetrics) -> list[str]:
    lines = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in metrics.float_layers.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - SHOWN_REASONS} more" if len(names) > SHOWN_REASONS else ""
        lines.append(f"stays fp32: {', '.join(names[:SHOWN_REASONS])}{more}: {reason}")
    if metrics.latency_ms.export.low > metrics.latency_ms.original.high:
        lines.append("note: this export is slower than fp32 here; widths this small or layers of this kind do not gain")
    return lines
