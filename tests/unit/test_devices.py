"""Training on another device: what goes there, what stays, and what comes back.

Torch's ``meta`` device stands for one that is not the CPU: it computes nothing, but refuses to mix with the CPU.  What
needs a CUDA device to be seen is marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.devices import CPU, autocast_context, moved, resolve_device
from autocompress.errors import UsageError
from autocompress.graph.executor import GraphModule, travels
from autocompress.graph.read import read_model
from autocompress.methods.distillation import distill, step_time, teach
from autocompress.methods.recovery import add_norms, fold_norms, quantize_aware
from autocompress.plan import CompressionPlan, LayerPlan, NumFormat, Recipe
from autocompress.progress import SilentProgress
from autocompress.tasks.base import predict
from autocompress.tasks.models import mobilenetv2, resnet8
from autocompress.tasks.splits import TensorSplit
from tests.graphs import resnet

META = torch.device("meta")
IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Attentive(nn.Module):
    """Attention over image patches and a class token: shapes that are computed, positions that are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Embedding(17, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)
        places = torch.arange(tokens.shape[1])
        tokens = torch.where((places % 2 == 0)[:, None], tokens, 0.5 * tokens) + self.positions(places)
        return self.head(self.block(tokens)[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: resnet8(10, 1),
    "mobilenetv2": lambda: mobilenetv2(10, 1),
    "attentive": Attentive,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_on_another_device_computes_there_alone(name: str) -> None:
    torch.manual_seed(0)
    graph, weights = read_model(NETWORKS[name]().eval(), (IMAGES,))
    there = {key: value.to(META) if travels(value) else value for key, value in weights.items()}
    module = GraphModule(graph, there)
    outputs = module(IMAGES.to(META))
    assert outputs.device == META
    assert outputs.shape == (2, 10)
    outputs.square().mean().backward()
    trained = [p for p in module.parameters() if p.grad is not None]
    assert len(trained) > 10
    assert all(p.grad.device == META for p in trained if p.grad is not None)


def test_what_is_left_on_the_cpu_is_what_torch_asks_for_as_numbers() -> None:
    assert travels(torch.zeros(3))
    assert travels(torch.zeros(3, dtype=torch.bool))
    assert not travels(torch.zeros(3, dtype=torch.int64))
    assert not travels(torch.tensor(0.5))


@without_cuda
def test_without_a_cuda_device_auto_is_the_cpu_and_cuda_an_error() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(UsageError, match=r"'cuda'.*sees no CUDA device; use cpu"):
        resolve_device("cuda")


def net(seed: int) -> GraphModule:
    return GraphModule(*resnet((8, 8, 16), blocks=1, size=8, seed=seed)).eval()


@pytest.fixture
def split() -> TensorSplit:
    images = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorSplit(images, torch.arange(256) % 10)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return resolve_device("auto")


@pytest.mark.gpu
def test_values_are_the_same_on_cuda(cuda: torch.device, split: TensorSplit) -> None:
    module = net(0)
    here = predict(module, split)
    there = predict(module.on(cuda), split)
    assert {p.device for p in module.parameters()} == {cuda}
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-3)
    assert {p.device for p in module.on(CPU).parameters()} == {CPU}
    torch.testing.assert_close(predict(module, split), here)


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", [False, True])
def test_training_on_cuda_learns_what_it_learns_on_the_cpu(cuda: torch.device, split: TensorSplit, mixed: bool) -> None:
    losses = {}
    for device in (CPU, cuda):
        taught = teach(net(0), split, mirror=True, progress=SilentProgress(), device=device)
        student = net(1)
        add_norms(student, [(split.inputs,)])
        plateaus: list[bool] = []

        def falling(seen: list[bool] = plateaus) -> None:
            seen.append(True)

        distill(
            student, taught, Recipe(alpha=1.0, feature_weight=1.0), steps=200, learning_rate=3e-3,
            task_loss=F.cross_entropy, generator=torch.Generator().manual_seed(0), batch_size=64,
            mixed_precision=mixed, falling=falling, device=device,
        )  # fmt: skip
        assert plateaus == [True]
        fold_norms(student)
        assert {p.device for p in student.parameters()} == {CPU}
        losses[device.type] = float(F.mse_loss(predict(student, split), predict(net(0), split)))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.25)


@pytest.mark.gpu
def test_formats_are_trained_on_cuda(cuda: torch.device, split: TensorSplit) -> None:
    teacher = net(0)
    taught = teach(teacher, split, mirror=False, progress=SilentProgress(), device=cuda)
    graph, weights = teacher.graph, teacher.weights()
    plan = CompressionPlan(
        layers={layer.name: LayerPlan(storage=NumFormat(scheme="affine", bits=3)) for layer in graph.compressible}
    )

    def train(module: GraphModule, stretches: list[nn.Parameter]) -> None:
        distill(
            module, taught, Recipe(alpha=1.0), steps=100, learning_rate=1e-3, task_loss=F.cross_entropy,
            generator=torch.Generator().manual_seed(0), extra_parameters=stretches, batch_size=64, device=cuda,
        )  # fmt: skip

    def distance(trained: bool) -> float:
        made = quantize_aware(graph, weights, plan, [(split.inputs,)], train if trained else None)
        return float(F.mse_loss(predict(GraphModule(graph, made.weights), split), predict(teacher, split)))

    assert distance(trained=True) < distance(trained=False)


@pytest.mark.gpu
def test_cuda_is_timed_and_mixes_precisions(cuda: torch.device) -> None:
    assert step_time(net(0), torch.randn(64, 1, 8, 8), cuda) > 0
    with autocast_context(cuda):
        product = torch.ones(4, 4, device=cuda) @ torch.ones(4, 4, device=cuda)
    assert product.dtype == torch.bfloat16
    assert moved(torch.ones(3), cuda).device == cuda
