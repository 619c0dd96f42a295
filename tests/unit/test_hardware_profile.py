"""Profiles: YAML round trip, the cache's key, names, and what a broken file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.errors import UsageError
from autocompress.hardware import profile as profiles
from autocompress.hardware.profile import (
    FittedProfile,
    KernelCost,
    Provenance,
    list_hardware,
    load_hardware,
    local_path,
)


@pytest.fixture
def profile() -> FittedProfile:
    return FittedProfile(
        name="bench",
        runtime_version="1.0",
        threads=1,
        batch=1,
        kernels={"conv_fp32": KernelCost(fixed_us=1.5, per_mmac_us=7.25, samples=3, mape=0.01)},
        provenance=Provenance(measured_at="2026-01-01T00:00:00+00:00", seconds=1.0, cpu="test", cores=1, system="test"),
    )


def test_yaml_round_trip(profile: FittedProfile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "deep" / "bench.yaml")
    assert FittedProfile.load(path) == profile
    assert [p.name for p in path.parent.iterdir()] == ["bench.yaml"], "nothing temporary is left behind"
    assert load_hardware(str(path)) == profile


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("kernels: [", "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("version: 99\n", "version 99"),
        ("version: 2\nkind: fitted\nname: x\n", "runtime_version"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_broken_file_says_what_is_wrong(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=says) as caught:
        load_hardware(str(path))
    assert "broken.yaml" in str(caught.value)


def test_negative_coefficient_is_named(profile: FittedProfile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "bench.yaml")
    path.write_text(path.read_text().replace("7.25", "-7.25"))
    with pytest.raises(UsageError, match=r"kernels\.conv_fp32\.per_mmac_us"):
        load_hardware(path)


def test_missing_file_and_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_hardware(tmp_path / "absent.yaml")
    with pytest.raises(UsageError, match="nearest: 'local'"):
        load_hardware("locl")
    assert list_hardware()[0] == "local"


def test_threads_and_batch_must_match(profile: FittedProfile, tmp_path: Path) -> None:
    path = profile.save(tmp_path / "bench.yaml")
    assert load_hardware(path, threads=1, batch=1) == profile
    with pytest.raises(UsageError, match="threads=1, not 4"):
        load_hardware(path, threads=4)


def test_local_profile_is_read_from_its_cache(
    profile: FittedProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = pytest.importorskip("autocompress.hardware.measure")
    monkeypatch.setenv("AUTOCOMPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "measure_profile", lambda *_, **__: profile)
    assert load_hardware() == profile
    monkeypatch.setattr(measure, "measure_profile", lambda *_, **__: pytest.fail("measured again"))
    assert load_hardware() == profile
    (cached,) = (tmp_path / "hardware").iterdir()
    cached.write_text("broken: [")
    monkeypatch.setattr(measure, "measure_profile", lambda *_, **__: profile)
    assert load_hardware() == profile, "a broken cache is measured again"


def test_cache_key_tells_targets_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(version: str = "1.0", threads: int = 1, batch: int = 1) -> str:
        return local_path("onnxruntime", version, threads, batch, tmp_path).name

    keys = {key(), key("1.1"), key(threads=2), key(batch=8)}
    monkeypatch.setattr(profiles, "cpu_description", lambda: "another")
    assert len(keys | {key()}) == 5


def test_cost_of_rounds_to_five_digits() -> None:
    cost = KernelCost.of([1.23456789, 0.0, 2.0], samples=4, mape=0.5)
    assert cost.fixed_us == 1.2346
    assert cost.coefficients == (1.2346, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert (cost.samples, cost.mape) == (4, 0.5)
