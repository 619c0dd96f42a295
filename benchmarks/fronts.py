"""Runs searches as a user would and holds their fronts against the bars; tables go to ``results/``.

python -m benchmarks.fronts digits            # three seeds, about six minutes
python -m benchmarks.fronts fashion           # 10 minutes and the original's training, once
python -m benchmarks.fronts budget            # a latency budget, held as measured again from outside
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

from autocompress.front import LoadedFront, Point, load_front

RESULTS = Path(__file__).resolve().parent.parent / "results"
KEPT = ("front.csv", "rejected.csv", "trials.csv", "environment.json", "config.yaml", "front.json")
DIGITS_SEEDS = (0, 1, 2)


def search(out: Path, *options: str) -> LoadedFront:
    """One run of the command line; an unfinished one in ``out`` is gone on with, a finished one is taken as it is."""
    if (out / "front.json").is_file() and load_front(out).front.status == "complete":
        return load_front(out)
    command = [sys.executable, "-m", "autocompress", "search", "--out", str(out), "--resume", *options]
    subprocess.run(command, check=True)
    return load_front(out)


def net_images_lost(point: Point, reference: Point, test_images: int) -> int:
    """Test images that the point gets wrong beyond those the original gets wrong."""
    return round((reference.test - point.test) * test_images)


def spans(front: LoadedFront) -> tuple[float, float]:
    """Slowest over fastest, and largest over smallest, among the points."""
    latencies = [p.latency_ms or math.nan for p in front.points]
    sizes = [p.size_bytes for p in front.points]
    return max(latencies) / min(latencies), max(sizes) / min(sizes)


def keep(front: LoadedFront, name: str) -> Path:
    """Copies the small files of a run under ``results/``."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (front.path / file).is_file():
            shutil.copy2(front.path / file, folder / file)
    return folder


def markdown(table: pd.DataFrame) -> str:
    """A table as README files show it."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def machine(front: LoadedFront) -> str:
    """The line every table carries: where and with what it was measured."""
    facts = json.loads((front.path / "environment.json").read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {facts['packages'][name]}" for name in ("torch", "onnxruntime", "optuna"))
    cpu, date, threads = facts["cpu"].split(",")[0], facts["date"][:10], front.front.target.threads
    return f"{cpu}, {date}, {packages}; {threads} thread, batch {front.front.target.batch}\n"


def digits(work: Path, budget: str) -> None:
    """Three seeds of the embedded default."""
    rows, note = [], ""
    for seed in DIGITS_SEEDS:
        front = search(work / f"digits-{seed}", "--task", "digits", "--time-budget", budget, "--seed", str(seed))
        note = machine(front)
        reference = front.reference
        images = _test_images(front)
        joint = [p for p in front.points if net_images_lost(p, reference, images) <= 4 and (p.shrink or 0) >= 6]
        best = max(joint, key=lambda p: p.speedup or 0.0, default=None)
        latency_span, size_span = spans(front)
        rows.append(
            {
                "seed": seed,
                "points": len(front.points),
                "latency span": f"{latency_span:.2f}x",
                "size span": f"{size_span:.1f}x",
                "hypervolume": f"{front.front.search.hypervolume:.3f}",
                "seconds": f"{front.front.search.seconds:.0f}",
                "joint point": "none" if best is None else best.id,
                "net test images lost": "" if best is None else net_images_lost(best, reference, images),
                "faster": "" if best is None else f"{best.speedup:.2f}x",
                "smaller": "" if best is None else f"{best.shrink:.1f}x",
            }
        )
        keep(front, f"digits-resnet8/seed-{seed}")
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "digits-resnet8" / "summary.csv", index=False)
    bar = "Bar: at least 8 points, spans of 4x and 8x, and one point that loses at most 4 images at 2x and 6x.\n"
    text = f"# digits, resnet8, {budget} a seed\n\n{note}\n{bar}\n{markdown(table)}"
    (RESULTS / "digits-resnet8" / "README.md").write_text(text, encoding="utf-8")
    print(text)


def _test_images(front: LoadedFront) -> int:
    from autocompress.tasks import load_task

    return len(load_task(front.front.task, front.front.model).split("test"))


def fashion(work: Path, budget: str) -> None:
    """ResNet-20 on Fashion-MNIST."""
    front = search(work / "fashion-mnist", "--task", "fashion-mnist", "--model", "resnet20", "--time-budget", budget)
    folder = keep(front, "fashion-mnist-resnet20")
    near = [p for p in front.points if (p.test_drop or 0.0) <= 1.0]
    rows = [
        ("faster and smaller at once (2.5x and 8x)", max(near, key=lambda p: _joint(p, 2.5, 8.0), default=None)),
        ("fastest (3x)", max(near, key=lambda p: p.speedup or 0.0, default=None)),
        ("smallest (10x)", max(near, key=lambda p: p.shrink or 0.0, default=None)),
    ]
    table = pd.DataFrame(
        [
            {
                "within 1 point of the original on test": name,
                "id": p.id,
                "test": f"{p.test:.2%}",
                "drop": f"{p.test_drop:.2f}",
                "faster": f"{p.speedup:.2f}x",
                "smaller": f"{p.shrink:.1f}x",
            }
            for name, p in rows
            if p is not None
        ]
    )
    points = front.to_frame()[
        ["test", "test_drop", "latency_ms", "latency_ms_predicted", "speedup", "size_bytes", "shrink"]
    ]
    text = (
        f"# Fashion-MNIST, ResNet-20, {budget}\n\n{machine(front)}\n"
        f"Original: {front.reference.test:.2%} on 10,000 test images, {front.reference.latency_ms:.4f} ms, "
        f"{front.reference.size_bytes} bytes. "
        f"Hypervolume {front.front.search.hypervolume:.3f} after {front.front.search.seconds:.0f} s.\n\n"
        f"{markdown(table)}\n{markdown(points.round(4).reset_index())}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


def _joint(point: Point, speed: float, shrink: float) -> float:
    return min((point.speedup or 0.0) / speed, (point.shrink or 0.0) / shrink)


def budget_held(work: Path, budget: str) -> None:
    """A search under half the original's latency; its files are then timed again by another process."""
    reference = load_front(work / "digits-0").reference
    limit = (reference.latency_ms or 0.0) / 2
    out = work / "digits-half-latency"
    front = search(out, "--task", "digits", "--time-budget", budget, "--max-latency-ms", f"{limit:.5f}")
    done = subprocess.run(
        [sys.executable, "-m", "autocompress", "verify", str(out), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    checks = [c for c in json.loads(done.stdout) if c["name"].endswith(("budget", "validation", "test", "latency"))]
    folder = keep(front, "digits-half-latency")
    table = pd.DataFrame(checks)
    table.to_csv(folder / "verify.csv", index=False)
    text = (
        f"# digits, resnet8, --max-latency-ms {limit:.5f} (half the original's)\n\n{machine(front)}\n"
        f"{len(front.points)} points; measured again from outside by `autocompress verify`:\n\n{markdown(table)}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "fashion", "budget"])
    parser.add_argument(
        "--work", type=Path, default=Path("results/bench"), help="where the runs are kept (git-ignored)"
    )
    parser.add_argument("--time-budget", default=None, help="replaces 100s (digits) or 10m (fashion)")
    given = parser.parse_args()
    if given.what == "digits":
        digits(given.work, given.time_budget or "100s")
    elif given.what == "fashion":
        fashion(given.work, given.time_budget or "10m")
    else:
        budget_held(given.work, given.time_budget or "100s")


if __name__ == "__main__":
    main()
