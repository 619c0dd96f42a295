"""The samplers that a search may use, by name.  Imports no Optuna until one is made, so that listing them is instant.

A sampler is a function that takes :class:`SamplerSettings` and gives an Optuna sampler; another package adds one with
an entry point in the group ``autocompress.sampler``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.errors import UsageError, unknown_name
from autocompress.registry import Registry

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

AUTO = "auto"
DEFAULT = "nsga2"
"""What ``auto`` stands for."""

GP_KNOBS = 16
"""Knobs a Gaussian process is good for: beyond, it models little and takes seconds a trial."""

SAMPLERS = Registry(
    "sampler",
    {
        "nsga2": "autocompress.search.samplers:nsga2",
        "nsga3": "autocompress.search.samplers:nsga3",
        "tpe": "autocompress.search.samplers:tpe",
        "gp": "autocompress.search.samplers:gp",
        "random": "autocompress.search.samplers:uniform",
    },
)
"""How candidates are proposed; each entry is a function of ``SamplerSettings``."""

SUMMARIES = {
    AUTO: f"the default: {DEFAULT}",
    "nsga2": "genetic: crosses and mutates the best trade-offs so far",
    "nsga3": "genetic: the same, its survivors spread along reference directions",
    "tpe": "models which options the good plans have, all knobs together",
    "gp": f"a Gaussian process and expected hypervolume: slow, for at most {GP_KNOBS} knobs",
    "random": "uniform draws: what the others are compared with",
}


@dataclass(frozen=True)
class SamplerSettings:
    """What a sampler is made for.

    Attributes:
        seed: of its random choices.
        population: of a genetic sampler.
        objectives: how many the study has.
        knobs: how many leave a choice.
    """

    seed: int
    population: int
    objectives: int
    knobs: int


def resolved(name: str) -> str:
    """The entry that a name stands for: ``auto`` is the default.

    Raises:
        UsageError: for an unknown name; it lists the known ones.

    >>> resolved("auto")
    'nsga2'
    """
    if name == AUTO:
        return DEFAULT
    if name not in SAMPLERS:
        raise unknown_name(SAMPLERS.kind, name, (AUTO, *SAMPLERS))
    return name


def make_sampler(name: str, settings: SamplerSettings) -> BaseSampler:
    """The sampler of a name.

    Raises:
        UsageError: for an unknown name, or where the sampler does not suit the settings.
    """
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: BaseSampler = SAMPLERS.load(resolved(name))(settings)
    return sampler


def nsga2(settings: SamplerSettings) -> BaseSampler:
    """NSGA-II: ranks by dominance, then by distance to the neighbours on the front."""
    from optuna.samplers import NSGAIISampler

    return NSGAIISampler(seed=settings.seed, population_size=settings.population)


def nsga3(settings: SamplerSettings) -> BaseSampler:
    """NSGA-III: ranks by dominance, then by reference directions that few plans lie near."""
    from optuna.samplers import NSGAIIISampler

    return NSGAIIISampler(seed=settings.seed, population_size=settings.population)


def tpe(settings: SamplerSettings) -> BaseSampler:
    """Tree-structured Parzen estimators over all knobs together."""
    from optuna.samplers import TPESampler

    # One plan is evaluated at a time: there is no running trial for a liar to speak of.
    return TPESampler(seed=settings.seed, multivariate=True, constant_liar=False)


def gp(settings: SamplerSettings) -> BaseSampler:
    """A Gaussian process for each objective, and the expected gain in hypervolume.

    Raises:
        UsageError: for more than ``GP_KNOBS`` knobs.
    """
    from optuna.samplers import GPSampler

    if settings.knobs > GP_KNOBS:
        # Whoever names it is told, rather than given another sampler without a word or a search of a few trials.
        raise UsageError(
            f"sampler 'gp' is for at most {GP_KNOBS} knobs and this model has {settings.knobs}, where each trial would "
            f"take it seconds; choose another (see `autocompress list samplers`), or --freeze layers"
        )
    return GPSampler(seed=settings.seed, warn_independent_sampling=False)


def uniform(settings: SamplerSettings) -> BaseSampler:
    """Every option of every knob alike."""
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=settings.seed)
