"""How well the latency model knows plans it has never seen: ``make bench-latency``, about 25 minutes on two cores.

First this machine is profiled and the profile frozen.  Then plans of each family are drawn by a seed, exported with
random weights and timed twice; a dozen anchors of the family calibrate the model, and its predictions of the drawn
plans are held against the times.  What simpler predictors make of the same anchors stands beside it.

The page is written anew from all figures in the folder after every family, so threads can be run one after the other.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import nn

from autocompress.export.onnx import to_onnx
from autocompress.graph.read import read_model
from autocompress.graph.rewrite import rewrite
from autocompress.hardware.anchors import anchor_plans, measure_plans
from autocompress.hardware.cost import FittedCostModel
from autocompress.hardware.measure import measure_profile
from autocompress.hardware.profile import FittedProfile, HardwareProfile, cpu_description
from autocompress.hardware.synthetic import INT8, random_weights, with_ranges
from autocompress.methods.quantization import activation_formats
from autocompress.plan import CompressionPlan, Layer, LayerPlan, ModelGraph
from autocompress.runtime.session import make_session, version
from autocompress.search.menu import keep_counts
from autocompress.tasks.vision import import_torchvision
from autocompress.terminal import showing_progress
from benchmarks.fronts import RESULTS, markdown

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
STYLES = ("fp32", "int8", "stretches", "layers")
SECONDS_EACH = 0.4
SMALL_GAP = 1.0
"""Pairs of plans closer than this many repeat floors are not ranked."""


@dataclass(frozen=True)
class Family:
    """A network, and whether networks like it are among those a device is profiled on."""

    build: Callable[[], nn.Module]
    seen: bool


def vision_transformer() -> nn.Module:
    """Four blocks of ViT-B/16."""
    import_torchvision()
    from torchvision.models.vision_transformer import VisionTransformer

    made: nn.Module = VisionTransformer(
        image_size=224, patch_size=16, num_layers=4, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=1000
    )  # fmt: skip
    return made


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    """A torchvision classifier with random weights."""

    def build() -> nn.Module:
        made: nn.Module = import_torchvision().models.get_model(name, weights=None)
        return made

    return build


FAMILIES = {
    "resnet18": Family(torchvision_model("resnet18"), True),
    "mobilenet_v2": Family(torchvision_model("mobilenet_v2"), True),
    "vit-b16-4-blocks": Family(vision_transformer, True),
    "squeezenet1_1": Family(torchvision_model("squeezenet1_1"), False),
    "densenet121": Family(torchvision_model("densenet121"), False),
    "efficientnet_b0": Family(torchvision_model("efficientnet_b0"), True),
}


def draw_plans(graph: ModelGraph, count: int, seed: int) -> list[CompressionPlan]:
    """Plans such as a search proposes: every group's width around a common one, layers in one type or mixed.

    The common widths are spread evenly over their range, so that few plans span it.
    """
    rng = np.random.default_rng(seed)
    common_shares = rng.permutation(np.exp(np.linspace(np.log(SHARES[0]), 0.0, count)))
    names = [layer.name for layer in graph.compressible]
    plans: list[CompressionPlan] = []
    while len(plans) < count:
        common = float(common_shares[len(plans)])
        groups = {}
        for group in graph.groups:
            wanted = group.size * min(1.0, common * float(np.exp(rng.normal(0.0, 0.3))))
            groups[group.id] = min(keep_counts(group.size, SHARES), key=partial(_distance, wanted))
        layers = draw_types(names, STYLES[len(plans) % len(STYLES)], rng)
        plans.append(CompressionPlan(groups=groups, layers=layers, activations=activation_formats(graph, layers)))
    return plans


def _distance(wanted: float, kept: int) -> float:
    return abs(kept - wanted)


def draw_types(names: Sequence[str], style: str, rng: np.random.Generator) -> dict[str, LayerPlan]:
    """What each layer computes in: all alike, each by chance, or in stretches."""
    if style in ("fp32", "int8"):
        return dict.fromkeys(names, INT8) if style == "int8" else {}
    layers: dict[str, LayerPlan] = {}
    share, current = float(rng.uniform(0.2, 0.8)), False
    for name in names:
        if style == "layers" or not layers or rng.random() < 0.25:
            current = bool(rng.random() < share)
        if current:
            layers[name] = INT8
    return layers


def layer_macs(graph: ModelGraph) -> dict[str, float]:
    """Multiply-accumulates of each weight layer."""
    found = {}
    for layer in graph.compressible:
        weight, out = (graph.tensors[name].shape for name in (layer.inputs[1], layer.outputs[0]))
        window = weight[1:] if layer.op == "Conv" or layer.attributes.get("transB") else weight[:1]
        found[layer.name] = float(np.prod(out)) * float(np.prod(window))
    return found


def macs_of(graph: ModelGraph, plan: CompressionPlan, int8: float) -> float:
    """Multiply-accumulates of a plan, those in int8 counted as a part of one."""
    macs = layer_macs(rewrite(graph, plan.groups))
    return sum(value * (int8 if name in plan.layers else 1.0) for name, value in macs.items())


def as_matmul(layer: Layer, graph: ModelGraph) -> tuple[Layer, ModelGraph]:
    """A fully connected layer over many rows, which alone in a graph has an axis too many for a Gemm."""
    weight = graph.tensors[layer.inputs[1]]
    flipped = weight.model_copy(
        update={"shape": weight.shape[::-1] if layer.attributes.get("transB") else weight.shape}
    )
    changed = {"op": "MatMul", "inputs": layer.inputs[:2], "weights": layer.weights[:1], "attributes": {}}
    tensors = {**graph.tensors, weight.id: flipped}
    return layer.model_copy(update=changed), graph.model_copy(update={"tensors": tensors})


class SingleOperators:
    """The time of each weight layer alone in a session, measured once for each shape and type."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._known: dict[tuple[object, ...], float] = {}

    def total_ms(self, graph: ModelGraph, plan: CompressionPlan) -> float:
        """The sum over the plan's layers."""
        small = rewrite(graph, plan.groups)
        return sum(self._layer_ms(small, place, plan) for place, _ in enumerate(small.compressible))

    def _layer_ms(self, graph: ModelGraph, place: int, plan: CompressionPlan) -> float:
        layer = graph.compressible[place]
        source, out = layer.inputs[0], layer.outputs[0]
        int8 = layer.name in plan.layers
        if layer.op == "Gemm" and len(graph.tensors[source].shape) > 1:
            layer, graph = as_matmul(layer, graph)
        shapes = tuple(graph.tensors[name].shape for name in (source, layer.inputs[1], out))
        key = (layer.op, *shapes, tuple(sorted(layer.attributes.items())), int8)
        if key not in self._known:
            flat = layer.model_copy(
                update={
                    "name": "flat", "op": "Flatten", "inputs": (out,), "outputs": ("flat",), "weights": (),
                    "attributes": {"axis": 1},
                }
            )  # fmt: skip
            elements = int(np.prod(graph.tensors[out].shape))
            tensors = {name: graph.tensors[name] for name in (*layer.inputs, out) if name}
            tensors["flat"] = graph.tensors[out].model_copy(update={"id": "flat", "shape": (elements,)})
            alone = ModelGraph(layers=(layer, flat), tensors=tensors, inputs=(source,), outputs=("flat",))
            layers = {layer.name: INT8} if int8 else {}
            rng = np.random.default_rng(0)
            made = with_ranges(alone, CompressionPlan(layers=layers), random_weights(alone, rng), rng)
            self._known[key] = self._time(to_onnx(made).SerializeToString(), source, graph.tensors[source].shape)
        return self._known[key]

    def _time(self, model: bytes, name: str, shape: tuple[int, ...]) -> float:
        session = make_session(model, self._threads)
        feed = {name: np.random.default_rng(0).random((1, *shape), dtype=np.float32)}
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - begin)
        return float(np.median(times[2:])) * 1e3


