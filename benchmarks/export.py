"""Our int8 export against onnxruntime's own quantizer, side by side: ``make bench-export``, about 40 minutes.

Eight networks at their usual input sizes.  Weights are random (no hub can be reached from everywhere), batch norms are
estimated again on photographs, so that activations have the ranges of real inputs.  onnxruntime's quantizer is given
its best: ``quant_pre_process``, then ``quantize_static`` (QDQ, uint8 activations, int8 weights a channel, min-max) on
the same samples, and ``quantize_dynamic``.  Ours is ``quantize_model`` of the uniform int8 plan, with min-max too.
Where the processor saturates sums of 8-bit products, both keep weights to 7 bits (theirs by ``reduce_range``).

Files are timed in turn within one process; a ratio is that of two neighbouring windows, and its interval comes from the
order statistics of all rounds.  The repeat floor is the same for a second session of one file.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import nn

from autocompress.export.metadata import Provenance, describe
from autocompress.export.onnx import write_onnx
from autocompress.graph.read import read_model
from autocompress.hardware.profile import cpu_description
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.post_training import CalibrationOptions, quantize_model, uniform_plan
from autocompress.plan import CompressionPlan
from autocompress.runtime.cpu import int8_weight_bits, needs_reduced_range
from autocompress.runtime.kernels import check_kernels, executed_kernels
from autocompress.runtime.session import make_session
from autocompress.runtime.timing import settle
from autocompress.tasks.vision import import_torchvision
from benchmarks.fronts import RESULTS, markdown

FOLDER = RESULTS / "export"
CALIBRATION, HELD_OUT = 32, 32
SIZE, TOKENS, WORDS = 224, 128, 30522
WINDOW_S = 0.03
SECONDS_EACH = 12.0
MOST_ROUNDS, LEAST_ROUNDS = 120, 15
KINDS = ("fp32", "ours", "static", "dynamic")

Inputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """A network and its inputs: ``count`` samples of a seed."""

    build: Callable[[], nn.Module]
    samples: Callable[[int, int], Inputs]


# ------------------------------------------------------------------------------------------------------- subjects


def photographs(count: int, seed: int) -> Inputs:
    """Random crops of scikit-learn's two photographs, normalised as ImageNet is."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    pictures = [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
    mean, deviation = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def whole(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = 96 + whole(300)
        top, left = whole(picture.shape[1] - side), whole(picture.shape[2] - side)
        crop = picture[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        crops.append((crop[0] - mean) / deviation)
    return (torch.stack(crops),)


def sentences(count: int, seed: int) -> Inputs:
    """Random tokens, a third of the sentences shorter than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, TOKENS, dtype=torch.int64)
    mask[::3, TOKENS // 2 :] = 0
    return torch.randint(WORDS, (count, TOKENS), generator=generator), mask


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = import_torchvision().models.get_model(name, weights=None)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        with torch.no_grad():
            if hasattr(model, "heads"):
                nn.init.normal_(model.heads.head.weight, std=0.02)  # born zero: nothing could be compared
            model.eval()
            for norm in norms:
                norm.train()
            for batch in photographs(64, 1)[0].split(16) if norms else ():
                model(batch)
        return model.eval()

    return build


class _Encoder(nn.Module):
    """BERT-base with its classification head."""

    def __init__(self) -> None:
        super().__init__()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import_torchvision()  # transformers imports it, too, and would fail where this one does not
        from transformers import BertConfig, BertForSequenceClassification

        self.bert = BertForSequenceClassification(BertConfig(num_labels=2, vocab_size=WORDS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).logits


def bert() -> nn.Module:
    torch.manual_seed(0)
    return _Encoder().eval()


SUBJECTS = {
    **{
        name: Subject(torchvision_model(name), photographs)
        for name in (
            "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x1_0",
            "vit_b_16",
        )
    },
    "bert_base": Subject(bert, sentences),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the files


def build(name: str, work: Path) -> None:
    """Writes the files of one network: the original, ours, and both of onnxruntime's."""
    subject = SUBJECTS[name]
    model, calibration = subject.build(), subject.samples(CALIBRATION, 2)
    start = time.perf_counter()
    graph, weights = read_model(model, tuple(x[:2] for x in calibration))
    read_s = time.perf_counter() - start
    write_onnx(CompressedModel(graph, weights, CompressionPlan()), work / "fp32.onnx")
    start = time.perf_counter()
    plan, left = uniform_plan(graph, "int8", int8_weight_bits())
    batches = [tuple(x[i : i + 4] for x in calibration) for i in range(0, CALIBRATION, 4)]
    compressed = quantize_model(graph, weights, plan, batches, CalibrationOptions(ranges="minmax"))
    write_onnx(
        compressed, work / "ours.onnx", describe(compressed.plan, Provenance.here(compressed.plan, cpu_description()))
    )
    print(
        f"{name}: read in {read_s:.1f} s, quantized in {time.perf_counter() - start:.1f} s; float: {left or 'nothing'}"
    )
    print(f"  {compressed.calibration}", flush=True)
    problems = check_kernels(compressed, executed_kernels(work / "ours.onnx"))
    if problems:
        raise SystemExit(f"{name} is not executed as planned: {problems}")
    theirs(model, graph.inputs, calibration, work)


def theirs(model: nn.Module, names: Sequence[str], calibration: Inputs, work: Path) -> None:
    """onnxruntime's own two quantizations of torch's own export."""
    from onnxruntime import quantization as quantizer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantizer.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(feeds(names, calibration))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    original, prepared = work / "torch.onnx", str(work / "prepared.onnx")
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in names)
    torch.onnx.export(
        model, tuple(x[:2] for x in calibration), original, dynamo=True, verbose=False, input_names=list(names),
        dynamic_shapes=batch, external_data=False,
    )  # fmt: skip
    quant_pre_process(str(original), prepared)
    quantizer.quantize_static(
        prepared, str(work / "static.onnx"), Reader(), quant_format=quantizer.QuantFormat.QDQ,
        activation_type=quantizer.QuantType.QUInt8, weight_type=quantizer.QuantType.QInt8, per_channel=True,
        reduce_range=needs_reduced_range(),
    )  # fmt: skip
    quantizer.quantize_dynamic(
        prepared, str(work / "dynamic.onnx"), per_channel=True, weight_type=quantizer.QuantType.QInt8,
        reduce_range=needs_reduced_range(),
    )  # fmt: skip


def feeds(names: Sequence[str], inputs: Inputs) -> Iterator[dict[str, np.ndarray]]:
    """One sample at a time."""
    for index in range(len(inputs[0])):
        yield {name: x[index : index + 1].numpy() for name, x in zip(names, inputs, strict=True)}


# ------------------------------------------------------------------------------------------------------ measuring


def signal_to_noise(name: str, work: Path) -> dict[str, float]:
    """Decibels of each file's outputs against torch's own float export, on samples that nothing was calibrated on."""
    inputs = SUBJECTS[name].samples(HELD_OUT, 3)

    def outputs(path: Path) -> np.ndarray:
        session = make_session(path)
        names = [given.name for given in session.get_inputs()]
        return np.concatenate([session.run(None, feed)[0] for feed in feeds(names, inputs)]).astype(np.float64)

    expected = outputs(work / "torch.onnx")
    found = {}
    for kind in KINDS:
        noise = float(((outputs(work / f"{kind}.onnx") - expected) ** 2).sum())
        found[kind] = 10 * float(np.log10((expected**2).sum() / max(noise, 1e-30)))
    return found


def time_in_turn(name: str, work: Path, threads: int, most: int) -> dict[str, np.ndarray]:
    """Window medians in milliseconds of each file, round by round; ``again`` is a second session of our file."""
    files = {**{kind: work / f"{kind}.onnx" for kind in KINDS}, "again": work / "ours.onnx"}
    inputs = SUBJECTS[name].samples(1, 4)
    runs: dict[str, Callable[[], object]] = {}
    for kind, path in files.items():
        session = make_session(path, threads)
        feed = next(feeds([given.name for given in session.get_inputs()], inputs))
        runs[kind] = lambda session=session, feed=feed: session.run(None, feed)
    once = {}
    for kind, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        once[kind] = time.perf_counter() - start
    if once["dynamic"] > 3 * once["static"]:
        # Convolutions quantized while they run are many times slower: a few windows say enough.
        slow = [_window(runs["dynamic"], threads) for _ in range(3)]
        del runs["dynamic"], once["dynamic"]
    else:
        slow = []
    rounds = int(
        SECONDS_EACH * most / MOST_ROUNDS / (sum(max(WINDOW_S, 2 * each) for each in once.values()) / len(once))
    )
    order = list(runs)
    taken: dict[str, list[float]] = {kind: [] for kind in order}
    for turn in range(min(max(rounds, LEAST_ROUNDS), most)):
        for kind in order[turn % len(order) :] + order[: turn % len(order)]:
            taken[kind].append(_window(runs[kind], threads))
    return {kind: np.array(values) for kind, values in {**taken, **({"dynamic": slow} if slow else {})}.items()}


def _window(run: Callable[[], object], threads: int) -> float:
    if threads > 1:
        settle(threads)
    run()
    times = []
    end = time.perf_counter() + WINDOW_S
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """The median ratio of neighbouring windows with its 95% interval (order statistics)."""
    ratios = np.sort(a / b)
    lowest = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return float(np.median(ratios)), float(ratios[lowest]), float(ratios[len(ratios) - 1 - lowest])


def islands(path: Path) -> str:
    """The float kernels that a quantized file is left with, conversions and free ones apart."""
    report = executed_kernels(path)
    found = Counter(kernel.op for kernel in report.nodes if kernel.kind == "fp32")
    return " ".join(f"{op}:{count}" for op, count in sorted(found.items())) or "none"


def measure(name: str, work: Path, threads: int, noise: dict[str, float], most: int) -> dict[str, Any]:
    """One row of the table."""
    taken = time_in_turn(name, work, threads, most)
    best = min(("static", "dynamic"), key=lambda kind: float(np.median(taken[kind])))
    middle, low, high = ratio(taken["ours"], taken[best])
    floor = ratio(taken["again"], taken["ours"])
    sizes = {kind: (work / f"{kind}.onnx").stat().st_size for kind in KINDS}
    return {
        "model": name,
        "threads": threads,
        "better_of_theirs": best,
        **{f"{kind}_ms": round(float(np.median(taken[kind])), 4) for kind in KINDS},
        "ratio": round(middle, 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
        "floor": round(max(abs(floor[1] - 1), abs(floor[2] - 1)), 4),
        "rounds": len(taken["ours"]),
        **{f"{kind}_bytes": sizes[kind] for kind in KINDS},
        **{f"{kind}_snr_db": round(noise[kind], 2) for kind in KINDS},
        "their_float_kernels": islands(work / f"{best}.onnx"),
        "our_float_kernels": islands(work / "ours.onnx"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": cpu_description(),
    }


# ---------------------------------------------------------------------------------------------------------- page


def publish(rows: pd.DataFrame) -> None:
    """``results/export``: the raw table and the page that says what of the bar is met."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = rows.sort_values(["cpu", "threads", "model"], kind="stable")
    rows.to_csv(FOLDER / "export.csv", index=False)
    lines = [
        "# Our int8 export against onnxruntime's own quantizer",
        "",
        "`make bench-export`; "
        + ", ".join(f"{package} {version(package)}" for package in ("onnxruntime", "torch", "onnx"))
        + "; batch 1.",
        "",
        "The ratio is our time over that of the better of theirs (static or dynamic), with its paired 95% interval;",
        "the floor is how far a second session of our own file lies from the first.  Signal-to-noise is that of the",
        "outputs against torch's float export, on inputs that were not calibrated on.  Processors without VNNI",
        "saturate sums of 8-bit products: there both keep weights to 7 bits (theirs by `reduce_range`).",
        "",
    ]
    for (cpu, threads), part in rows.groupby(["cpu", "threads"]):
        lines += [
            f"## {cpu}, {threads} thread{'s' if threads > 1 else ''} ({part['date'].max()})",
            "",
            markdown(_shown(part)),
            "",
        ]
        left = part[part["their_float_kernels"].map(_has_islands)]
        gain = float(np.exp(np.log(1 / left["ratio"]).mean())) if len(left) else float("nan")
        lines += [
            f"Theirs leaves float islands between int8 layers in {', '.join(left['model'])}: ours is {gain:.2f} times "
            "faster there in the geometric mean (bar 1.15).",
            "",
        ]
    lines += ["Float kernels that the better of theirs executes:", ""]
    first = rows[::-1].drop_duplicates("model")[::-1]
    lines += [f"- {row.model} ({row.better_of_theirs}): {row.their_float_kernels}" for row in first.itertuples()]
    lines += ["", "Ours:", ""]
    lines += [f"- {row.model}: {row.our_float_kernels}" for row in first.itertuples()]
    (FOLDER / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _has_islands(kernels: str) -> bool:
    """Whether more stays in float than the one pooling that stands before a classifier."""
    found = dict(entry.split(":") for entry in kernels.split()) if kernels != "none" else {}
    return any(op != "ReduceMean" or int(count) > 1 for op, count in found.items())


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    table = []
    for row in rows.to_dict("records"):
        best = row["better_of_theirs"]
        met = (
            row["ratio_high"] <= 1.02
            and row["ours_bytes"] <= row[f"{best}_bytes"]
            and row["ours_snr_db"] >= row[f"{best}_snr_db"]
        )
        table.append(
            {
                "model": row["model"],
                "fp32 ms": f"{row['fp32_ms']:.3g}",
                "ours ms": f"{row['ours_ms']:.3g}",
                "static ms": f"{row['static_ms']:.3g}",
                "dynamic ms": f"{row['dynamic_ms']:.3g}",
                "ratio (95%)": f"{row['ratio']:.3f} ({row['ratio_low']:.3f}-{row['ratio_high']:.3f})",
                "floor": f"{100 * row['floor']:.1f}%",
                "MB ours / theirs": f"{row['ours_bytes'] / 1e6:.3f} / {row[f'{best}_bytes'] / 1e6:.3f}",
                "dB ours / theirs": f"{row['ours_snr_db']:.1f} / {row[f'{best}_snr_db']:.1f}",
                "met": "yes" if met else "no",
            }
        )
    return pd.DataFrame(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SUBJECTS), help="by default all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, default=FOLDER / ".work", help="where the files are kept; made once")
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="the most windows of each file")
    parser.add_argument("--build-only", action="store_true", help="write the files, time nothing")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(2 if os.cpu_count() != 1 else 1)
    ort.set_default_logger_severity(3)
    known = pd.read_csv(FOLDER / "export.csv") if (FOLDER / "export.csv").is_file() else pd.DataFrame()
    for name in options.models:
        work = options.work / name
        if not (work / "dynamic.onnx").is_file():
            work.mkdir(parents=True, exist_ok=True)
            build(name, work)
        if options.build_only:
            continue
        noise = signal_to_noise(name, work)
        for threads in options.threads:
            row = measure(name, work, threads, noise, options.rounds)
            print(
                f"{name} at {threads}: ratio {row['ratio']} ({row['ratio_low']}-{row['ratio_high']}), dB {noise}",
                flush=True,
            )
            if len(known):
                same = (known["model"] == name) & (known["threads"] == threads) & (known["cpu"] == row["cpu"])
                known = known[~same]
            known = pd.concat([known, pd.DataFrame([row])], ignore_index=True)
            publish(known)


if __name__ == "__main__":
    main()
