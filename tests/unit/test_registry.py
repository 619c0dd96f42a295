"""Names of parts, imported on first use."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from autocompress import registry
from autocompress.errors import UsageError
from autocompress.registry import Registry, import_object


def test_entries_are_imported_when_asked_for() -> None:
    parts = Registry("parts", {"tau": "math:tau", "missing": "no_such_module:thing"})
    assert parts.load("tau") > 6
    assert list(parts) == ["tau", "missing"]
    assert len(parts) == 2
    assert parts["missing"] == "no_such_module:thing"
    assert "tau" in parts
    assert "pi" not in parts


def test_unknown_names_list_the_known_and_the_nearest() -> None:
    parts = Registry("parts", {"resnet8": "math:tau", "resnet20": "math:pi"})
    with pytest.raises(UsageError, match="resnet9") as raised:
        parts.load("resnet9")
    assert "resnet8" in str(raised.value)
    assert "resnet20" in str(raised.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("math", "is not of the form 'module:function'"),
        (":tau", "is not of the form 'module:function'"),
        ("no_such_module:thing", "no module named 'no_such_module'.*PYTHONPATH"),
        ("autocompress.no_such:thing", r"no module named 'autocompress\.no_such'"),
        ("math:tauu", "tau"),
    ],
)
def test_what_cannot_be_imported_says_why(reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        import_object(reference)


def test_an_error_inside_a_module_is_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        import_object("needs_more:thing")


def test_other_packages_add_entries_but_take_none_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "autocompress.parts"
        return [EntryPoint("tau", "math:pi", group), EntryPoint("e", "math:e", group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    parts = Registry("parts", {"tau": "math:tau"})
    assert dict(parts) == {"tau": "math:tau", "e": "math:e"}
    assert parts.load("e") < 3
