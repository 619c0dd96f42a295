"""Search spaces: the shipped ones load, rules narrow, mistakes are cited."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.errors import UsageError
from autocompress.resources import resource_dir, resource_names
from autocompress.spaces import SearchSpace, load_space


@pytest.mark.parametrize("name", resource_names("search_spaces"))
def test_shipped_spaces_load_and_say_what_they_are(name: str) -> None:
    assert load_space(name).description


def test_the_readme_example_loads(tmp_path: Path) -> None:
    text = (resource_dir("search_spaces") / "README.md").read_text()
    file = tmp_path / "example.yaml"
    file.write_text(text.split("```yaml\n")[1].split("```")[0])
    space = load_space(str(file))
    assert space.for_name("layer1.0.conv1").compute == ("fp32",)
    assert space.for_name("fc").weight_bits == (32, 8)
    assert space.for_name("fc").keep == space.keep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kep: [1.0]", "kep: unknown key; nearest: 'keep'"),
        ("keep: [0.5, 2.0]", "keep: [0.5, 2.0] is not allowed; give shares above 0 and up to 1"),
        ("keep: []", "keep: an empty list leaves nothing to choose"),
        ("compute: [int4]", "compute[0]: 'int4' is not allowed; input should be 'fp32' or 'int8'"),
        ("compute: [int8]\nweight_bits: [32]", "compute int8 needs 8 or 4 among weight_bits"),
        ("rules:\n  - layers: fc\n    bits: [8]", "rules[0].bits: unknown key; nearest: 'weight_bits'"),
        ("distillation:\n  alpha: [1.5]", "alpha lies between 0 (labels only) and 1 (teacher only)"),
        ("distillation:\n  heat: [1.5]", "distillation.heat: unknown key"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_space(str(file))
    assert f"{file}:" in str(caught.value)
    assert message in str(caught.value)


def test_patterns_that_match_nothing_are_errors() -> None:
    space = SearchSpace.model_validate({"rules": [{"layers": "layer9.*"}]})
    with pytest.raises(
        UsageError, match=r"s: rules\[0\]\.layers: pattern 'layer9\.\*' matches no layer; nearest: 'layer1"
    ):
        space.check_names(["layer1.0", "fc"], "s")


def test_unknown_space() -> None:
    with pytest.raises(UsageError, match="unknown search space 'quant'; nearest: 'quantization'"):
        load_space("quant")
