"""What a search is asked for: one validated value made from a YAML file and flags, flags winning.

Every error names where the value came from (``run.yaml:max_drop`` or ``--max-drop``), what was given and what is
allowed.  The resolved configuration, written to ``config.yaml`` of the run, repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from autocompress.errors import UsageError, nearest_names
from autocompress.resources import Folder, find_resource, resource_names
from autocompress.tasks.registry import DEFAULT_MODELS, FALLBACK_MODEL, TASKS
from autocompress.units import format_duration, parse_count, parse_duration

OBJECTIVES = ("error", "latency_ms", "size_bytes", "peak_memory_bytes", "energy_mj", "macs")
"""What a front can be drawn over; all are minimised."""

MOST_OBJECTIVES = 4
"""Hypervolumes are exact up to four axes."""

DEFAULT_TIME_BUDGET_S = 600.0

INVOCATION_KEYS = ("out", "resume", "dry_run")
"""Keys that say how this call runs, not what the run is: they are left out of ``config.yaml``."""

FLEXIBLE_ON_RESUME = frozenset(
    {"time_budget", "trials", "sampler", "device", "executor", "storage", "data", *INVOCATION_KEYS}
)
"""Keys that may differ when a run goes on; every other one would make it another run."""

SAME_TO_REUSE = ("task", "model", "input_size", "normalisation", "hardware", "runtime", "threads", "batch", "freeze")
"""Keys that must agree with those of a run that is started from; of files, it is the content that must."""

LENT_KEYS = frozenset({*SAME_TO_REUSE, "weights", "data", "space", "teacher", "seed", "device", "executor", "storage"})
"""Keys that a run lends to the search that starts from it."""


class PixelStatistics(BaseModel):
    """Mean and standard deviation of each channel, for pixels in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0:
            raise ValueError("mean and std need one number a channel each, std above 0")
        return self


