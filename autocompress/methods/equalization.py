"""Scales moved between layers so that channels that share one activation scale are of one size.

Where two layers follow one another with nothing between them but operators that pass a positive factor on
(``f(s x) = s f(x)``), a channel may be made smaller by the first and larger by the second: the model computes what it
did, but an 8-bit activation no longer spends its integers on one channel (Nagel et al., 1906.04721, section 4.1).
Behind a LayerNormalization the first layer is the norm's own scale and shift (SmoothQuant, 2211.10438).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from autocompress.graph.executor import Tap, build_module
from autocompress.plan import Layer, ModelGraph, is_weight_layer

HOMOGENEOUS = frozenset({"Relu", "LeakyRelu"})
"""Functions with ``f(s x) = s f(x)`` for every s > 0."""

POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool"})
"""The same of operators on single channels of an image."""

ITERATIONS = 20
"""Sweeps over all links when weights alone are balanced: neighbouring links disturb one another."""

LARGEST_MOVE = 256.0
"""No channel is scaled by more: what a few samples say of a nearly dead channel is not trusted."""


@dataclass(frozen=True)
class Link:
    """A place where scales can move.

    Attributes:
        maker: the layer whose output channels shrink: Conv, Gemm, MatMul or LayerNormalization.
        readers: the weight layers that make up for it.
        tensor: what the readers read.
        channels: how many there are.
    """

    maker: Layer
    readers: tuple[Layer, ...]
    tensor: str
    channels: int


def find_links(graph: ModelGraph) -> tuple[Link, ...]:
    """Every pair of layers that scales can move between, in execution order."""
    uses = Counter(name for layer in graph.layers for name in layer.weights)
    links = []
    for layer in graph.layers:
        if not _makes(layer) or any(uses[name] > 1 for name in layer.weights):
            continue
        tensor = layer.outputs[0]
        while True:
            readers = graph.consumers.get(tensor, ())
            if tensor in graph.outputs or len(readers) != 1 or not _passes(graph, layer, readers[0]):
                break
            tensor = readers[0].outputs[0]
        channels = _channels(graph, layer)
        whole = readers and tensor not in graph.outputs
        if whole and all(_reads(graph, layer, r, tensor, channels) and uses[r.inputs[1]] == 1 for r in readers):
            links.append(Link(layer, readers, tensor, channels))
    return tuple(links)


def _makes(layer: Layer) -> bool:
    if layer.op == "LayerNormalization":
        return len(layer.inputs) > 1 and set(layer.inputs[1:]) <= {*layer.weights, ""}
    return is_weight_layer(layer)


def _passes(graph: ModelGraph, maker: Layer, between: Layer) -> bool:
    """Whether an operator passes a factor on each of the maker's channels on, and leaves channels where they are."""
    if between.op in HOMOGENEOUS or maker.op == "Conv":
        return between.op in HOMOGENEOUS | POOLS
    last = len(graph.tensors[between.outputs[0]].shape)  # the batch is not counted
    if between.op == "Transpose":
        perm = between.attributes.get("perm", ())
        return bool(perm) and perm[-1] == last  # type: ignore[index]
    if between.op == "Gather" and between.inputs[1] in between.weights:
        axis = int(between.attributes.get("axis", 0))  # type: ignore[arg-type]
        return axis not in (-1, len(graph.tensors[between.inputs[0]].shape))
    return False


def _channels(graph: ModelGraph, layer: Layer) -> int:
    return graph.tensors[layer.outputs[0]].shape[0 if layer.op == "Conv" else -1]


def _reads(graph: ModelGraph, maker: Layer, reader: Layer, tensor: str, channels: int) -> bool:
    """Whether the reader multiplies each channel of the maker by weights of its own."""
    if not is_weight_layer(reader) or reader.inputs[0] != tensor or (reader.op == "Conv") != (maker.op == "Conv"):
        return False
    shape = graph.tensors[reader.inputs[1]].shape
    if reader.op == "Conv":
        return shape[1] * int(reader.attributes.get("group", 1)) == channels  # type: ignore[arg-type]
    plain = maker.op != "LayerNormalization" or graph.tensors[maker.inputs[1]].shape == (channels,)
    return plain and len(shape) == 2 and not reader.attributes.get("transA") and shape[_in_axis(reader)] == channels


def _in_axis(reader: Layer) -> int:
    return 1 if reader.op == "Gemm" and reader.attributes.get("transB") else 0


def channel_maxima(
    graph: ModelGraph,
    weights: Mapping[str, torch.Tensor],
    links: Sequence[Link],
    batches: Iterable[tuple[torch.Tensor, ...]],
) -> dict[str, torch.Tensor]:
    """The largest magnitude in each channel of the links' tensors over the batches."""
    found: dict[str, torch.Tensor] = {}

    def observe(name: str, axis: int) -> Tap:
        def tap(value: torch.Tensor) -> torch.Tensor:
            largest = value.detach().abs().amax(dim=[d for d in range(value.dim()) if d != axis % value.dim()])
            found[name] = torch.maximum(found[name], largest) if name in found else largest
            return value

        return tap

    module = build_module(graph, weights)
    module.taps = {link.tensor: observe(link.tensor, 1 if link.maker.op == "Conv" else -1) for link in links}
    with torch.no_grad():
        for batch in batches:
            module(*batch)
    return found


