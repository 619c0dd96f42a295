"""``read(apply(model, plan)) == rewrite(read(model), plan)``: what a rewrite foretells is what is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from autocompress.graph.executor import build_module
from autocompress.graph.macs import count_macs
from autocompress.graph.read import read_model
from autocompress.graph.rewrite import rewrite, slice_weights
from autocompress.plan import Group, ModelGraph
from autocompress.tasks.models import mobilenetv2, resnet8, resnet20

EXAMPLE = (torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)),)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: resnet8(10, 1),
    "resnet20": lambda: resnet20(10, 1),
    "mobilenetv2": lambda: mobilenetv2(10, 1),
}

Read = tuple[nn.Module, ModelGraph, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=NETWORKS)
def read(request: pytest.FixtureRequest) -> Read:
    torch.manual_seed(0)
    module = NETWORKS[request.param]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
    return (module, *read_model(module.eval(), EXAMPLE))


def places(group: Group) -> set[tuple[object, ...]]:
    return {(m.tensor, m.axis, m.role, m.offset, m.repeat) for m in group.members if m.role != "activation"}


def test_what_is_built_is_what_was_foretold(read: Read) -> None:
    _, graph, weights = read
    generator = torch.Generator().manual_seed(0)
    kept = {
        group.id: torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)].sort().values
        for group in graph.groups
    }
    foretold = rewrite(graph, {name: len(channels) for name, channels in kept.items()})
    built, stored = read_model(build_module(foretold, slice_weights(graph, weights, kept)), EXAMPLE)

    def described(found: ModelGraph) -> dict[str, object]:
        return {
            layer.name: (layer.op, layer.attributes, [found.tensors[n].shape for n in (*layer.weights, *layer.outputs)])
            for layer in found.compressible
        }

    assert described(built) == described(foretold)
    assert [layer.op for layer in built.layers] == [layer.op for layer in foretold.layers]
    assert (built.macs(), built.parameters()) == (foretold.macs(), foretold.parameters())
    assert [(g.id, g.size, places(g)) for g in built.groups] == [(g.id, g.size, places(g)) for g in foretold.groups]
    assert built.skipped == foretold.skipped
    torch.testing.assert_close(stored["fc.weight"], slice_weights(graph, weights, kept)["fc.weight"])


def test_the_count_of_multiply_accumulates_is_fvcores(read: Read) -> None:
    module, graph, _ = read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(module, (EXAMPLE[0][:1],)).unsupported_ops_warnings(False)
        counts = analysis.tracer_warnings("none").by_operator()
    assert graph.macs() == counts["conv"] + counts["linear"]
    assert count_macs(module, EXAMPLE)[0] == sum(counts.values())


def test_groups_are_those_of_torch_pruning(read: Read) -> None:
    """An independent account of what is coupled, by tracing the module instead of reading the graph."""
    pruning = pytest.importorskip("torch_pruning")
    module, graph, _ = read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dependencies = pruning.DependencyGraph().build_dependency(module, example_inputs=EXAMPLE)
    paths = {id(part): name for name, part in module.named_modules()}
    theirs = set()
    for group in dependencies.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        sides: set[tuple[str, int]] = set()
        for dependency, _ in group:
            part = dependency.target.module
            if isinstance(part, nn.Conv2d | nn.Linear):
                depthwise = isinstance(part, nn.Conv2d) and part.groups > 1
                reads = dependency.handler.__name__ == "prune_in_channels" and not depthwise
                sides.add((f"{paths[id(part)]}.weight", int(reads)))
        theirs.add(frozenset(sides))
    ours = {
        frozenset((m.tensor, m.axis) for m in group.members if m.role != "activation" and m.tensor.endswith("weight"))
        for group in graph.groups
    }
    assert ours == {sides for sides in theirs if sides != {("fc.weight", 0)}}