def affine(anchors: Sequence[float], latency_ms: np.ndarray, plans: Sequence[float]) -> np.ndarray:
    """A baseline's best: its figures turned into times by a straight line through the same anchors."""
    columns = np.column_stack([anchors, np.ones(len(anchors))]) / latency_ms[:, None]
    slope, constant = np.linalg.lstsq(columns, np.ones(len(anchors)), rcond=None)[0]
    return np.asarray(slope * np.array(plans) + constant)


def ranked(predicted: np.ndarray, measured: np.ndarray, floor: float) -> float:
    """Kendall's tau over the pairs that lie further apart than two measurements of one plan do."""
    if floor <= 0:
        return float(kendalltau(predicted, measured).statistic)
    agree = total = 0
    for i in range(len(measured)):
        for j in range(i):
            if abs(np.log(measured[i] / measured[j])) > SMALL_GAP * floor:
                total += 1
                agree += 1 if (predicted[i] - predicted[j]) * (measured[i] - measured[j]) > 0 else -1
    return agree / total if total else 1.0


def evaluate(name: str, family: Family, profile: FittedProfile, count: int, seed: int, singles: bool) -> pd.DataFrame:
    """One family at the profile's threads: a row for each drawn plan, with every predictor's figure."""
    torch.manual_seed(0)
    module = family.build().eval()
    graph, weights = read_model(module, (torch.randn(2, 3, 224, 224),))
    anchors, plans = anchor_plans(graph), draw_plans(graph, count, seed)
    constants = {key: value for key, value in weights.items() if value.dim() == 0 or not value.is_floating_point()}
    threads = profile.threads
    with showing_progress(quiet=False) as progress:
        first, second = (
            measure_plans(
                graph, [*anchors, *plans], threads=threads, seconds_each=SECONDS_EACH, constants=constants,
                progress=progress, block=profile.nchwc_block if turn == 0 else None,
            )
            for turn in range(2)
        )  # fmt: skip
    skeleton = FittedCostModel(profile).lower(graph)
    uncalibrated = skeleton.price(plans).latency_ms
    # Anchors and drawn plans in the same two passes: what the machine drifts in between is no error of the model.
    seen = [
        one._replace(latency_ms=float(np.sqrt(one.latency_ms * other.latency_ms)))
        for one, other in zip(first[: len(anchors)], second, strict=False)
    ]
    calibration = skeleton.calibrate(seen)
    table = skeleton.price(plans)
    known = np.array([observation.latency_ms for observation in seen])
    baselines: dict[str, Callable[[CompressionPlan], float]] = {
        "macs": lambda plan: macs_of(graph, plan, 1.0),
        "macs_int8_quarter": lambda plan: macs_of(graph, plan, 0.25),
    }
    if singles:
        operators = SingleOperators(threads)
        baselines["single_operators"] = lambda plan: operators.total_ms(graph, plan)
    rows = pd.DataFrame(
        {
            "family": name,
            "seen": family.seen,
            "threads": threads,
            "plan": [plan.structure_digest for plan in plans],
            "style": [STYLES[index % len(STYLES)] for index in range(count)],
            "measured_ms": [observation.latency_ms for observation in first[len(anchors) :]],
            "again_ms": [observation.latency_ms for observation in second[len(anchors) :]],
            "predicted_ms": table.latency_ms,
            "profile_alone_ms": uncalibrated,
            "band": calibration.band,
            "size_bytes": [observation.size_bytes for observation in first[len(anchors) :]],
            "predicted_bytes": table.size_bytes,
        }
    )
    for label, figure in baselines.items():
        rows[f"{label}_ms"] = affine([figure(plan) for plan in anchors], known, [figure(plan) for plan in plans])
    return rows


