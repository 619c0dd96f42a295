"""Reading modules: names, spelling, ownership of weights, and what is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.errors import UsageError
from autocompress.graph.executor import build_module
from autocompress.graph.macs import count_macs
from autocompress.graph.read import read_model
from autocompress.plan import ModelGraph, is_weight_layer
from autocompress.tasks.models import resnet8

IMAGES = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)
Read = tuple[nn.Module, ModelGraph, dict[str, torch.Tensor]]


def read(module: nn.Module, example: tuple[torch.Tensor, ...] = IMAGES) -> Read:
    module.eval()
    graph, weights = read_model(module, example)
    with torch.no_grad():
        torch.testing.assert_close(build_module(graph, weights)(*example), module(*example), rtol=1e-4, atol=1e-5)
    return module, graph, weights


class Mixed(nn.Module):
    """One of each spelling: merged norms, standalone norms, bare products, functional pooling, reused names."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 8, 3, padding=1, bias=False), bn=nn.BatchNorm2d(8)))
        self.before = nn.BatchNorm2d(8)  # never trained: equal to the next one, and no convolution stands before it
        self.conv = nn.Conv2d(8, 8, 1)
        self.again = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.weight = nn.Linear(8, 6, bias=False)
        self.out = nn.Parameter(torch.randn(6, 4))
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(torch.relu(self.norms(x)))
        x = self.again(torch.relu(self.conv(torch.relu(x)))) * self.scale
        x = self.pool(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        return torch.relu(self.weight(x.flatten(1))) @ self.out + self.shift


@pytest.fixture(scope="module")
def mixed() -> Read:
    return read(Mixed())


def test_operators_have_one_spelling(mixed: Read) -> None:
    _, graph, _ = mixed
    assert [layer.op for layer in graph.layers] == [
        "Conv", "Relu", "BatchNormalization", "Relu", "Conv", "Relu", "BatchNormalization", "Mul",
        *("Transpose" for layer in graph.layers if layer.op == "Transpose"),
        "GlobalAveragePool", "Flatten", "Gemm", "Relu", "Gemm",
    ]  # fmt: skip
    assert all("kernel_shape" not in layer.attributes for layer in graph.layers if layer.op == "Conv")
    assert graph.by_name["norms.conv"].attributes == {"pads": (1, 1, 1, 1)}
    assert graph.by_name["conv"].attributes == {}


def test_layers_are_named_after_their_modules(mixed: Read) -> None:
    _, graph, weights = mixed
    names = [layer.name for layer in graph.compressible]
    assert names == ["norms.conv", "conv", "weight", graph.layers[-1].name]
    assert graph.layers[-1].inputs[1] == "out"
    assert graph.tensors["weight.weight"].shape == (6, 8)
    assert graph.tensors["out"].shape == (4, 6)  # turned, as Gemm has it
    assert all(len(layer.inputs) == 3 for layer in graph.compressible)
    assert set(weights) == set(graph.weight_names())
    assert {name: tuple(w.shape) for name, w in weights.items()} == {n: graph.tensors[n].shape for n in weights}


def test_equal_weights_of_different_modules_are_not_tied(mixed: Read) -> None:
    _, graph, _ = mixed
    norms = [layer for layer in graph.layers if layer.op == "BatchNormalization"]
    assert [layer.inputs[1:] for layer in norms] == [
        tuple(f"{path}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var"))
        for path in ("before", "again")
    ]
    assert [(g.id, g.size) for g in graph.groups] == [("norms.conv", 8), ("conv", 8), ("weight", 6)]
    group = graph.groups[1]
    assert {"scale", "again.weight"} <= {m.tensor for m in group.members if m.role == "through"}


def test_the_callers_module_is_never_changed() -> None:
    module = resnet8(10, 3)
    module.train()
    module.fc.weight.requires_grad_(False)  # type: ignore[union-attr]
    calls: list[int] = []
    module.conv1.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    module(IMAGES[0]).sum().backward()
    grads = {name: copy.deepcopy(p.grad) for name, p in module.named_parameters()}
    before = copy.deepcopy(module.state_dict())
    flags = [p.requires_grad for p in module.parameters()]
    graph, weights = read_model(module, IMAGES)
    for value in weights.values():
        if value.is_floating_point():
            value.zero_()
    assert module.training
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert grads[name] is None or torch.equal(parameter.grad, grads[name])  # type: ignore[arg-type]
    assert type(module.pool) is nn.AdaptiveAvgPool2d
    assert len(module.conv1._forward_hooks) == 1  # type: ignore[union-attr]
    macs, _ = count_macs(module.eval(), IMAGES)
    assert 0 < graph.macs() <= macs


