"""Whether simulation, exact module and file agree on 10,000 real images: ``make bench-exactness``, about 10 minutes.

Fashion-MNIST's test images through networks trained once and cached, in several formats.  The simulation is what
recovery trains with; the exact module computes what the runtime does, integer for integer.  Each tensor of the file is
compared with the simulation of the layer that makes it, on the file's own inputs.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from autocompress.export.comparison import compare_tensors, first_departure
from autocompress.export.onnx import write_onnx
from autocompress.graph.read import read_model
from autocompress.hardware.profile import cpu_description
from autocompress.methods.exact import ExactModule
from autocompress.methods.post_training import quantize_model, uniform_plan
from autocompress.methods.simulation import build_compressed
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.runtime.session import make_session
from autocompress.tasks import load_task
from autocompress.tasks.base import Task
from autocompress.terminal import showing_progress
from benchmarks.fronts import RESULTS, markdown

FOLDER = RESULTS / "export"
MODELS, BITS = ("resnet20", "mobilenetv2"), (int8_weight_bits(), 4, 3)
CALIBRATION, BATCH, COMPARED = 128, 250, 16


def rows_of(task: Task, name: str, work: Path) -> list[dict[str, str]]:
    """A row for each format of one network."""
    graph, weights = read_model(task.model, task.example_inputs)
    calibration = [(task.split("calibration").batch(slice(0, CALIBRATION)).inputs[0],)]
    images, targets = task.split("test"), task.split("test").targets
    rows = []
    for bits in BITS:
        compressed = quantize_model(graph, weights, uniform_plan(graph, "int8", bits)[0], calibration)
        path = work / f"{name}-{bits}.onnx"
        write_onnx(compressed, path)
        session = make_session(path, 2)
        inputs = [images.batch(slice(i, i + BATCH)).inputs[0] for i in range(0, len(images), BATCH)]
        file = torch.cat([torch.from_numpy(session.run(None, {graph.inputs[0]: x.numpy()})[0]) for x in inputs])
        simulated, exact = (_outputs(made, inputs) for made in (build_compressed(compressed), ExactModule(compressed)))
        departures = compare_tensors(compressed, path, (inputs[0][:COMPARED],))
        first = first_departure(departures)
        rows.append(
            {
                "model": name,
                "int8, weight bits": str(bits),
                "images": str(len(images)),
                "accuracy of the file": _share(file.argmax(1) == targets),
                "of the simulation": _share(simulated.argmax(1) == targets),
                "simulation agrees": _share(simulated.argmax(1) == file.argmax(1)),
                "exact module agrees": _share(exact.argmax(1) == file.argmax(1)),
                "exact module's logits equal": _share((exact == file).all(1)),
                "tensors compared": str(len(departures)),
                "first that departs": "none" if first is None else first.tensor,
            }
        )
        print(rows[-1], flush=True)
    return rows


def _outputs(module: nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([module(x) for x in inputs])


def _share(hits: torch.Tensor) -> str:
    return f"{100 * float(hits.double().mean()):.2f}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="by default both")
    parser.add_argument("--work", type=Path, default=FOLDER / ".work")
    given = parser.parse_args()
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    with showing_progress(quiet=False) as progress:
        tasks = {name: load_task("fashion-mnist", name, progress=progress) for name in given.models}
    for name, task in tasks.items():
        rows += rows_of(task, name, work)
    table = pd.DataFrame(rows)
    table.to_csv(FOLDER / "exactness.csv", index=False)
    packages = ", ".join(f"{package} {version(package)}" for package in ("onnxruntime", "torch"))
    told = f"`make bench-exactness`; {cpu_description().split(',')[0]}, {packages}; {datetime.now(UTC):%Y-%m-%d}."
    text = f"# Simulation against file\n\n{told}\n\n{markdown(table)}"
    (FOLDER / "exactness.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
