"""Forms of the file that make integer models faster: they compute what the plan says, and the runtime takes them up."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from autocompress.export.checkpoint import load_compressed, save_checkpoint
from autocompress.export.onnx import to_onnx
from autocompress.export.weights import gathered_channels
from autocompress.graph.read import read_model
from autocompress.methods.compressed import CompressedModel
from autocompress.methods.exact import ExactModule
from autocompress.methods.post_training import CalibrationOptions, quantize_model, uniform_plan
from autocompress.methods.quantization import affine_parameters, gates
from autocompress.methods.simulation import build_compressed
from autocompress.plan import FLOAT16, Compute, LayerPlan
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.runtime.onnxruntime import check_kernels, executed_kernels, make_session

PLAIN = CalibrationOptions(ranges="minmax", equalize="off", bias_correction=False, rounding="nearest")


class Curved(nn.Module):
    """A stem, an activation, a squeeze-and-excite gate and a classifier."""

    def __init__(self, activation: nn.Module, gate: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, stride=2, padding=1)
        self.stem.weight.data *= 4  # so that the activation is met beyond its bends
        self.activation, self.gate = activation, gate
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.body = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.stem(x))
        x = x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.head(self.body(x).mean((2, 3)))


def quantized(
    model: nn.Module, inputs: torch.Tensor, compute: Compute = "int8", bits: int = int8_weight_bits()
) -> CompressedModel:
    graph, weights = read_model(model.eval(), (inputs[:2],))
    return quantize_model(graph, weights, uniform_plan(graph, compute, bits)[0], [(inputs,)], PLAIN)


def made(seed: int = 0, **modules: nn.Module) -> tuple[CompressedModel, torch.Tensor]:
    torch.manual_seed(seed)
    model = Curved(modules.get("activation", nn.Hardswish()), modules.get("gate", nn.Hardsigmoid()))
    inputs = torch.randn(16, 3, 20, 20)
    return quantized(model, inputs), inputs


def answers(compressed: CompressedModel, inputs: torch.Tensor, runtime: str = "onnxruntime") -> torch.Tensor:
    session = make_session(to_onnx(compressed, runtime=runtime).SerializeToString())
    return torch.from_numpy(session.run(None, {compressed.graph.inputs[0]: inputs.numpy()})[0])


def operators(compressed: CompressedModel, runtime: str = "onnxruntime") -> list[str]:
    report = executed_kernels(to_onnx(compressed, runtime=runtime).SerializeToString())
    assert check_kernels(compressed, report) == []
    return [node.op for node in report.nodes]


def test_a_hard_swish_runs_on_integers() -> None:
    compressed, inputs = made()
    ran = operators(compressed)
    # The gate of the swish is a change of scale: a dequantizer and a quantizer.
    assert ran.count("QLinearMul") == 2
    assert "Mul" not in ran
    assert torch.equal(ExactModule(compressed).eval()(inputs), answers(compressed, inputs))


def test_ranges_of_a_hard_swish_begin_where_it_does() -> None:
    compressed, _ = made()
    (gate,) = gates(compressed.graph)
    layer = compressed.graph.by_name[gate]
    low, high = compressed.ranges[layer.inputs[0]]
    scale, zero = affine_parameters(low, high)
    assert low == pytest.approx(-3.0)
    assert zero * scale == pytest.approx(3.0, rel=1e-6)
    assert compressed.ranges[layer.outputs[0]] == (0.0, 1.0)


def test_a_silu_is_rounded_once() -> None:
    compressed, inputs = made(activation=nn.SiLU(), gate=nn.Sigmoid())
    ran = operators(compressed)
    assert (ran.count("QuickGelu"), ran.count("QLinearSigmoid"), ran.count("QLinearMul")) == (1, 1, 1)
    with torch.no_grad():
        expected = build_compressed(compressed)(inputs)
    assert float((expected - answers(compressed, inputs)).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_first_layers_read_a_whole_word(channels: int) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(8, channels, 12, 12)
    compressed = quantized(Curved(nn.ReLU(), nn.Sigmoid(), channels), inputs)
    assert ("Pad" in operators(compressed)) == (channels < 4)
    stored = {tensor.name: tuple(tensor.dims) for tensor in to_onnx(compressed).graph.initializer}
    assert (16, channels, 3, 3) in stored.values()  # what is added is added when the file is loaded
    assert torch.equal(ExactModule(compressed).eval()(inputs), answers(compressed, inputs))


@pytest.mark.parametrize(("bits", "large"), [(8, 4), (7, 3)])
def test_large_windows_are_filled_up_where_products_are_cheap(
    bits: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autocompress.export.weights.int8_weight_bits", lambda: bits)
    assert [gathered_channels(3, window) for window in (1, 9, 49)] == [3, 4, large]
    assert gathered_channels(16, 9) == 16


def test_other_runtimes_get_standard_operators() -> None:
    compressed, inputs = made(activation=nn.SiLU(), gate=nn.Sigmoid())
    model = to_onnx(compressed, runtime="openvino")
    assert {node.domain for node in model.graph.node} == {""}
    assert "Pad" not in {node.op_type for node in model.graph.node}
    ours, theirs = answers(compressed, inputs), answers(compressed, inputs, "openvino")
    assert float((ours - theirs).abs().max()) < 0.02 * float(ours.abs().max())


# ------------------------------------------------------------------------------------------------- transformers


class Encoder(nn.Module):
    """Token and position embeddings, one attention of two heads, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(40, 16)
        self.norm, self.query, self.value = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids) + self.places(torch.arange(12)))
        q, k = (part.reshape(-1, 12, 2, 8).transpose(1, 2) for part in self.query(x).chunk(2, -1))
        v = self.value(x).reshape(-1, 12, 2, 8).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 12, 16)
        return self.head(mixed.mean(1))