def test_macs_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    _, graph, _ = read(net)
    convolution, linear = 4 * 3 * 3 * (3 * 3 * 3), 36 * 5
    assert graph.macs() == convolution + linear == count_macs(net, IMAGES)[0]
    assert graph.parameters() == 4 * 27 + 4 + 36 * 5 + 5
    assert graph.groups[0].members[2].repeat == 9


def test_a_module_that_runs_twice_keeps_its_weights_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.twice = nn.Conv2d(4, 4, 3, padding=1)
            self.tied = nn.Conv2d(4, 4, 3, padding=1)
            self.tied.weight = self.twice.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))
            return self.tied(torch.relu(x)).mean((2, 3))

    _, graph, _ = read(Twice())
    users = [layer for layer in graph.layers if is_weight_layer(layer) and layer.inputs[1] == "twice.weight"]
    assert [layer.shared_with for layer in users] == [(), ("twice",), ("twice",)]
    assert not graph.groups
    assert "used more than once" in graph.skipped["twice"]


def test_several_inputs_and_activations_of_several_kinds() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 6), nn.Linear(5, 6, bias=False)
            self.gate, self.norm, self.head = nn.PReLU(6), nn.LayerNorm(6), nn.Linear(12, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a, b = nn.functional.gelu(self.left(a)), nn.functional.silu(self.gate(self.right(b)))
            return self.head(torch.cat([self.norm(a), b], dim=-1)).log_softmax(-1)

    _, graph, _ = read(Two(), (torch.randn(2, 4), torch.randn(2, 5)))
    assert graph.inputs == ("a", "b")
    assert [(g.id, g.size) for g in graph.groups] == [("left", 6), ("right", 6)]


def test_sequences_and_attention_are_read_and_their_products_left_alone() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))

    _, graph, _ = read(Encoder(), (torch.randint(0, 11, (2, 7)),))
    assert ("up", 12) in [(g.id, g.size) for g in graph.groups]
    products = [layer.name for layer in graph.layers if layer.op == "MatMul" and not is_weight_layer(layer)]
    assert products
    assert all("two activations" in graph.skipped[name] for name in products)
    assert graph.tensors[graph.by_name["up"].outputs[0]].shape == (7, 12)
    assert graph.macs() >= 7 * (8 * 24 + 8 * 8 + 2 * 8 * 12) + 8 * 3


@pytest.mark.parametrize("kind", ["control flow", "noise", "operator"])
def test_what_cannot_be_read_is_refused_with_the_reason(kind: str) -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            if kind == "control flow" and x.sum() > 0:
                return x
            if kind == "noise":
                return nn.functional.dropout(x, 0.5, training=True)
            return self.up(x)

    expected = {
        "control flow": r"cannot read Bad with a dynamic batch: .*at 'if kind == .* and x.sum\(\) > 0:'",
        "noise": "cannot be simulated|departs from the module",
        "operator": "cannot be simulated: ConvTranspose",
    }
    with pytest.raises(UsageError, match=expected[kind]):
        read_model(Bad(), IMAGES)


def test_layers_called_like_an_operator_share_their_name_with_none() -> None:
    """Operators without weights are named by torch's exporter, after themselves: ``linear``, ``add``, ``silu``."""

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.add, self.silu = nn.Linear(6, 8), nn.Linear(8, 6), nn.Conv1d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.add(F.silu(self.linear(self.silu(x)))) + x

    _, graph, _ = read(Called(), (torch.randn(2, 4, 6),))
    assert len(graph.by_name) == len(graph.layers)
    assert {layer.name for layer in graph.compressible} == {"linear", "add", "silu"}
    assert all(is_weight_layer(graph.by_name[name]) for name in ("linear", "add", "silu"))


def test_outputs_bear_the_names_given_as_far_as_they_are_free() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.relu(x)
            return self.first(x), torch.relu(self.second(x))

    example = (torch.randn(2, 4),)
    module = Heads().eval()
    plain, _ = read_model(module, example)
    # The second name is that of a tensor inside, which makes room.
    inside = plain.layers[0].outputs[0]
    for names in (("scores", inside), tuple(reversed(plain.outputs))):
        graph, weights = read_model(module, example, names)
        assert graph.outputs == names
        assert set(names) <= graph.tensors.keys()
        with torch.no_grad():
            for given, wanted in zip(build_module(graph, weights)(*example), module(*example), strict=True):
                torch.testing.assert_close(given, wanted)
    assert read_model(module, example, ("x", "scores"))[0].outputs == plain.outputs  # x is the input


def test_weights_that_are_no_numbers_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"are not numbers \(nan\) on real samples \(weight '2\.weight' holds some\)"):
        read_model(model, (torch.randn(2, 4),))
