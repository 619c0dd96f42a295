"""Search spaces: the options a search may choose from, as a YAML file says them.

A space names options; the search turns them into a menu for each group and layer of the model at hand, and drops
what does not pay on the target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autocompress.config import read_yaml
from autocompress.errors import UsageError, nearest_names
from autocompress.patterns import match_layers
from autocompress.plan import Searched
from autocompress.resources import find_resource, resource_names

WeightBits = Literal[4, 8, 32]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Rule(_Section):
    """Narrower options for some layers or channel groups; the first rule that matches a name decides.

    ``layers`` is an exact name, a glob or ``re:EXPRESSION``; an option left out stays as the space has it.
    """

    layers: str
    keep: tuple[float, ...] | None = None
    compute: tuple[Searched, ...] | None = None
    weight_bits: tuple[WeightBits, ...] | None = None

    @field_validator("keep", "compute", "weight_bits")
    @classmethod
    def _some(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return value if value is None else _options(value)

    @field_validator("keep")
    @classmethod
    def _shares(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return value if value is None else _fractions(value)


class Students(_Section):
    """Narrower or shallower models to start from; without widths and depths there are no students."""

    widths: tuple[float, ...] = ()
    depths: tuple[float, ...] = ()
    init: tuple[Literal["inherit", "fresh"], ...] = ("inherit",)

    @field_validator("widths")
    @classmethod
    def _widths(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _fractions(value)

    @field_validator("depths")
    @classmethod
    def _depths(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= share <= 1 for share in value):
            raise ValueError(f"{list(value)} is not allowed; give shares of the residual blocks that stay, from 0 to 1")
        return value


class Distillation(_Section):
    """Settings that recovery may choose: see :class:`autocompress.plan.Recipe`.

    ``qat`` says whether recovery may train 4-bit weights with their rounding simulated.
    """

    alpha: tuple[float, ...] = (0.5,)
    temperature: tuple[float, ...] = (2.0,)
    feature_weight: tuple[float, ...] = (0.0,)
    learning_rate: tuple[float, ...] = (1e-2,)
    qat: tuple[bool, ...] = (True, False)

    @field_validator("alpha")
    @classmethod
    def _weights(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= share <= 1 for share in value):
            raise ValueError(f"{list(value)} is not allowed; alpha lies between 0 (labels only) and 1 (teacher only)")
        return _options(value)

    @field_validator("temperature", "learning_rate")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(number <= 0 for number in value):
            raise ValueError(f"{list(value)} is not allowed; give positive numbers")
        return _options(value)

    @field_validator("feature_weight")
    @classmethod
    def _not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(number < 0 for number in value):
            raise ValueError(f"{list(value)} is not allowed; give numbers from 0 on")
        return _options(value)

    @field_validator("qat")
    @classmethod
    def _some(cls, value: tuple[bool, ...]) -> tuple[bool, ...]:
        return _options(value)


class SearchSpace(_Section):
    """What a search may choose from.

    Attributes:
        description: one line for ``autocompress list spaces``.
        keep: shares of a channel group that may be kept; 1.0 leaves it whole.
        compute: types a layer may compute in.
        weight_bits: widths its weights may be stored in; 4 and 8 go with both types, 32 with fp32 alone.
        students: narrower models to start from.
        distillation: settings of recovery.
        freeze: layers to leave as they are.
        rules: exceptions by name.
    """

    description: str = ""
    keep: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    compute: tuple[Searched, ...] = ("fp32", "int8")
    weight_bits: tuple[WeightBits, ...] = (32, 8, 4)
    students: Students = Field(default_factory=Students)
    distillation: Distillation = Field(default_factory=Distillation)
    freeze: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    @field_validator("keep")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _fractions(_options(value))

    @field_validator("compute", "weight_bits")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return _options(value)

    @model_validator(mode="after")
    def _computable(self) -> SearchSpace:
        for where, compute, bits in [
            ("", self.compute, self.weight_bits),
            *(
                (f"rules[{index}].", rule.compute or self.compute, rule.weight_bits or self.weight_bits)
                for index, rule in enumerate(self.rules)
            ),
        ]:
            if compute == ("int8",) and not set(bits) & {4, 8}:
                raise ValueError(f"{where}compute int8 needs 8 or 4 among weight_bits, not only {list(bits)}")
        return self

    def for_name(self, name: str) -> SearchSpace:
        """The options of one layer or channel group, once the rules have spoken."""
        for rule in self.rules:
            if _matches(rule.layers, name):
                given = rule.model_dump(exclude={"layers"}, exclude_none=True)
                return self.model_copy(update={**given, "rules": ()})
        return self.model_copy(update={"rules": ()})

    def named(self, name: str) -> frozenset[str]:
        """The options that a rule gives one layer or channel group by name: they were asked for there."""
        for rule in self.rules:
            if _matches(rule.layers, name):
                return frozenset(rule.model_dump(exclude={"layers"}, exclude_none=True))
        return frozenset()

    def check_names(self, names: list[str], origin: str) -> None:
        """Raises a UsageError for a pattern that matches none of the model's layers and groups."""
        for index, rule in enumerate(self.rules):
            match_layers([rule.layers], names, f"{origin}: rules[{index}].layers")
        if self.freeze:
            match_layers(self.freeze, names, f"{origin}: freeze")


def load_space(given: str) -> SearchSpace:
    """The space of a shipped name or a YAML file.

    Raises:
        UsageError: citing ``file:key`` for whatever is wrong in it.
    """
    path = find_resource("search_spaces", given)
    if path is None:
        known = resource_names("search_spaces")
        hint = f"; nearest: {nearest_names(given, known)[0]!r}" if known else ""
        raise UsageError(f"unknown search space {given!r}{hint}; known: {', '.join(known)}, or a YAML file")
    return read_space_file(path)


def read_space_file(path: Path) -> SearchSpace:
    """Reads one YAML file; see :func:`load_space`."""
    try:
        return SearchSpace.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UsageError("\n".join(_explain(path, item) for item in error.errors(include_url=False))) from None


_FIELDS: dict[str, list[str]] = {
    "": list(SearchSpace.model_fields),
    "students": list(Students.model_fields),
    "distillation": list(Distillation.model_fields),
    "rules": list(Rule.model_fields),
}


def _explain(path: Path, item: Any) -> str:
    """``resnet.yaml: rules[2].keep: ...``"""
    where = ""
    for part in item["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    if item["type"] == "extra_forbidden":
        section = str(item["loc"][0]) if len(item["loc"]) > 1 else ""
        nearest = nearest_names(str(item["loc"][-1]), _FIELDS[section])[0]
        return f"{path}:{where}: unknown key; nearest: {nearest!r}; known: {', '.join(_FIELDS[section])}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] != "value_error":
        message = f"{item['input']!r} is not allowed; {message[0].lower()}{message[1:]}"
    return f"{path}:{where}: {message}" if where else f"{path}: {message}"


def _matches(pattern: str, name: str) -> bool:
    try:
        return bool(match_layers([pattern], [name]))
    except UsageError:
        return False


def _options(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise ValueError("an empty list leaves nothing to choose; leave the key out for the default")
    if len(set(value)) != len(value):
        raise ValueError(f"{list(value)} repeats an option")
    return value


def _fractions(value: tuple[float, ...]) -> tuple[float, ...]:
    if any(not 0 < share <= 1 for share in value):
        raise ValueError(f"{list(value)} is not allowed; give shares above 0 and up to 1")
    return value
