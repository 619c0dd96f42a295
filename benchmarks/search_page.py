"""The page and the plots of ``make bench-search``, from the figures of its cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pandas as pd

from benchmarks.fronts import markdown

RIVALS = ("nsga2", "tpe", "sequence", "random", "quantize")
MARKS_S = (60.0, 150.0, 180.0, 300.0, 600.0)
"""Times at which the page gives the hypervolume."""

KEYS = ["model", "method", "steps", "seed"]
BAR = 0.7
"""Ours leaves at most this share of the best rival's gap to 1."""

WHOLE = "without-nothing"

LABELS = {
    "ours": "autocompress",
    "nsga2": "Optuna NSGA-II",
    "tpe": "Optuna TPE",
    "sequence": "prune, then quantize",
    "random": "random",
    "quantize": "quantize only (NSGA-II)",
}


def final(known: pd.DataFrame) -> pd.DataFrame:
    """The last row of each cell."""
    return known.groupby(KEYS, dropna=False, as_index=False).last() if len(known) else known


def at(curve: pd.DataFrame, seconds: float) -> float:
    """The hypervolume of the front that stood on disk at a time."""
    before = curve[curve["seconds"] <= seconds]
    return float(before["hypervolume"].iloc[-1]) if len(before) else 0.0


def mean(curve: pd.DataFrame, seconds: float) -> float:
    """The mean over a time of the hypervolume on disk: what a run is worth that may be stopped any second."""
    marks = pairwise([*curve["seconds"].clip(upper=seconds), seconds])
    stood = [end - begin for begin, end in marks]
    return float((stood * curve["hypervolume"]).sum()) / seconds


def reached(curve: pd.DataFrame, volume: float) -> float:
    """Seconds until a hypervolume was reached for good; infinite where it never was."""
    below = curve["hypervolume"] < volume
    after = curve[~below[::-1].cummax()[::-1]]
    return float(after["seconds"].iloc[0]) if len(after) else math.inf


def publish(known: pd.DataFrame, folder: Path, missing: Sequence[str] = ()) -> None:
    """``README.md`` and one plot a model; the page names the cells that are missing."""
    if not len(known):
        return
    (machine,) = known["machine"].unique()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "optuna"))
    lines = [
        "# The search against simpler ways at equal time",
        "",
        f"`make bench-search`; {machine}; {packages}; one thread, batch 1, training on two; {known['date'].max()}.",
        "",
        "Hypervolume of the delivered front on the test split, as it stood on disk at each time: the share of the box",
        "(error above the original's, 0 to 10 points; log2 of the speed-up, to 8x; log2 of the shrinkage, to 32x) that",
        "it dominates.  Times and errors are of the files, measured again after the run.  All methods share the space,",
        "the database of compressed layers that candidates start from, the distillation, the exporter and the clock.",
        "Ours trains two structures at once where a timing at its start says that it pays; the others train one",
        "candidate after another, each with both threads.  Where a trial has a fixed number of steps, a step takes 128",
        "samples; where training goes by the clock, 64.  Ours chooses the recipe of distillation; the others have its",
        "default, which ours begins with.",
        "",
    ]
    left_out = known["method"].str.startswith("without-")
    for model, part in known[~left_out].groupby("model"):
        lines += [f"## {model}", "", markdown(_table(part)), "", *_verdict(part), f"![curves]({model}.svg)", ""]
        plot(part, folder / f"{model}.svg")
    lines += _ablations(known[left_out])
    if missing:
        lines += [f"Still to be made: {', '.join(f'`{name}`' for name in missing)}."]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _curves(part: pd.DataFrame) -> dict[tuple[str, str, int], pd.DataFrame]:
    found = {}
    for (method, steps, seed), curve in part.groupby(["method", "steps", "seed"], dropna=False):
        told = "" if pd.isna(steps) else f"{int(steps)}"
        found[str(method), told, int(seed)] = curve.sort_values("seconds")
    return found


