"""What an export costs: reading a model through torch once, then an ONNX model for each plan.

``python -m benchmarks.export_cost`` times ``read_model`` (which exports through torch) and ``to_onnx`` of several plans
on one thread, and writes ``results/export-cost.csv`` and ``.txt``.  A model has the weights it is born with: the time
depends on their number, not on their values.
"""

from __future__ import annotations

import csv
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from autocompress.export.onnx import to_onnx
from autocompress.graph.read import read_model
from autocompress.hardware.profile import cpu_description
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.post_training import CalibrationOptions, quantize_model, uniform_plan
from autocompress.plan import INT4_WEIGHT, INT8_WEIGHT, CompressionPlan, LayerPlan, ModelGraph
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.tasks.vision import import_torchvision

MODELS = ("resnet50", "mobilenet_v2")
REPEATS = 7
FOLDER = Path("results")
COLUMNS = ("model", "read_model_s", "plan", "to_onnx_median_s", "lowest_s", "highest_s", "megabytes")


def main() -> None:
    """Times every model and writes the table."""
    torch.set_num_threads(1)
    rows = [row for name in MODELS for row in measure(name)]
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "export-cost.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
    lines = ["  ".join(f"{value:>16}" for value in row) for row in (COLUMNS, *rows)]
    text = "\n".join([*lines, "", told(), ""])
    (FOLDER / "export-cost.txt").write_text(text)
    print(text)


def measure(name: str) -> list[tuple[str, ...]]:
    """A row for each plan of one torchvision model at 224 x 224."""
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    batch = (torch.rand(2, 3, 224, 224),)
    start = time.perf_counter()
    graph, weights = read_model(model, batch)
    read = time.perf_counter() - start
    rows = []
    for label, plan in plans(graph).items():
        if plan.layers:
            options = CalibrationOptions(ranges="minmax", equalize="off", bias_correction=False)
            compressed = quantize_model(graph, weights, plan, [batch], options)
        else:
            compressed = CompressedModel(graph=graph, weights=weights, plan=plan)
        taken, size = timed(lambda: to_onnx(compressed).ByteSize())  # noqa: B023
        low, middle, high = min(taken), statistics.median(taken), max(taken)
        rows.append((name, f"{read:.1f}", label, f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}", f"{size / 1e6:.2f}"))
    return rows


def plans(graph: ModelGraph) -> dict[str, CompressionPlan]:
    """fp32, all int8, and a mixture whose layers are drawn."""
    draw = random.Random(0)
    int8 = LayerPlan(compute="int8", storage=INT8_WEIGHT)
    choices = (int8, int8, LayerPlan(compute="int8", storage=INT4_WEIGHT), LayerPlan())
    mixed = {layer.name: draw.choice(choices) for layer in graph.compressible}
    return {
        "fp32": CompressionPlan(),
        "int8": uniform_plan(graph, "int8", int8_weight_bits())[0],
        "mixed": CompressionPlan(layers={name: plan for name, plan in mixed.items() if plan != LayerPlan()}),
    }


def timed(make: Callable[[], int]) -> tuple[list[float], int]:
    """Seconds of each repeat after one that does not count, and what is made."""
    size = make()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        make()
        taken.append(time.perf_counter() - start)
    return taken, size


def told() -> str:
    """The machine, the versions and the date."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("autocompress", "torch", "onnx", "onnxruntime"))
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    how = f"Median of {REPEATS} on one thread; checking with onnx.checker included."
    return f"{how}\n{cpu_description()}; {packages}; {day}"


if __name__ == "__main__":
    main()
