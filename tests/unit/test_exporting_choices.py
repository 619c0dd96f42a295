"""What a request becomes: which layer computes in what, and which requests are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autocompress.errors import UsageError
from autocompress.exporting import options
from autocompress.exporting.choices import choose
from autocompress.exporting.options import ExportOptions, LayerRule
from autocompress.plan import FLOAT16, CompressionPlan, LayerPlan, ModelGraph, NumFormat
from tests.graphs import GraphMaker

INT8 = LayerPlan(compute="int8", storage=NumFormat(bits=8))
INT4 = LayerPlan(compute="int8", storage=NumFormat(bits=4))


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that adds products of 8 bits exactly, wherever the tests run."""
    monkeypatch.setattr(options, "int8_weight_bits", lambda: 8)


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    """Four convolutions, the last of which gives the model's output."""
    maker = GraphMaker()
    x = maker.input("x", (3, 8, 8))
    for name in ("stem", "body.a", "body.b", "out"):
        x = maker.conv(x, 8, name)
    return maker.build(("x",), (x,))


def layers(graph: ModelGraph, **options: Any) -> dict[str, LayerPlan]:
    return choose(graph, ExportOptions(**options)).plan.layers


def test_weights_keep_to_seven_bits_where_the_processor_would_saturate(
    graph: ModelGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "int8_weight_bits", lambda: 7)
    assert layers(graph)["stem"] == LayerPlan(compute="int8", storage=NumFormat(bits=7))
    assert layers(graph, weight_bits=8)["stem"] == INT8
    assert layers(graph, compute="fp32", weight_bits=8)["stem"] == LayerPlan(storage=NumFormat(bits=8))


def test_every_layer_that_can_is_int8_and_the_rest_says_why(graph: ModelGraph) -> None:
    chosen = choose(graph, ExportOptions())
    assert chosen.plan.layers == {"stem": INT8, "body.a": INT8, "body.b": INT8}
    assert list(chosen.reasons) == ["out"]
    assert "float output" in chosen.reasons["out"]


def test_the_later_rule_wins_and_frozen_layers_stay_float(graph: ModelGraph) -> None:
    rules = ("body.*=int8:4", "body.b=fp32", "stem=int8:4")
    assert layers(graph, layers=rules) == {"stem": INT4, "body.a": INT4}
    assert layers(graph, layers=rules, freeze=("re:s.*",)) == {"body.a": INT4}
    assert choose(graph, ExportOptions(freeze=("stem",))).reasons["stem"] == "frozen"


def test_a_stored_plan_says_it_for_every_layer(graph: ModelGraph, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(CompressionPlan(layers={"body.a": INT4}).model_dump_json(), encoding="utf-8")
    assert layers(graph, plan=path) == {"body.a": INT4}
    assert layers(graph, plan=path, layers=("stem=int8",)) == {"stem": INT8, "body.a": INT4}
    path.write_text(CompressionPlan(layers={"bodi.a": INT4}).model_dump_json(), encoding="utf-8")
    with pytest.raises(UsageError, match=r"'bodi\.a'.*nearest: 'body\.a'.*another model"):
        layers(graph, plan=path)
    path.write_text('{"layers": 3}', encoding="utf-8")
    with pytest.raises(UsageError, match="is no plan: layers"):
        layers(graph, plan=path)
    with pytest.raises(UsageError, match="cannot be read"):
        layers(graph, plan=tmp_path / "absent")


@pytest.mark.parametrize("compute", ["weight_only", "int8_dynamic"])
def test_convolutions_are_not_asked_for_what_only_matrices_have(graph: ModelGraph, compute: str) -> None:
    with pytest.raises(UsageError, match=r"100% of the weights.*'stem': a convolution cannot .*int8"):
        layers(graph, compute=compute)
    with pytest.raises(UsageError, match=rf"layer 'stem' cannot be {compute}: a convolution .*give it int8"):
        layers(graph, layers=(f"stem={compute}",))


def test_matrices_take_every_type_and_the_block_asked_for() -> None:
    maker = GraphMaker()
    x = maker.gemm(maker.input("x", (64,)), 64, "up")
    graph = maker.build(("x",), (maker.gemm(x, 8, "down"),))
    four = LayerPlan(compute="weight_only", storage=NumFormat(bits=4, granularity="block", block=32))
    assert layers(graph, compute="weight_only", weight_bits=4, block=32) == {"up": four, "down": four}
    assert layers(graph, compute="fp32", layers=("down=int8_dynamic",)) == {
        "down": LayerPlan(compute="int8_dynamic", storage=NumFormat(bits=8))
    }
    halves = LayerPlan(compute="fp32", storage=FLOAT16)
    assert layers(graph, compute="fp32", weight_bits=16) == {"up": halves, "down": halves}


def test_what_a_layer_cannot_do_is_refused_by_name(graph: ModelGraph) -> None:
    with pytest.raises(UsageError, match=r"--layer 'out=int8': layer 'out' cannot be int8: .*float output"):
        layers(graph, layers=("out=int8",))
    with pytest.raises(UsageError, match=r"pattern 'boddy\.\*' matches no layer; nearest: 'body"):
        layers(graph, layers=("boddy.*=int8",))
    with pytest.raises(UsageError, match="--freeze: pattern 'stm'"):
        layers(graph, freeze=("stm",))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compute": "int7"}, "'int7'; nearest: 'int8'"),
        ({"weight_bits": 9}, "9 bits under int8; it takes 2, 3, 4"),
        ({"layers": ("stem",)}, "write PATTERN=COMPUTE"),
        ({"layers": ("stem=int8:x",)}, "write PATTERN=COMPUTE"),
        ({"layers": ("stem=int8:9",)}, "--layer 'stem=int8:9'.*9 bits"),
        ({"ranges": "max"}, "--ranges value 'max'; nearest: 'm"),
        ({"equalize": "yes"}, "--equalize value 'yes'"),
        ({"block": 100}, "--block 100.*128"),
        ({"calibration_samples": 0}, "--calibration-samples 0"),
        ({"compute": "int8", "plan": Path("plan.json")}, "leave out --compute"),
    ],
)
def test_what_no_export_takes_is_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ExportOptions(**options)


def test_a_rule_may_hold_an_equals_sign_in_its_pattern() -> None:
    assert LayerRule.parse("re:(?=a).*=fp32").pattern == "re:(?=a).*"