PREDICTORS = {
    "predicted_ms": "this model",
    "profile_alone_ms": "device profile alone",
    "macs_ms": "MACs",
    "macs_int8_quarter_ms": "MACs, int8 = 1/4",
    "single_operators_ms": "sum of single-operator times",
}


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Errors of every predictor in every family, the repeat floor beside them."""
    lines = []
    for (family, threads), part in rows.groupby(["family", "threads"], sort=False):
        measured = np.sqrt(part["measured_ms"].to_numpy() * part["again_ms"].to_numpy())
        floor = float(np.abs(part["again_ms"] / part["measured_ms"] - 1.0).median())
        seen = bool(part["seen"].iloc[0])
        limit = max(0.03, 1.5 * floor) if seen else 0.05
        for column, title in PREDICTORS.items():
            if column not in part or part[column].isna().all():
                continue
            predicted = part[column].to_numpy()
            errors = np.abs(predicted / measured - 1.0)
            tau = ranked(predicted, measured, floor)
            met = errors.mean() <= limit and (errors <= 0.1).mean() >= 0.95 and errors.max() <= 0.2 and tau >= 0.95
            lines.append(
                {
                    "family": family,
                    "in the profile's set": "yes" if seen else "no",
                    "threads": threads,
                    "plans": len(part),
                    "span": f"{measured.max() / measured.min():.1f}x",
                    "floor %": f"{100 * floor:.1f}",
                    "predictor": title,
                    "MAPE %": f"{100 * errors.mean():.1f}",
                    "bar %": f"{100 * limit:.1f}",
                    "max %": f"{100 * errors.max():.1f}",
                    "within 10%": f"{100 * (errors <= 0.1).mean():.0f}%",
                    "tau": f"{tau:.3f}",
                    "met": ("yes" if met else "no") if column == "predicted_ms" else "",
                    "size max %": f"{100 * np.abs(part['predicted_bytes'] / part['size_bytes'] - 1).max():.2f}"
                    if column == "predicted_ms"
                    else "",
                }
            )
    return pd.DataFrame(lines)


def pricing_speed(profile: FittedProfile, count: int = 20_000) -> float:
    """Plans of ResNet-50 priced a second, all different and never seen, on one thread."""
    torch.manual_seed(0)
    graph, _ = read_model(torchvision_model("resnet50")().eval(), (torch.randn(2, 3, 224, 224),))
    skeleton = FittedCostModel(profile).lower(graph)
    rng = np.random.default_rng(0)
    sizes = np.array([group.size for group in graph.groups])
    rates = []
    for _ in range(5):
        keeps = np.maximum(8, (rng.uniform(0.1, 1.0, (count, len(sizes))) * sizes / 8).round().astype(np.int64) * 8)
        formats = rng.integers(0, len(skeleton.formats), (count, len(skeleton.layer_names)))
        begin = time.perf_counter()
        skeleton.price_arrays(np.minimum(keeps, sizes), formats)
        rates.append(count / (time.perf_counter() - begin))
    return float(np.median(rates))


def write(out: Path, seed: int) -> None:
    """The page that says what the figures in the folder come to."""
    rows = pd.concat([pd.read_csv(path) for path in sorted(out.glob("plans-*-threads.csv"))], ignore_index=True)
    profiles = {
        profile.threads: profile
        for path in sorted(out.glob("profile-*-threads.yaml"))
        if isinstance(profile := HardwareProfile.load(path), FittedProfile)
    }
    table = summary(rows)
    table.to_csv(out / "summary.csv", index=False)
    speed_file = out / "plans-a-second.txt"
    speed = float(speed_file.read_text()) if speed_file.exists() else float("nan")
    lines = [
        "# The latency model on plans it has never seen\n",
        f"`make bench-latency`, {datetime.now(UTC):%Y-%m-%d}, {cpu_description()}, {os.cpu_count()} cores, "
        f"onnxruntime {version()}, torch {torch.__version__}, plans drawn with seed {seed} after the profiles were "
        "frozen.\n",
    ]
    for threads, profile in profiles.items():
        held = profile.holdout
        if held is not None:
            lines.append(
                f"Profile at {threads} thread{'s' if threads > 1 else ''}: {profile.provenance.seconds:.0f} s; on its "
                f"own models held out {100 * held.mape:.1f}% MAPE, max {100 * held.max:.0f}%, tau "
                f"{held.kendall_tau:.3f}, floor {100 * (held.repeat_floor or 0):.1f}%.\n"
            )
    lines += [
        f"Pricing: {speed:,.0f} ResNet-50 plans a second on one thread, every plan another, with the "
        "profile alone (bar 20,000).\n",
        "## This model\n",
        markdown(table[table["predictor"] == PREDICTORS["predicted_ms"]].drop(columns=["predictor"])),
        "Measured is the geometric mean of two passes over all anchors and plans; the floor is the median distance "
        "between the two. Bars: MAPE "
        "at most 3% or 1.5 floors for families like those profiled, 5% for others; 95% of plans within 10%, all "
        "within 20%; tau at least 0.95 over pairs further apart than the floor.\n",
        "## Beside simpler predictors\n",
        "Each baseline is turned into milliseconds by a straight line through the same anchors.\n",
        markdown(
            table.pivot_table(index=["family", "threads"], columns="predictor", values="MAPE %", aggfunc="first",
                              sort=False).reset_index()
        ),
    ]  # fmt: skip
    reasons = out / "missed.md"
    if reasons.exists():
        lines.append(reasons.read_text(encoding="utf-8"))
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--plans", type=int, default=16, help="drawn for each family")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--no-singles", action="store_true", help="leave the single-operator baseline out")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    for threads in given.threads:
        with showing_progress(quiet=False) as progress:
            profile = measure_profile(threads, progress=progress)
        profile.save(out / f"profile-{threads}-threads.yaml")
        parts: list[pd.DataFrame] = []
        for name in given.families:
            begin = time.perf_counter()
            parts.append(evaluate(name, FAMILIES[name], profile, given.plans, given.seed, not given.no_singles))
            pd.concat(parts).round(6).to_csv(out / f"plans-{threads}-threads.csv", index=False)
            write(out, given.seed)
            line = summary(parts[-1]).iloc[0]
            print(
                f"{name}, {threads} threads: MAPE {line['MAPE %']}% (bar {line['bar %']}%), max {line['max %']}%, "
                f"tau {line['tau']}, span {line['span']}, floor {line['floor %']}%, "
                f"{time.perf_counter() - begin:.0f} s",
                flush=True,
            )
    (out / "plans-a-second.txt").write_text(f"{pricing_speed(profile):.0f}\n", encoding="utf-8")
    write(out, given.seed)
    print(out / "README.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