def _table(part: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (method, steps, seed), curve in _curves(part).items():
        budget = float(curve["budget"].iloc[0])
        marks = {f"{m:.0f} s": f"{at(curve, m):.3f}" if m <= budget else "" for m in MARKS_S}
        last = curve.iloc[-1]
        rows.append(
            {
                "method": LABELS.get(method, method),
                "steps a trial": steps,
                "seed": seed,
                **marks,
                "trials": int(last["trials"]),
                "points": int(last["points"]),
                "on validation": f"{last['validation_hypervolume']:.3f}",
                "commit": _commit(last),
            }
        )
    return pd.DataFrame(rows)


def best_rival(part: pd.DataFrame, seconds: float) -> tuple[str, float] | None:
    """The rival (method and training length) with the best mean hypervolume at a time, and that mean."""
    means: dict[tuple[str, str], list[float]] = {}
    for (method, steps, _), curve in _curves(part).items():
        if method in RIVALS:
            means.setdefault((method, steps), []).append(at(curve, seconds))
    if not means:
        return None
    (method, steps), values = max(means.items(), key=lambda item: sum(item[1]) / len(item[1]))
    return f"{LABELS[method]}{f' with {steps} steps' if steps else ''}", sum(values) / len(values)


def _verdict(part: pd.DataFrame) -> list[str]:
    ours = [curve for (method, _, _), curve in _curves(part).items() if method == "ours"]
    lines = []
    for seconds in (180.0, 600.0):
        rival = best_rival(part, seconds)
        if rival is None or not ours:
            return []
        own = sum(at(curve, seconds) for curve in ours) / len(ours)
        share = (1 - own) / (1 - rival[1])
        lines.append(
            f"- At {seconds:.0f} s: ours {own:.3f}, the best rival ({rival[0]}) {rival[1]:.3f}: {share:.2f} of its gap "
            f"to 1 is left (bar {BAR}): {'met' if share <= BAR else 'not met'}."
        )
    rival = best_rival(part, 600.0)
    assert rival is not None
    times = [reached(curve, rival[1]) for curve in ours]
    told = ", ".join("never" if math.isinf(t) else f"{t:.0f} s" for t in times)
    met = max(times) <= 150.0
    lines.append(f"- Its final hypervolume is reached after {told} (bar 150 s): {'met' if met else 'not met'}.")
    return [*lines, ""]


def _commit(row: pd.Series) -> str:
    return "" if pd.isna(row["commit"]) else str(row["commit"])


def _ablations(part: pd.DataFrame) -> list[str]:
    """What the engine comes to with one of its parts left out, for as long as with all of them."""
    if not len(part):
        return []
    rows = []
    for (method, _, seed), curve in _curves(part).items():
        budget = float(curve["budget"].iloc[0])
        marks = {f"{m:.0f} s": f"{at(curve, m):.3f}" for m in MARKS_S if m <= budget}
        last = curve.iloc[-1]
        rows.append(
            {
                "left out": method.removeprefix("without-"),
                "seed": seed,
                **marks,
                "mean over the time": f"{mean(curve, budget):.3f}",
                "points": int(last["points"]),
                "commit": _commit(last),
            }
        )
    title = f"## One part left out, {part['budget'].iloc[0] / 60:.0f} minutes each"
    return [title, "", markdown(pd.DataFrame(rows)), "", *_bought(part), ""]


def _bought(part: pd.DataFrame) -> list[str]:
    """What each part adds to the hypervolume, against runs with nothing left out and the same seeds."""
    curves = {(method, seed): curve for (method, _, seed), curve in _curves(part).items()}
    budget = float(part["budget"].iloc[0])
    lines = []
    for method in sorted(set(part["method"]) - {WHOLE}):
        seeds = [seed for name, seed in curves if name == method and (WHOLE, seed) in curves]
        if not seeds:
            continue
        added = {
            m: sum(at(curves[WHOLE, s], m) - at(curves[method, s], m) for s in seeds) / len(seeds)
            for m in MARKS_S
            if m <= budget
        }
        told = ", ".join(f"{value:+.3f} at {m:.0f} s" for m, value in added.items())
        lines.append(f"- The {method.removeprefix('without-')} added {told} (seeds: {len(seeds)}).")
    return lines


def plot(part: pd.DataFrame, path: Path) -> None:
    """Hypervolume against time, a line a cell."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "search"  # the same figures give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours: dict[str, str] = {}
    for (method, steps, seed), curve in _curves(part).items():
        label = f"{LABELS.get(method, method)}{f', {steps} steps' if steps else ''}"
        colour = colours.setdefault(label, f"C{len(colours) % 10}")
        style = {"linewidth": 2.5} if method == "ours" else {"linewidth": 1.2}
        shown = label if label not in axes.get_legend_handles_labels()[1] else None
        axes.step(
            [0.0, *curve["seconds"]], [0.0, *curve["hypervolume"]], where="post", label=shown, color=colour,
            linestyle="-" if seed == 0 else "--", **style,
        )  # fmt: skip
    axes.set(xlabel="seconds", ylabel="hypervolume on test", ylim=(0, 1), title=str(part["model"].iloc[0]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