def equalize(
    weights: Mapping[str, torch.Tensor], links: Sequence[Link], maxima: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Weights of the same function with channels balanced across each link.

    Args:
        weights: of the model; not changed.
        links: from :func:`find_links`.
        maxima: from :func:`channel_maxima`: activations are balanced against the weights that read them, as in
            SmoothQuant (equation 4 with alpha = 1/2).  None balances the weights on both sides, as in cross-layer
            equalization (equation 11), which needs no data.
    """
    made = dict(weights)
    if maxima is not None:
        for link in links:
            _move(made, link, _activation_factors(made, link, maxima[link.tensor]))
        return made
    for _ in range(ITERATIONS):
        largest = 0.0
        for link in (link for link in links if link.maker.op != "LayerNormalization"):
            factors = _balanced((_maker_sizes(made, link) / _reader_sizes(made, link)).sqrt())
            _move(made, link, factors)
            largest = max(largest, float(factors.log().abs().max()))
        if largest < 1e-3:
            break
    return made


def _activation_factors(weights: Mapping[str, torch.Tensor], link: Link, maxima: torch.Tensor) -> torch.Tensor:
    if all(_is_depthwise(weights, reader) for reader in link.readers):
        # Each channel meets weights with a scale of their own: those bear any factor, so the activation bears none.
        return _balanced(maxima)
    return _balanced((maxima / _reader_sizes(weights, link, relative=True)).sqrt())


def _is_depthwise(weights: Mapping[str, torch.Tensor], reader: Layer) -> bool:
    return reader.op == "Conv" and weights[reader.inputs[1]].shape[1] == 1


def _balanced(factors: torch.Tensor) -> torch.Tensor:
    """Factors about 1 in the geometric mean; 1 for dead channels, whose ratio means nothing."""
    alive = torch.isfinite(factors) & (factors > 0)
    if not bool(alive.any()):
        return torch.ones_like(factors)
    middle = factors[alive].log().mean().exp()
    return torch.where(alive, (factors / middle).clamp(1 / LARGEST_MOVE, LARGEST_MOVE), 1.0)


def _maker_sizes(weights: Mapping[str, torch.Tensor], link: Link) -> torch.Tensor:
    weight = weights[link.maker.inputs[1]]
    axis = 0 if link.maker.op == "Conv" or _in_axis(link.maker) == 1 else 1
    return weight.abs().transpose(0, axis).flatten(1).amax(1)


def _reader_sizes(weights: Mapping[str, torch.Tensor], link: Link, relative: bool = False) -> torch.Tensor:
    """The largest weight that multiplies each channel; ``relative`` to its row, which has a scale of its own."""
    sizes = []
    for reader in link.readers:
        weight = _by_channel(weights[reader.inputs[1]], reader, link.channels).abs()
        if relative:
            weight = weight / weight.amax(dim=(2, 3), keepdim=True).clamp_min(1e-30)
        sizes.append(weight.amax(dim=(1, 3)).flatten())
    return torch.stack(sizes).amax(0)


def _by_channel(weight: torch.Tensor, reader: Layer, channels: int) -> torch.Tensor:
    """The weight as ``[groups, rows of a group, channels of a group, taps]``."""
    if reader.op == "Conv":
        inside = weight.shape[1]
        return weight.reshape(channels // inside, -1, inside, weight[0, 0].numel())
    rows = weight if _in_axis(reader) == 1 else weight.t()
    return rows[None, :, :, None]


def _move(weights: dict[str, torch.Tensor], link: Link, factors: torch.Tensor) -> None:
    """Divides the maker's channels by the factors and multiplies what reads them."""
    maker = link.maker
    for slot, name in enumerate(maker.inputs[1:], start=1):
        if not name:
            continue
        value = weights[name]
        rows = slot == 1 and (maker.op == "Conv" or (maker.op != "LayerNormalization" and _in_axis(maker) == 1))
        weights[name] = value / (factors.reshape(-1, *(1,) * (value.dim() - 1)) if rows else factors)
    for reader in link.readers:
        value = weights[reader.inputs[1]]
        if reader.op == "Conv":
            groups = link.channels // value.shape[1]
            split = value.reshape(groups, -1, *value.shape[1:])
            by = factors.reshape(groups, 1, -1, *(1,) * (value.dim() - 2))
            weights[reader.inputs[1]] = (split * by).reshape(value.shape)
        else:
            weights[reader.inputs[1]] = value * (factors if _in_axis(reader) == 1 else factors[:, None])
