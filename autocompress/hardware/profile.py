"""Hardware profiles: what is known of a device, as plain coefficients in a YAML file anyone can read and rebuild.

A ``FittedProfile`` was measured kernel by kernel on the device; an ``AnalyticProfile`` (``analytic_profile``) says what
its maker publishes: peaks, bandwidths, memories.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from autocompress.errors import UsageError, unknown_name
from autocompress.hardware.profile_file import edited_sections, read_mapping, write_mapping
from autocompress.plan import Value
from autocompress.progress import Progress
from autocompress.registry import import_object
from autocompress.resources import find_resource, resource_names
from autocompress.runtime.base import DEFAULT_RUNTIME
from autocompress.tasks.cache import cache_directory

logger = logging.getLogger(__name__)

PROFILE_VERSION: Literal[2] = 2
LOCAL = "local"

_REVISION = 5
"""Goes up with every change to what is measured or how it is fitted: profiles cached before are measured again."""

ABSURD_US = 1e6
"""No kernel takes a second for its launch, for a million multiply-accumulates or for a megabyte."""

Coefficient = Annotated[float, Field(ge=0, le=ABSURD_US, allow_inf_nan=False)]
Precision = Literal["fp32", "fp16", "int8", "int4"]

PROFILE_KINDS = {
    "fitted": "autocompress.hardware.profile:FittedProfile",
    "analytic": "autocompress.hardware.analytic_profile:AnalyticProfile",
}


class KernelCost(Value):
    """Microseconds of one kernel class: a constant, and so much for a million of each of ``kernels.FEATURES``.

    ``samples`` measured kernels gave the coefficients, with a mean absolute relative error of ``mape``.
    """

    fixed_us: Coefficient
    per_mmac_us: Coefficient = 0.0
    per_mtap_us: Coefficient = 0.0
    per_mpoint_us: Coefficient = 0.0
    per_mwindow_us: Coefficient = 0.0
    per_read_mb_us: Coefficient = 0.0
    per_written_mb_us: Coefficient = 0.0
    per_weight_mb_us: Coefficient = 0.0
    per_far_mb_us: Coefficient = 0.0
    samples: int = Field(default=0, ge=0)
    mape: float = 0.0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """In the order of ``kernels.FEATURES``."""
        return (
            self.fixed_us, self.per_mmac_us, self.per_mtap_us, self.per_mpoint_us, self.per_mwindow_us,
            self.per_read_mb_us, self.per_written_mb_us, self.per_weight_mb_us, self.per_far_mb_us,
        )  # fmt: skip

    @classmethod
    def of(cls, coefficients: Sequence[float], samples: int = 0, mape: float = 0.0) -> KernelCost:
        """From coefficients in the order of ``kernels.FEATURES``, kept to five digits."""
        names = list(cls.model_fields)[: len(coefficients)]
        # A class of which too little was measured can come out absurd: a bad price is better than no profile.
        rounded = {name: float(f"{min(value, ABSURD_US):.5g}") for name, value in zip(names, coefficients, strict=True)}
        return cls.model_validate({**rounded, "samples": samples, "mape": mape})


class EndToEnd(Value):
    """From kernel times to the latency of a run: scales by family, a correction a kernel, and a constant a run.

    The weights of a model larger than ``cache_mb`` have left the cache when a run comes back to them: each megabyte
    costs ``per_cold_mb_us`` on top.
    """

    scales: dict[str, Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]] = Field(default_factory=dict)
    per_kernel_us: float = Field(default=0.0, ge=-ABSURD_US, le=ABSURD_US, allow_inf_nan=False)
    per_run_us: float = Field(default=0.0, ge=-ABSURD_US, le=ABSURD_US, allow_inf_nan=False)
    per_cold_mb_us: Coefficient = 0.0
    cache_mb: float = Field(default=16.0, gt=0, allow_inf_nan=False)


class HoldOut(Value):
    """Errors on whole models that no coefficient was fitted to; ``mape`` and ``max`` are fractions.

    ``kendall_tau`` and ``spearman`` say how well the models are ranked; ``repeat_floor`` is how far two measurements of
    one of these models lie apart (a fraction).  None: not determined.
    """

    models: int
    mape: float
    max: float
    kendall_tau: float
    spearman: float | None = None
    repeat_floor: float | None = None


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


class Memory(Value):
    """What the device can hold; None: more than any model here needs.

    Attributes:
        ram_bytes: for activations (an MCU's SRAM) and, where there is no flash, the weights too.
        flash_bytes: for the file.
        engine_bytes: of the RAM what the engine itself takes: its interpreter and scratch buffers.
    """

    ram_bytes: int | None = Field(default=None, gt=0)
    flash_bytes: int | None = Field(default=None, gt=0)
    engine_bytes: int = Field(default=0, ge=0)


class Energy(Value):
    """Picojoules of the work, and milliwatts for as long as a run takes."""

    pj_per_mac: dict[Precision, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    pj_per_byte: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    static_mw: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class HardwareProfile(Value):
    """A device as a cost model sees it: what all kinds of profile say.

    Attributes:
        kind: how latencies are known: ``fitted`` to measured kernels, or ``analytic``, from what is published.
        runtime: what runs the model there; with the device it is what the profile is of.
        precisions: the types that the device computes in.
        channel_step: for a type the multiple that channel counts should keep; others waste time.
        memory: limits.
        energy: None where nothing is known of it.
        validated: whether predictions were compared with measurements of models that nothing was fitted to.
        error_band: half the width of the band around a latency, as a fraction, where nothing better is known.
        repeat_floor: how far two measurements of one model lie apart (a fraction): no error below it means anything.
    """

    version: Literal[2] = PROFILE_VERSION
    kind: Literal["fitted", "analytic"]
    name: str
    description: str = ""
    runtime: str = "onnxruntime"
    runtime_version: str
    threads: int = Field(ge=1)
    batch: int = Field(ge=1)
    precisions: tuple[Precision, ...] = Field(min_length=1)
    channel_step: dict[Precision, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    memory: Memory = Field(default_factory=Memory)
    energy: Energy | None = None
    validity: Validity | None = None
    provenance: Provenance | None = None
    validated: bool
    error_band: float = Field(gt=0, le=10, allow_inf_nan=False)
    repeat_floor: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def at(self, threads: int | None, batch: int | None) -> Self:
        """The profile for so many threads and samples a run; a kind that can be scaled overrides this.

        Raises:
            UsageError: the profile was made for others.
        """
        for what, given, has in (("threads", threads, self.threads), ("batch", batch, self.batch)):
            if given is not None and given != has:
                raise UsageError(
                    f"hardware profile {self.name} was made for {what}={has}, not {given}; ask for {has}, or profile "
                    "again"
                )
        return self

    def save(self, path: Path) -> Path:
        """Writes the profile as YAML, with digests of what it says; the file is complete or not there at all."""
        return write_mapping(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a profile of any kind; what is wrong with a file is said with its name and field.

        A file that was edited since it was measured is read as it stands, with a warning.
        """
        profile, edited = cls.read(path)
        if edited:
            logger.warning(
                "hardware profile %s: edited by hand since it was measured: %s; its error figures are those of the "
                "measured values: measure it again with 'autocompress profile' to have them hold",
                path,
                ", ".join(edited),
            )
        return profile

    @classmethod
    def read(cls, path: Path) -> tuple[Self, list[str]]:
        """The profile of a file, and the fields that were edited since it was written."""
        content = read_mapping(path)
        if content.get("version") != PROFILE_VERSION:
            raise UsageError(
                f"hardware profile {path}: version {content.get('version')!r}, but this autocompress reads version "
                f"{PROFILE_VERSION}; measure it again with 'autocompress profile'"
            )
        if content.get("kind") not in PROFILE_KINDS:
            raise UsageError(
                f"hardware profile {path}: kind: {content.get('kind')!r}; it must be one of {', '.join(PROFILE_KINDS)}"
            )
        edited = edited_sections(content)
        content.pop("digest", None)
        try:
            made = import_object(PROFILE_KINDS[content["kind"]]).model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "file"
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise UsageError(
                f"hardware profile {path}: {field}: {first['msg']}{more}; correct it or make the profile again with "
                "'autocompress profile'"
            ) from error
        if not isinstance(made, cls):
            raise UsageError(f"hardware profile {path}: is {made.kind}, where another kind is needed ({cls.__name__})")
        return made, edited


class FittedProfile(HardwareProfile):
    """A device whose kernels were measured.

    Attributes:
        nchwc_block: channels the runtime packs together for float32 convolutions (0: it keeps plain NCHW).
        kernels: the cost of each kernel class, by the names of ``kernels.KINDS``.
    """

    kind: Literal["fitted"] = "fitted"
    precisions: tuple[Precision, ...] = Field(default=("fp32", "int8"), min_length=1)
    channel_step: dict[Precision, Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: {"fp32": 16, "int8": 16}, validate_default=True
    )
    nchwc_block: int = Field(default=16, ge=0)
    kernels: dict[str, KernelCost]
    end_to_end: EndToEnd = Field(default_factory=EndToEnd)
    holdout: HoldOut | None = None
    provenance: Provenance
    validated: bool = True
    error_band: float = Field(default=0.15, gt=0, le=10, allow_inf_nan=False)

    @model_validator(mode="after")
    def _costs_something(self) -> Self:
        if not any(any(cost.coefficients) for cost in self.kernels.values()):
            raise ValueError("kernels: all coefficients are zero: no kernel costs nothing")
        return self


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


class ProfileCheck(Value):
    """Something found in a profile; ``level`` says whether it keeps the profile from being used."""

    name: str
    level: Literal["ok", "warning", "error"]
    detail: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        return self.level != "error"


def differences(profile: FittedProfile) -> list[ProfileCheck]:
    """What sets this machine apart from the one that a profile was measured on."""
    again = "predictions for this machine need its own profile: 'autocompress profile'"
    found: list[ProfileCheck] = []
    here, made_on = cpu_description(), profile.provenance.cpu
    if here != made_on:
        detail = f"measured on another processor ({made_on}; here: {here})"
        found.append(ProfileCheck(name="processor", level="warning", detail=detail, remedy=again))
    installed = _installed(profile.runtime)
    if installed is None:
        detail, remedy = f"its runtime {profile.runtime} is not installed here", f"install {profile.runtime}"
        found.append(ProfileCheck(name="runtime", level="warning", detail=detail, remedy=remedy))
    elif installed != profile.runtime_version:
        detail = f"measured with {profile.runtime} {profile.runtime_version}; installed: {installed}"
        remedy = f"measure again with 'autocompress profile', or install {profile.runtime}=={profile.runtime_version}"
        found.append(ProfileCheck(name="runtime", level="warning", detail=detail, remedy=remedy))
    return found


def _installed(runtime: str) -> str | None:
    """The version of a runtime here, whichever of its packages it came with."""
    for package in (runtime, f"{runtime}-gpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def refuse_threads(threads: int, hardware: str) -> None:
    """Refuses to measure with more threads than this machine has cores."""
    cores = os.cpu_count() or 1
    if threads > cores:
        raise UsageError(
            f"hardware {hardware}: {threads} threads, but this machine has {cores} cores; ask for at most {cores}"
        )


def list_hardware() -> list[str]:
    """The names ``load_hardware`` takes: ``local`` and the shipped profiles."""
    return [LOCAL, *resource_names("hardware_profiles")]


def load_hardware(
    hardware: str | Path = LOCAL,
    threads: int | None = None,
    batch: int | None = None,
    runtime: str | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> HardwareProfile:
    """The profile of a device.

    One that was measured on another processor or with another version of its runtime is given with a warning.

    Args:
        hardware: ``local`` (measured on first use, then cached), the name of a shipped profile, or a YAML file.
        threads: threads of one run; a fitted profile must have been made for as many, an analytic one is scaled.
        batch: samples a run; likewise.
        runtime: what runs the models; a fitted profile must have been made with it.  ``onnxruntime`` for ``local``
            by default.
        cache_dir: where the local profile is kept, ``AUTOCOMPRESS_CACHE`` or ``~/.cache/autocompress`` by default.
        progress: told how far the measuring is.

    Raises:
        UsageError: no such profile, a broken file, one made for other threads, another batch or another runtime, or
            more threads than the machine or the device has.
    """
    if hardware == LOCAL:
        from autocompress.hardware.measure import local_profile

        if threads is not None:
            refuse_threads(threads, "local")
        return local_profile(
            threads or 1, batch or 1, cache_dir=cache_dir, progress=progress, runtime=runtime or DEFAULT_RUNTIME
        )
    path = Path(hardware)
    if path.suffix not in (".yaml", ".yml"):
        found = find_resource("hardware_profiles", str(hardware))
        if found is None:
            raise unknown_name("hardware", str(hardware), list_hardware())
        path = found
    profile = HardwareProfile.load(path)
    profile = profile.at(threads, batch)
    if not isinstance(profile, FittedProfile):
        return profile
    if runtime is not None and runtime != profile.runtime:
        raise UsageError(
            f"hardware profile {hardware} was made with {profile.runtime}, not {runtime}; ask for --runtime "
            f"{profile.runtime}, or profile again"
        )
    if profile.provenance.cpu == cpu_description():
        refuse_threads(profile.threads, str(hardware))
    for difference in differences(profile):
        logger.warning("hardware profile %s: %s; %s", hardware, difference.detail, difference.remedy)
    return profile
