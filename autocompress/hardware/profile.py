"""Hardware profiles: what is known of a device, as plain coefficients in a YAML file anyone can read and rebuild."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from autocompress.errors import UsageError, unknown_name
from autocompress.plan import Value
from autocompress.progress import Progress
from autocompress.resources import find_resource, resource_names
from autocompress.tasks.cache import cache_directory

PROFILE_VERSION: Literal[1] = 1
LOCAL = "local"

_REVISION = 2
"""Goes up with every change to what is measured or how it is fitted: profiles cached before are measured again."""


class KernelCost(Value):
    """Microseconds of one kernel class: a constant, and so much for a million of each of ``kernels.FEATURES``.

    ``samples`` measured kernels gave the coefficients, with a mean absolute relative error of ``mape``.
    """

    fixed_us: float = Field(ge=0)
    per_mmac_us: float = Field(default=0.0, ge=0)
    per_mtap_us: float = Field(default=0.0, ge=0)
    per_mpoint_us: float = Field(default=0.0, ge=0)
    per_mwindow_us: float = Field(default=0.0, ge=0)
    per_read_mb_us: float = Field(default=0.0, ge=0)
    per_written_mb_us: float = Field(default=0.0, ge=0)
    per_weight_mb_us: float = Field(default=0.0, ge=0)
    samples: int = 0
    mape: float = 0.0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """In the order of ``kernels.FEATURES``."""
        return (
            self.fixed_us, self.per_mmac_us, self.per_mtap_us, self.per_mpoint_us, self.per_mwindow_us,
            self.per_read_mb_us, self.per_written_mb_us, self.per_weight_mb_us,
        )  # fmt: skip

    @classmethod
    def of(cls, coefficients: Sequence[float], samples: int = 0, mape: float = 0.0) -> KernelCost:
        """From coefficients in the order of ``kernels.FEATURES``, kept to five digits."""
        names = list(cls.model_fields)[: len(coefficients)]
        rounded = {name: float(f"{value:.5g}") for name, value in zip(names, coefficients, strict=True)}
        return cls.model_validate({**rounded, "samples": samples, "mape": mape})


class EndToEnd(Value):
    """From kernel times to the latency of a run: scales by family, a correction a kernel, and a constant a run.

    The weights of a model larger than ``cache_mb`` have left the cache when a run comes back to them: each megabyte
    costs ``per_cold_mb_us`` on top.
    """

    scales: dict[str, float] = Field(default_factory=dict)
    per_kernel_us: float = 0.0
    per_run_us: float = 0.0
    per_cold_mb_us: float = Field(default=0.0, ge=0)
    cache_mb: float = Field(default=16.0, gt=0)


class HoldOut(Value):
    """Errors on whole models that no coefficient was fitted to; ``mape`` and ``max`` are fractions."""

    models: int
    mape: float
    max: float
    kendall_tau: float


class Validity(Value):
    """What the profile was measured on; outside it an estimate is an extrapolation."""

    latency_ms: tuple[float, float]
    channels: tuple[int, int]
    resolution: tuple[int, int]


class Provenance(Value):
    """When, on what and with what a profile was made."""

    measured_at: str
    seconds: float
    cpu: str
    cores: int
    system: str
    versions: dict[str, str] = Field(default_factory=dict)


class HardwareProfile(Value):
    """A device as the cost model sees it.

    Attributes:
        nchwc_block: channels the runtime packs together for float32 convolutions (0: it keeps plain NCHW).
        kernels: the cost of each kernel class, by the names of ``kernels.KINDS``.
        repeat_floor: how far two measurements of one model lie apart (a fraction): no error below it means anything.
    """

    version: Literal[1] = PROFILE_VERSION
    name: str
    runtime: str = "onnxruntime"
    runtime_version: str
    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    nchwc_block: int = Field(default=16, ge=0)
    kernels: dict[str, KernelCost]
    end_to_end: EndToEnd = Field(default_factory=EndToEnd)
    holdout: HoldOut | None = None
    repeat_floor: float = 0.0
    validity: Validity | None = None
    provenance: Provenance

    def save(self, path: Path) -> Path:
        """Writes the profile as YAML; the file is complete or not there at all."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: Path) -> HardwareProfile:
        """Reads a profile; what is wrong with a file is said with its name and field."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"hardware profile {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"hardware profile {path}: not a text file ({error.reason})") from error
        try:
            content: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"hardware profile {path}: not valid YAML: {reason}") from error
        if not isinstance(content, dict):
            raise UsageError(f"hardware profile {path}: expected a mapping of fields, found {type(content).__name__}")
        if content.get("version") != PROFILE_VERSION:
            raise UsageError(
                f"hardware profile {path}: version {content.get('version')!r}, but this autocompress reads version "
                f"{PROFILE_VERSION}; measure it again with 'autocompress profile'"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "file"
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise UsageError(f"hardware profile {path}: {field}: {first['msg']}{more}") from error


def cpu_description() -> str:
    """The processor, precisely enough that two that time differently are told apart."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name") or platform.processor() or platform.machine()
    details = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    present = (fields.get("flags") or fields.get("Features") or "").split()
    return ", ".join([name, *details, *(flag for flag in wanted if flag in present)])


def local_path(runtime: str, runtime_version: str, threads: int, batch: int, cache_dir: Path | None = None) -> Path:
    """Where the profile of this machine is cached: one file for each CPU, runtime version, threads and batch."""
    cpu = hashlib.sha256(f"{cpu_description()}|{os.cpu_count()}".encode()).hexdigest()[:10]
    name = f"{runtime}-{runtime_version}-{cpu}-t{threads}-b{batch}-v{PROFILE_VERSION}.{_REVISION}.yaml"
    return cache_directory(cache_dir) / "hardware" / name


def list_hardware() -> list[str]:
    """The names ``load_hardware`` takes: ``local`` and the shipped profiles."""
    return [LOCAL, *resource_names("hardware_profiles")]


def load_hardware(
    hardware: str | Path = LOCAL,
    threads: int | None = None,
    batch: int | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> HardwareProfile:
    """The profile of a device.

    Args:
        hardware: ``local`` (measured on first use, then cached), the name of a shipped profile, or a YAML file.
        threads: threads of one run; a stored profile must have been made for as many.
        batch: samples a run; likewise.
        cache_dir: where the local profile is kept, ``AUTOCOMPRESS_CACHE`` or ``~/.cache/autocompress`` by default.
        progress: told how far the measuring is.

    Raises:
        UsageError: no such profile, a broken file, or one made for other threads or another batch.
    """
    if hardware == LOCAL:
        from autocompress.hardware.measure import local_profile

        return local_profile(threads or 1, batch or 1, cache_dir=cache_dir, progress=progress)
    path = Path(hardware)
    if path.suffix not in (".yaml", ".yml"):
        found = find_resource("hardware_profiles", str(hardware))
        if found is None:
            raise unknown_name("hardware", str(hardware), list_hardware())
        path = found
    profile = HardwareProfile.load(path)
    for what, given, has in (("threads", threads, profile.threads), ("batch", batch, profile.batch)):
        if given is not None and given != has:
            raise UsageError(
                f"hardware profile {hardware} was made for {what}={has}, not {given}; ask for {has}, or profile again"
            )
    return profile
