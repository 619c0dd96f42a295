"""Post-training quantization carries out every format, and the file is what was simulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autocompress.export.onnx import to_onnx
from autocompress.methods.formats import BLOCKS, CODEBOOKS, describe
from autocompress.methods.post_training import CalibrationOptions, quantize_model, signal_to_noise_db
from autocompress.methods.simulation import build_compressed
from autocompress.plan import FLOAT16, CompressionPlan, LayerPlan, NumFormat
from autocompress.runtime.cpu import int8_weight_bits
from autocompress.runtime.kernels import check_kernels, executed_kernels
from autocompress.runtime.session import make_session
from tests.graphs import GraphMaker

PLANS = [
    *(LayerPlan(compute="weight_only", storage=storage) for storage in BLOCKS[:3]),
    *(LayerPlan(compute="int8_dynamic", storage=NumFormat(bits=bits)) for bits in (int8_weight_bits(), 4)),
    *(LayerPlan(compute="int8", storage=storage) for storage in (NumFormat(bits=7), CODEBOOKS[0], CODEBOOKS[-2])),
    LayerPlan(storage=FLOAT16),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.compute}, {describe(plan.storage)}")
def test_a_trained_model_becomes_a_file_in_any_format(plan: LayerPlan) -> None:
    maker = GraphMaker()
    x = maker.input("given", (150,))
    for name in ("first", "second", "third"):
        x = maker.relu(maker.gemm(x, 150, name)) if name != "third" else maker.gemm(x, 10, name)
    graph = maker.build(("given",), (x,))
    data = torch.randn(160, 150, generator=torch.Generator().manual_seed(0))
    plans = CompressionPlan(layers=dict.fromkeys(("first", "second", "third"), plan))
    options = CalibrationOptions(ranges="minmax")
    compressed = quantize_model(graph, maker.weights, plans, [(part,) for part in data.split(40)], options)
    artifact = to_onnx(compressed).SerializeToString()
    assert check_kernels(compressed, executed_kernels(artifact)) == []
    found = make_session(artifact).run(None, {"given": data.numpy()})[0]
    with torch.no_grad():
        simulated = build_compressed(compressed)(data).numpy()
        exact = torch.relu(data @ maker.weights["first.weight"].T + maker.weights["first.bias"])
        exact = torch.relu(exact @ maker.weights["second.weight"].T + maker.weights["second.bias"])
        exact = exact @ maker.weights["third.weight"].T + maker.weights["third.bias"]
    # A value in the middle between two integers may be rounded the other way; the rest is equal.
    assert np.abs(found - simulated).max() <= 0.02 * np.abs(simulated).max()
    assert np.abs(found - simulated).mean() <= 5e-4 * np.abs(simulated).max()
    least = {16: 60, 8: 30, 7: 30, 4: 17, 3: 13, 2: 4}[plan.storage.bits]
    assert signal_to_noise_db([exact], [torch.from_numpy(found)]) > least