def encoder(compute: Compute = "int8", bits: int = int8_weight_bits()) -> tuple[CompressedModel, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(50, (16, 12))
    return quantized(Encoder(), ids, compute, bits), ids


def test_keys_are_turned_once_and_constants_are_no_layers() -> None:
    compressed, _ = encoder()
    ops = [layer.op for layer in compressed.graph.layers]
    assert not {"Shape", "Slice", "Concat"} & set(ops)
    # Positions are read of their table once and for all, and only those that are read are stored.
    assert ops.count("Gather") == 1
    assert all(tensor.shape != (40, 16) for tensor in compressed.graph.tensors.values())


def test_products_of_floats_quantize_them_while_they_run() -> None:
    compressed, ids = encoder()
    plans = compressed.plan.layers
    assert {plans[name].compute for name in ("query", "value", "head")} == {"int8_dynamic"}
    assert compressed.plan.activations == {}
    assert {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"} & set(operators(compressed))
    with torch.no_grad():
        expected = build_compressed(compressed)(ids)
    assert float((expected - answers(compressed, ids)).abs().max()) < 0.02 * float(expected.abs().max())


def test_tables_of_rows_are_stored_in_integers(tmp_path: object) -> None:
    compressed, _ = encoder()
    plan = compressed.plan.layers["words"]
    assert (plan.compute, plan.storage.bits) == ("fp32", int8_weight_bits())
    model = to_onnx(compressed)
    tables = [t for t in model.graph.initializer if tuple(t.dims) == (50, 16)]
    assert [len(t.raw_data) for t in tables] == [800]  # one byte a number
    save_checkpoint(compressed, str(tmp_path))
    again = load_compressed(str(tmp_path))
    assert torch.equal(again.weights["words.weight"], compressed.weights["words.weight"])
    assert to_onnx(again) == model


def test_tables_of_rows_are_stored_in_halves_where_weights_are() -> None:
    compressed, ids = encoder("fp32", 16)
    assert compressed.plan.layers["words"] == LayerPlan(storage=FLOAT16)
    model = to_onnx(compressed)
    assert [t.data_type for t in model.graph.initializer if tuple(t.dims) == (50, 16)] == [onnx.TensorProto.FLOAT16]
    with torch.no_grad():
        expected = build_compressed(compressed)(ids)
    torch.testing.assert_close(answers(compressed, ids), expected, atol=1e-4, rtol=1e-4)


def test_a_chain_of_products_stays_in_integers() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(16, 20)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    compressed = quantized(model, inputs)
    assert {plan.compute for plan in compressed.plan.layers.values()} == {"int8"}
    assert operators(compressed).count("QGemm") == 3
    with torch.no_grad():
        expected = build_compressed(compressed)(inputs)
    assert float((expected - answers(compressed, inputs)).abs().max()) < 0.02 * float(expected.abs().max())
