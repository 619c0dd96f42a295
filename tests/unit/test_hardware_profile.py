"""Profiles: YAML round trip, the cache's key, names, and what a broken file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from autocompress.errors import UsageError
from autocompress.hardware import profile as profiles
from autocompress.hardware.models import cost_model
from autocompress.hardware.profile import (
    EndToEnd,
    FittedProfile,
    HardwareProfile,
    HoldOut,
    KernelCost,
    Provenance,
    list_hardware,
    load_hardware,
    local_path,
)
from autocompress.hardware.profile_check import check_profile


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
        ("version: 1\nname: x\n", "version 1, .*measure it again"),
        ("version: 2\nkind: guessed\n", "kind: 'guessed'; it must be one of fitted, analytic"),
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
    assert cost.coefficients == (1.2346, 0.0, 2.0, *[0.0] * 6)
    assert (cost.samples, cost.mape) == (4, 0.5)


# ------------------------------------------------------------------------------------- what is wrong, and the remedy


@pytest.fixture
def here(profile: FittedProfile, monkeypatch: pytest.MonkeyPatch) -> FittedProfile:
    """A profile of this machine, whatever machine that is."""
    monkeypatch.setattr(profiles, "cpu_description", lambda: "this one")
    monkeypatch.setattr(profiles, "version", lambda _: "1.0")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    provenance = profile.provenance.model_copy(update={"cpu": "this one", "cores": 2})
    return profile.model_copy(update={"provenance": provenance})


def test_a_profile_of_this_machine_raises_no_warning(
    here: FittedProfile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = here.save(tmp_path / "here.yaml")
    assert load_hardware(path) == here
    assert caplog.text == ""
    levels = {check.name: check.level for check in check_profile(path)}
    assert levels["file"] == levels["machine"] == "ok"
    assert "error" not in levels.values()


def test_another_processor_or_version_is_warned_of(
    here: FittedProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = here.save(tmp_path / "here.yaml")
    monkeypatch.setattr(profiles, "cpu_description", lambda: "another one")
    monkeypatch.setattr(profiles, "version", lambda _: "1.1")
    assert load_hardware(path) == here
    assert "measured on another processor (this one; here: another one)" in caplog.text
    assert "measured with onnxruntime 1.0; installed: 1.1" in caplog.text
    assert caplog.text.count("'autocompress profile'") == 2, "each with its remedy"
    found = {check.name: check for check in check_profile(path)}
    assert found["processor"].level == found["runtime"].level == "warning"
    assert "autocompress profile" in found["processor"].remedy


def test_a_runtime_that_is_not_here_is_warned_of(
    here: FittedProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def only_gpu(package: str) -> str:
        if package != "onnxruntime-gpu":
            raise profiles.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(profiles, "version", only_gpu)
    assert load_hardware(here.save(tmp_path / "here.yaml")) == here
    assert caplog.text == "", "another package of the same runtime"
    load_hardware(here.model_copy(update={"runtime": "elsewhere"}).save(tmp_path / "there.yaml"))
    assert "runtime elsewhere is not installed here; install elsewhere" in caplog.text


def test_more_threads_than_cores_are_refused_here_only(
    here: FittedProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = here.model_copy(update={"threads": 4}).save(tmp_path / "four.yaml")
    with pytest.raises(UsageError, match="4 threads, but this machine has 2 cores; ask for at most 2"):
        load_hardware(path)
    assert {check.name: check.ok for check in check_profile(path)}["threads"] is False
    with pytest.raises(UsageError, match="at most 2"):
        load_hardware("local", threads=3)
    monkeypatch.setattr(profiles, "cpu_description", lambda: "another one")
    assert load_hardware(path).threads == 4, "predicting for another machine is no matter of this one's cores"
    assert {check.name: check.level for check in check_profile(path)}["threads"] == "warning"


def test_another_runtime_is_refused(here: FittedProfile, tmp_path: Path) -> None:
    path = here.save(tmp_path / "here.yaml")
    assert load_hardware(path, runtime="onnxruntime") == here
    with pytest.raises(UsageError, match="made with onnxruntime, not openvino"):
        load_hardware(path, runtime="openvino")
    with pytest.raises(UsageError, match="unknown cost model 'fitted-nothing'"):
        cost_model(here.model_copy(update={"runtime": "nothing"}))


def test_an_edit_is_read_and_warned_of(here: FittedProfile, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = here.save(tmp_path / "here.yaml")
    text = path.read_text()
    path.write_text(text.replace("name: bench", "name: mine").replace("description: ''", "description: a note"))
    assert load_hardware(path).name == "mine"
    assert caplog.text == "", "a name says nothing measured"
    path.write_text(text.replace("7.25", "8.5").replace("batch: 1", "batch: 2"))
    loaded = load_hardware(path)
    assert isinstance(loaded, FittedProfile)
    assert loaded.kernels["conv_fp32"].per_mmac_us == 8.5
    assert "edited by hand since it was measured: batch, kernels" in caplog.text
    (edited,) = [check for check in check_profile(path) if check.name == "edited"]
    assert edited.level == "warning"
    assert "measure it again" in edited.remedy
    assert load_hardware(loaded.save(tmp_path / "again.yaml")) == loaded
    assert not [check for check in check_profile(tmp_path / "again.yaml") if check.name == "edited"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("per_mmac_us: 7.25", "per_mmac_us: 2000000.0", r"kernels\.conv_fp32\.per_mmac_us"),
        ("per_mmac_us: 7.25", "per_mmac_us: .inf", r"kernels\.conv_fp32\.per_mmac_us"),
        ("per_mmac_us: 7.25", "per_mmac_us: .nan", r"kernels\.conv_fp32\.per_mmac_us"),
        ("per_run_us: 0.0", "per_run_us: -1.0e+9", r"end_to_end\.per_run_us"),
        ("threads: 1", "threads: 0", "threads"),
        ("nchwc_block: 16", "nchwc_blok: 16", "nchwc_blok"),
    ],
)
def test_impossible_values_are_named(here: FittedProfile, tmp_path: Path, old: str, new: str, says: str) -> None:
    path = here.save(tmp_path / "here.yaml")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UsageError, match=says):
        load_hardware(path)
    (check,) = check_profile(path)
    assert (check.name, check.level) == ("file", "error")
    assert "autocompress profile" in check.remedy


def test_kernels_that_cost_nothing_are_found(here: FittedProfile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all coefficients are zero"):
        FittedProfile.model_validate({**here.model_dump(), "kernels": {"conv_fp32": {"fixed_us": 0}}})
    with pytest.raises(ValueError, match="all coefficients are zero"):
        FittedProfile.model_validate({**here.model_dump(), "kernels": {}})
    kernels = {**here.kernels, "conv_int8": KernelCost(fixed_us=0.0), "view": KernelCost(fixed_us=0.0)}
    path = here.model_copy(update={"kernels": kernels}).save(tmp_path / "here.yaml")
    (error,) = [check for check in check_profile(path) if not check.ok]
    assert error.detail.endswith(": conv_int8"), "a view may be free"


def test_corrupted_files_are_one_finding(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for content in (b"\xff\xfe\x00", b"kernels: [", b"", b"version: 2\nkind: fitted\nkernels: 3\n"):
        path.write_bytes(content)
        (check,) = check_profile(path)
        assert check.level == "error"
    (missing,) = check_profile(tmp_path / "absent.yaml")
    assert "No such file" in missing.detail


def test_a_kind_is_asked_for_by_its_class(here: FittedProfile, tmp_path: Path) -> None:
    path = here.save(tmp_path / "here.yaml")
    assert type(HardwareProfile.load(path)) is FittedProfile
    from autocompress.hardware.analytic_profile import AnalyticProfile

    with pytest.raises(UsageError, match="is fitted, where another kind is needed"):
        AnalyticProfile.load(path)


def test_hold_out_and_scales_survive_their_file(here: FittedProfile, tmp_path: Path) -> None:
    full = here.model_copy(
        update={
            "holdout": HoldOut(models=3, mape=0.02, max=0.1, kendall_tau=0.9, spearman=0.95, repeat_floor=0.01),
            "end_to_end": EndToEnd(scales={"fp32": 1.1}, per_kernel_us=-0.2, per_run_us=4.0),
        }
    )
    assert FittedProfile.load(full.save(tmp_path / "full.yaml")) == full


def test_interrupted_writing_leaves_the_old_file(
    here: FittedProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = here.save(tmp_path / "here.yaml")
    before = path.read_text()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        here.model_copy(update={"threads": 2}).save(path)
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["here.yaml"]