class RunConfig(BaseModel):
    """Everything ``autocompress search`` can be told.

    Make it with :func:`load_config` (a file and flags) or :meth:`create` (keywords); both turn a bad value into a
    :class:`~autocompress.errors.UsageError` that says where it stands.

    >>> RunConfig.create(task="digits", time_budget="2m").time_budget
    120.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    task: str = Field(
        "digits",
        min_length=1,
        description="What is compressed and how it is judged: a built-in task (see `list tasks`), imagefolder:DIR, "
        "or module:function of your own.",
    )
    model: str | None = Field(
        None, description="A built-in or torchvision model (see `list models`), or module:function of your own."
    )
    weights: Path | None = Field(
        None,
        description="Trained weights: .safetensors, or .pt with weights only. Without them a built-in task is trained.",
    )
    data: Path | None = Field(None, description="The folder the data set lies in, where it is not found by itself.")
    input_size: int | None = Field(
        None, ge=8, le=4096, description="Height and width images are resized to, in pixels."
    )
    normalisation: PixelStatistics | None = Field(None, description="Replaces the data set's mean and std a channel.")
    hardware: str = Field(
        "local", min_length=1, description="The target: local (this machine), a profile's name, or its YAML file."
    )
    runtime: str = Field("onnxruntime", min_length=1, description="The runtime that will execute the models.")
    threads: int = Field(1, ge=1, le=1024, description="Threads the models will run with.")
    batch: int = Field(1, ge=1, le=65536, description="Samples a run, for which latency counts.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where recovery trains: cpu, cuda, or auto for CUDA where there is one."
    )
    space: str = Field("default", min_length=1, description="The search space: a shipped name or a YAML file.")
    freeze: tuple[str, ...] = Field(
        (), description="Layers to leave as they are: a name, a glob (layer1.*) or re:EXPRESSION. May be repeated."
    )
    teacher: str | None = Field(None, description="The model that teaches; the original by default.")
    max_latency_ms: float | None = Field(None, gt=0, description="Budget: median milliseconds of one run.")
    max_size_mb: float | None = Field(None, gt=0, description="Budget: the artifact on disk, in MB of 1,000,000 bytes.")
    max_memory_mb: float | None = Field(None, gt=0, description="Budget: peak activation memory, in MB.")
    max_energy_mj: float | None = Field(
        None, gt=0, description="Budget: millijoules of one run, where the profile has them."
    )
    max_macs: int | None = Field(None, gt=0, description="Budget: multiply-accumulates of one sample, e.g. 20M.")
    max_drop: float | None = Field(
        None, ge=0, le=100, description="Budget: points of validation quality that may be lost, e.g. 1."
    )
    objectives: tuple[str, ...] = Field(
        ("error", "latency_ms", "size_bytes"),
        description="What the front trades off, comma-separated: one to four of error, latency_ms, size_bytes, "
        "peak_memory_bytes, energy_mj, macs. Without error, --max-drop says what quality must stay.",
    )
    time_budget: float | None = Field(
        None,
        ge=0,
        description="How long to search, e.g. 90s, 10m, 1h30m. 10m where --trials is not given either. A finished run "
        "that is resumed with it gets that much more; 0s, with --reuse, answers from what is there.",
    )
    trials: int | None = Field(None, ge=1, description="How many candidates to evaluate; repeatable with --seed.")
    sampler: str = Field(
        "auto", min_length=1, description="How candidates are proposed: a name of `list samplers`; auto by default."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random choice.")
    executor: Literal["local"] = Field("local", description="Where candidates are evaluated: local.")
    storage: str | None = Field(None, description="Optuna storage URL; study.db in the run directory by default.")
    out: Path | None = Field(None, description="The run directory; results/<task>-<model>-<n> by default.")
    resume: bool = Field(
        False,
        description="Go on with the run in --out; start it where there is none. An interrupted run uses what is left "
        "of its time; a finished one stays as it is, unless --time-budget or more --trials say how much more.",
    )
    reuse: Path | None = Field(
        None,
        description="A run whose models, recoveries and trials this search starts from, under other budgets or "
        "objectives; task, model and target are that run's.",
    )
    dry_run: bool = Field(False, description="Read, price and show what would be searched; evaluate nothing.")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _asked: frozenset[str] = PrivateAttr(default=frozenset())

    def __eq__(self, other: object) -> bool:
        """Equal values are equal, wherever they were given."""
        return isinstance(other, RunConfig) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    # ------------------------------------------------------------------------------------------- single values

    @field_validator("time_budget", mode="before")
    @classmethod
    def _duration(cls, value: object) -> object:
        return parse_duration(value) if isinstance(value, str) else value

    @field_validator("max_macs", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        return parse_count(value) if isinstance(value, str) else value

    @field_validator("objectives", "freeze", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in OBJECTIVES:
                nearest = nearest_names(name, OBJECTIVES)[0]
                raise ValueError(f"unknown objective {name!r}; nearest: {nearest!r}; known: {', '.join(OBJECTIVES)}")
        if len(set(value)) != len(value):
            raise ValueError(f"objectives repeat: {', '.join(value)}")
        if not 1 <= len(value) <= MOST_OBJECTIVES:
            raise ValueError(f"{len(value)} objectives given; give 1 to {MOST_OBJECTIVES} of {', '.join(OBJECTIVES)}")
        return value

    @field_validator("freeze")
    @classmethod
    def _readable_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value in TASKS or ":" in value:
            return value
        raise ValueError(
            f"unknown task {value!r}; nearest: {nearest_names(value, TASKS)[0]!r}; "
            f"known: {', '.join(sorted(TASKS))}, imagefolder:DIR, module:function"
        )

    @field_validator("hardware")
    @classmethod
    def _known_hardware(cls, value: str) -> str:
        return value if value == "local" else _known_resource("hardware_profiles", "hardware", value, extra=("local",))

    @field_validator("space")
    @classmethod
    def _known_space(cls, value: str) -> str:
        return _known_resource("search_spaces", "search space", value)

    @field_validator("weights")
    @classmethod
    def _weights_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            if value.suffix not in (".safetensors", ".pt", ".pth"):
                raise ValueError(f"{str(value)!r} is no weights file; allowed: .safetensors, .pt, .pth")
            if not value.is_file():
                raise ValueError(f"no such file: {str(value)!r}")
        return value

    @field_validator("data")
    @classmethod
    def _data_folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"no such folder: {str(value)!r}")
        return value

    @field_validator("storage")
    @classmethod
    def _storage_url(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError(f"{value!r} is no storage URL; e.g. sqlite:///study.db or postgresql://user@host/name")
        return value

    # ------------------------------------------------------------------------------------------ taken together

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = {key: value for key, value in values.items() if value is not None}
        task = filled.get("task", "digits")
        if "model" not in filled and isinstance(task, str) and task in TASKS:
            filled["model"] = DEFAULT_MODELS.get(task, FALLBACK_MODEL)
        if "time_budget" not in filled and "trials" not in filled:
            filled["time_budget"] = DEFAULT_TIME_BUDGET_S
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task.startswith("imagefolder:") and self.model is None:
            raise ValueError("an image folder says nothing of the model; add --model, e.g. --model resnet18")
        if self.resume and self.out is None:
            raise ValueError("--resume needs the run to go on with: add --out DIR")
        if self.time_budget == 0 and self.reuse is None:
            raise ValueError(
                "--time-budget: 0.0 is not allowed without --reuse RUN, whose models would be the answer; give e.g. 10m"
            )
        if "error" not in self.objectives and self.max_drop is None:
            raise ValueError(
                f"--objectives {','.join(self.objectives)} has no word on quality: the best would be the emptiest "
                "network; add --max-drop POINTS, e.g. --max-drop 1, or error to --objectives"
            )
        return self

    # ------------------------------------------------------------------------------------------------- making

    @classmethod
    def create(cls, **values: Any) -> Self:
        """The configuration of keyword arguments; a None counts as not given."""
        made = cls.from_sources(values, {key: key for key in values})
        made._asked = frozenset(key for key, value in values.items() if value is not None)
        return made

    @classmethod
    def from_sources(cls, values: Mapping[str, Any], origins: Mapping[str, str]) -> Self:
        """Validates values, citing for each key the origin it came from.

        Args:
            values: key -> value; None counts as not given.
            origins: key -> how to cite it, such as ``run.yaml:seed`` or ``--seed``.

        Raises:
            UsageError: naming every bad value at once.
        """
        given = {key: value for key, value in values.items() if value is not None}
        unknown = [
            f"{origins.get(key, key)}: unknown key; nearest: {nearest_names(key, cls.model_fields)[0]!r}"
            for key in given
            if key not in cls.model_fields
        ]
        if unknown:
            raise UsageError("\n".join(unknown))
        try:
            config = cls.model_validate(given)
        except ValidationError as error:
            raise UsageError("\n".join(_explain(error, origins))) from None
        config._origins.update({key: origins.get(key, key) for key in given})
        return config

    def origin(self, key: str) -> str:
        """How to cite a key in an error: where its value was given, or the flag that would set it."""
        return self._origins.get(key, flag_of(key))

    def gave(self, key: str) -> bool:
        """Whether a flag or a keyword set the key; what a file says does not count, nor does a default."""
        return key in self._asked

    @contextmanager
    def citing(self, *keys: str) -> Iterator[None]:
        """Names the origin of ``keys`` in a UsageError raised inside, so that a late check reads like an early one.

        Only keys that were given are cited; where none was, the error passes as it is.
        """
        try:
            yield
        except UsageError as error:
            cited = [self._origins[key] for key in keys if key in self._origins]
            if not cited:
                raise
            raise UsageError(f"{', '.join(cited)}: {error}") from error

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set, in the front's own units: ``constraints`` of ``front.json``."""
        found = {
            "latency_ms": self.max_latency_ms,
            "size_bytes": None if self.max_size_mb is None else self.max_size_mb * 1e6,
            "peak_memory_bytes": None if self.max_memory_mb is None else self.max_memory_mb * 1e6,
            "energy_mj": self.max_energy_mj,
            "macs": self.max_macs,
            "drop": self.max_drop,
        }
        return {key: float(value) for key, value in found.items() if value is not None}

    def to_yaml(self) -> str:
        """The configuration as a file that repeats the run, in declaration order, unset keys left out."""
        values = self.model_dump(mode="json", exclude=set(INVOCATION_KEYS), exclude_none=True)
        values = {key: value for key, value in values.items() if value != []}
        if self.time_budget is not None:
            values["time_budget"] = format_duration(self.time_budget)
        head = "# Repeats this run: autocompress search config.yaml\n"
        return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_config(
    file: Path | str | None = None, flags: Mapping[str, Any] | None = None, *, name_flag: bool = True
) -> RunConfig:
    """The configuration of a YAML file and flags; a flag that is given wins.

    With ``resume`` and no file, the run's own ``config.yaml`` is the file, and only what may change on the way
    (time, trials, where it is computed) may differ from it.  With ``reuse``, that run's task, model and target hold
    where nothing else is said.

    Args:
        file: the YAML file, if any.
        flags: key -> value; None counts as not given.
        name_flag: cite flags as ``--max-drop`` (the command line) rather than ``max_drop`` (Python).

    Raises:
        UsageError: for an unreadable file, an unknown key or a bad value.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    origins = {key: flag_of(key) if name_flag else key for key in given}
    stored: Path | None = None
    if given.get("resume") and given.get("out") is not None:
        candidate = Path(given["out"]) / "config.yaml"
        stored = candidate if candidate.is_file() else None
    base = stored if file is None else Path(file)
    values = read_yaml(base) if base is not None else {}
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    cited = {key: f"{base}:{key}" for key in values}
    reused = given.get("reuse", values.get("reuse")) if stored is None else None
    if "reuse" not in given and reused is not None and not Path(reused).is_dir():
        reused = None  # the file of a run that started from another one says all there is to say
    lent = {} if reused is None else _lent_values(Path(reused), {**cited, **origins}["reuse"])
    cited = {**{key: f"{reused}/config.yaml:{key}" for key in lent}, **cited}
    config = RunConfig.from_sources({**lent, **values, **given}, {**cited, **origins})
    config._asked = frozenset(given)
    if reused is not None:
        _check_reusable(config, RunConfig.from_sources(lent, {}), Path(reused) / "config.yaml")
    if stored is not None:
        _check_same_run(config, RunConfig.from_sources(read_yaml(stored), {}), stored)
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: where the file is missing, is not YAML or holds something else.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such configuration file: {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: expected 'key: value' lines, found a {type(loaded).__name__}")
    return loaded


def flag_of(key: str) -> str:
    """The flag that sets a key: ``max_drop`` -> ``--max-drop``."""
    return "--" + key.replace("_", "-")


# --------------------------------------------------------------------------------------------------------- helpers


def _known_resource(folder: Folder, what: str, given: str, extra: Iterable[str] = ()) -> str:
    if find_resource(folder, given) is not None:
        return given
    if given.endswith((".yaml", ".yml")):
        raise ValueError(f"no such file: {given!r}")
    known = [*extra, *resource_names(folder)]
    nearest = f"nearest: {nearest_names(given, known)[0]!r}; " if known else ""
    raise ValueError(f"unknown {what} {given!r}; {nearest}known: {', '.join(known)}, or a YAML file")


def _explain(error: ValidationError, origins: Mapping[str, str]) -> Iterator[str]:
    """One line a mistake: where it stands, what was given, what is allowed."""
    for item in error.errors(include_url=False):
        key = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] != "value_error":
            message = f"{item['input']!r} is not allowed; {message[0].lower()}{message[1:]}"
        yield f"{origins.get(key, flag_of(key))}: {message}" if key else message


def _lent_values(run: Path, origin: str) -> dict[str, Any]:
    """What a run that is started from lends: everything but its budgets, objectives and time."""
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{origin}: {str(run)!r} holds no run (no config.yaml); give the directory of a search")
    stored = read_yaml(run / "config.yaml")
    return {key: value for key, value in stored.items() if key in LENT_KEYS}


def _check_reusable(config: RunConfig, lender: RunConfig, path: Path) -> None:
    for key in SAME_TO_REUSE:
        if getattr(config, key) == getattr(lender, key):
            continue
        raise UsageError(
            f"{config.origin(key)}: {getattr(config, key)!r} differs from {getattr(lender, key)!r} in {path}; what was "
            f"measured there says nothing of this: leave {flag_of(key)} out, or search without --reuse"
        )


def _check_same_run(config: RunConfig, stored: RunConfig, path: Path) -> None:
    for key in RunConfig.model_fields:
        if key in FLEXIBLE_ON_RESUME or getattr(config, key) == getattr(stored, key):
            continue
        raise UsageError(
            f"{config.origin(key)}: {getattr(config, key)!r} differs from {getattr(stored, key)!r} in {path}; "
            f"a run goes on as it began: leave {flag_of(key)} out, or choose another --out"
        )
