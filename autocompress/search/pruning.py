"""Options that cannot pay on the target leave the menu before the search.

One rule: an option goes where another one of its knob keeps at least as many channels, computes and stores in at least
as many bits, and costs no more in anything that counts (the objectives and the budgets), whatever the other knobs
choose.  Costs are the cost model's, over several backgrounds that the other knobs may form.  "No more" means exactly
alike (the same padded kernels) or dearer, and where it is time by more than the model's error on what the knob decides,
so that near ties stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from autocompress.hardware.skeleton import PriceTable, Skeleton
from autocompress.methods.quantization import fused_output
from autocompress.plan import CompressionPlan, LayerPlan, ModelGraph
from autocompress.search.menu import Menu, Option
from autocompress.search.wording import Dominance, explain

Array = npt.NDArray[np.float64]

RANDOM_BACKGROUNDS = 4
"""Beside the uniform ones: neighbours of either type and every width."""

ALIKE = 1e-9
"""Relative difference up to which two sums over the same kernels are equal."""

COMPUTE_BITS = {"fp32": 32, "fp16": 16, "int8": 8}
"""Types that are ordered by construction; the others compare with themselves and with fp32 alone."""

TIMED = frozenset({"latency_ms", "energy_mj"})
"""Costs that go with kernels, so that a kernel never measured makes them a guess."""


def prune(menu: Menu, skeleton: Skeleton, costs: Sequence[str], executed: Collection[str] | None = None) -> Menu:
    """The menu without the options that the device cannot execute and those that cannot pay there.

    Args:
        menu: over the skeleton's graph.
        skeleton: prices plans on the device.
        costs: what counts: the objectives beside the error, and the costs with a budget; reasons name them in order.
        executed: the types the device computes in; None where that is not known.

    Returns:
        A menu in which every knob has at least one option, what was left out in its ``dropped``.
    """
    where = skeleton.profile.name
    if executed is not None:
        menu = _executable(menu, executed, where)
    table = _Costs(menu, skeleton, costs)
    found = [table.dominated(place) for place in range(len(menu.knobs))]
    keep = {}
    for knob, gone in zip(menu.knobs, found, strict=True):
        lost = {item.option for item in gone}
        keep[knob.name] = [option for i, option in enumerate(knob.options) if i not in lost]
    return menu.reduced(keep, explain(menu.knobs, found, where))


def _executable(menu: Menu, executed: Collection[str], where: str) -> Menu:
    keep: dict[str, list[Option]] = {}
    reasons: dict[str, str] = {}
    for knob in menu.knobs:
        left = [option for option in knob.options if option.format.compute in executed]
        lost = sorted({option.format.compute for option in knob.options} - set(executed))
        if not lost:
            continue
        if left:
            keep[knob.name] = left
            reasons[knob.name] = f"{', '.join(lost)}: not executed on {where}, which computes in {', '.join(executed)}"
        else:
            reasons[knob.name] = (
                f"kept, though {where} computes in {', '.join(executed)}: the layer offers nothing else"
            )
    return menu.reduced(keep, reasons)


def at_least_as_good(better: Option, option: Option) -> bool:
    """Whether one option can lose no more quality than another, by what it keeps alone."""
    return (better.keep or 0) >= (option.keep or 0) and _computes_and_stores_as_much(better.format, option.format)


def _computes_and_stores_as_much(ours: LayerPlan, theirs: LayerPlan) -> bool:
    if ours.compute not in (theirs.compute, "fp32"):
        bits = COMPUTE_BITS.get(ours.compute), COMPUTE_BITS.get(theirs.compute)
        if bits[0] is None or bits[1] is None or bits[0] < bits[1]:
            return False
    if ours.transform != theirs.transform or ours.sparsity != theirs.sparsity:
        return False
    a, b = ours.storage, theirs.storage
    if a.scheme == "float" or a == b:
        return a.bits >= b.bits
    return a.bits >= b.bits and a.model_copy(update={"bits": b.bits}) == b


class _Costs:
    """What every option of every knob costs on every background."""

    def __init__(self, menu: Menu, skeleton: Skeleton, names: Sequence[str]) -> None:
        self.menu, self.skeleton, self.names = menu, skeleton, tuple(names)
        self._starts = np.cumsum([0, *(len(knob.options) for knob in menu.knobs)])
        self._values = self._price()
        dense = menu.plan(menu.uniform(1.0, "fp32", 32))
        known = skeleton.estimate(dense).costs
        self._bands = [known[name].high / known[name].value - 1.0 if known[name].value else 0.0 for name in self.names]
        self._guessed = _guessed(menu, skeleton) if TIMED.intersection(names) else [set() for _ in menu.knobs]

    def _price(self) -> Array:
        """``[costs, options of all knobs, backgrounds]``."""
        menu, skeleton = self.menu, self.skeleton
        columns = {name: column for column, name in enumerate(skeleton.layer_names)}
        groups = {name: column for column, name in enumerate(skeleton.group_ids)}
        others = _backgrounds(menu)
        keeps, codes = skeleton.encode([menu.plan(choices) for choices in others])
        rows = int(self._starts[-1])
        all_keeps = np.tile(keeps, (rows, 1, 1))
        all_codes = np.tile(codes, (rows, 1, 1))
        code_of = _codes(menu, skeleton)
        for knob, start in zip(menu.knobs, self._starts, strict=False):
            for row, option in enumerate(knob.options, start=int(start)):
                if knob.group is not None and option.keep is not None:
                    all_keeps[row, :, groups[knob.group]] = option.keep
                for layer in knob.layers:
                    all_codes[row, :, columns[layer]] = code_of[option.format]
        count = rows * len(others)
        table = skeleton.price_arrays(all_keeps.reshape(count, -1), all_codes.reshape(count, -1))
        return np.stack([_column(table, name).reshape(rows, len(others)) for name in self.names])

    def dominated(self, place: int) -> list[Dominance]:
        """The options of one knob that cannot pay, each with one that stays."""
        knob = self.menu.knobs[place]
        values = self._values[:, self._starts[place] : self._starts[place + 1]]
        beats = _as_good(knob.options, self.menu.named(knob.name))
        guessed = list(self._guessed[place])
        beats[guessed] = beats[:, guessed] = False
        for name, cost, band in zip(self.names, values, self._bands, strict=True):
            extra = cost[None, :] - cost[:, None]
            alike = np.abs(extra) <= ALIKE * np.abs(cost)[:, None]
            # Times are fitted, and err by a share of what the knob decides; bytes and operations are counted.
            margin = band * (cost.max(axis=0) - cost.min(axis=0)) if name in TIMED else 0.0
            # Prices that are not numbers compare as false: what cannot be priced stays.
            beats &= (alike | (extra > margin)).all(axis=2)
        gone = beats.any(axis=0)
        found = []
        for option in np.flatnonzero(gone):
            # What beat it may have been beaten itself, by one that beats both.
            staying = np.flatnonzero(beats[:, option] & ~gone)
            by = min(staying, key=lambda i, option=option: _distance(knob.options[i], knob.options[option]))  # type: ignore[misc]
            found.append(self._dominance(values, int(option), int(by)))
        return found

    def _dominance(self, values: Array, option: int, by: int) -> Dominance:
        shown = []
        for name, cost in zip(self.names, values, strict=True):
            kindest = int(np.argmin(cost[option] - cost[by]))
            shown.append((name, float(cost[option, kindest]), float(cost[by, kindest])))
        return Dominance(option, by, tuple(shown))


def _as_good(options: Sequence[Option], named: Collection[str]) -> npt.NDArray[np.bool_]:
    """``[better, option]``: which can lose no more quality than which, what a rule names being the same in both."""
    table = np.zeros((len(options), len(options)), dtype=bool)
    formats = list(dict.fromkeys(option.format for option in options))
    ordered = {(a, b): _computes_and_stores_as_much(a, b) for a in formats for b in formats}
    for i, better in enumerate(options):
        for j, option in enumerate(options):
            good = (better.keep or 0) >= (option.keep or 0) and ordered[better.format, option.format]
            table[i, j] = i != j and good and all(_aspect(better, a) == _aspect(option, a) for a in named)
    return table


def _distance(a: Option, b: Option) -> tuple[bool, int, int]:
    """How far apart two options are, for naming the one that an option is compared with."""
    bits = abs(a.format.storage.bits - b.format.storage.bits)
    return a.format.compute != b.format.compute, abs((a.keep or 0) - (b.keep or 0)), bits


def _aspect(option: Option, name: str) -> object:
    """What a rule of the search space can name of an option."""
    return {"keep": option.keep, "compute": option.format.compute, "weight_bits": option.format.storage.bits}[name]


def _column(table: PriceTable, name: str) -> Array:
    return np.asarray(getattr(table, name), dtype=np.float64)


def _codes(menu: Menu, skeleton: Skeleton) -> dict[LayerPlan, int]:
    """The code of each format on the menu."""
    formats = list(dict.fromkeys(option.format for knob in menu.knobs for option in knob.options))
    layer = skeleton.layer_names[0]
    _, codes = skeleton.encode([CompressionPlan(layers={layer: form}) for form in formats])
    return dict(zip(formats, codes[:, 0].tolist(), strict=True))


def _backgrounds(menu: Menu) -> list[tuple[int, ...]]:
    """What the other knobs may choose: each type everywhere, whole, halved and at the narrowest, and mixtures."""
    uniform = [menu.uniform(share, *form) for share in (1.0, 0.5, 0.0) for form in (("fp32", 32), ("int8", 8))]
    rng = np.random.default_rng(0)
    mixed = [tuple(int(rng.integers(len(k.options))) for k in menu.knobs) for _ in range(RANDOM_BACKGROUNDS)]
    return list(dict.fromkeys([*uniform, *mixed]))


def _guessed(menu: Menu, skeleton: Skeleton) -> list[set[int]]:
    """For each knob the options that run a kernel the profile has never measured: their time is a guess."""
    touched = [_labels(menu.graph, knob.layers) for knob in menu.knobs]
    found: list[set[int]] = [set() for _ in menu.knobs]
    for choices in covering(menu):
        estimate = skeleton.estimate(menu.plan(choices))
        labels = {text.rpartition(" (")[0] for text in estimate.unmodelled}
        if not labels:
            continue
        for place, (knob, choice) in enumerate(zip(menu.knobs, choices, strict=True)):
            if labels & touched[place]:
                found[place] |= {i for i, o in enumerate(knob.options) if _kernel(o) == _kernel(knob.options[choice])}
    return found


def covering(menu: Menu) -> list[tuple[int, ...]]:
    """Choices that between them take every knob through all its widths and types; stored bits change no kernel."""
    columns = []
    for knob in menu.knobs:
        first: dict[tuple[int | None, str], int] = {}
        for index, option in enumerate(knob.options):
            first.setdefault(_kernel(option), index)
        columns.append(list(first.values()))
    longest = max(len(column) for column in columns)
    return [tuple(column[min(row, len(column) - 1)] for column in columns) for row in range(longest)]


def _kernel(option: Option) -> tuple[int | None, str]:
    return option.keep, option.format.compute


def _labels(graph: ModelGraph, layers: Iterable[str]) -> set[str]:
    """What an estimate may call the kernels of these layers: by layer, or by the tensors they read and write."""
    found: set[str] = set()
    for name in layers:
        layer = graph.by_name[name]
        found |= {name, *layer.activations, *layer.outputs, fused_output(graph, layer)}
    return found
