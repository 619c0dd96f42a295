"""The Python API: what the command line calls, and what a program may."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autocompress.config import RunConfig, load_config
from autocompress.errors import InfeasibleError, UsageError
from autocompress.exporting.handle import ExportedModel, load_export
from autocompress.exporting.metrics import ARTIFACT, METRICS, is_export
from autocompress.front import LoadedFront, load_front, load_point
from autocompress.progress import Progress, SilentProgress
from autocompress.rundir import open_run_directory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from autocompress.hardware.predict import Prediction
    from autocompress.hardware.profile import HardwareProfile
    from autocompress.plan import Estimate
    from autocompress.verification import Check

__all__ = [
    "calibrate",
    "export",
    "load_export",
    "load_front",
    "load_point",
    "predict",
    "profile",
    "report",
    "search",
    "verify",
]

logger = logging.getLogger(__name__)

RUNTIME = "onnxruntime"


def search(config: RunConfig | None = None, *, progress: Progress | None = None, **options: Any) -> LoadedFront:
    """Searches for compressed models and delivers a front.

    Args:
        config: a whole configuration, or else
        options: its fields by keyword; see :class:`autocompress.config.RunConfig`.
        progress: told what happens; silent by default.

    Returns:
        The front, its files in the run directory (``front.path``).

    Raises:
        UsageError: something was asked for that is not possible as written.
        InfeasibleError: no compressed model keeps the budgets.

    >>> front = search(task="digits", time_budget="2m", out="results/digits")  # doctest: +SKIP
    >>> front.best(max_drop=1.0).session()  # doctest: +SKIP
    """
    if config is None:
        lent = options.get("reuse") is not None
        config = load_config(flags=options, name_flag=False) if lent else RunConfig.create(**options)
    elif options:
        raise UsageError("give search either a RunConfig or keywords, not both")
    progress = progress or SilentProgress()
    from autocompress.search.legs import next_leg, read_leg

    leg = next_leg(config.out, config)
    if leg is None:
        assert config.out is not None
        return _finished_front(config.out)
    from autocompress.devices import resolve_device
    from autocompress.search import reuse
    from autocompress.search.engine import Engine
    from autocompress.search.files import Clock
    from autocompress.search.prepared import prepare
    from autocompress.search.records import log_to, write_environment, write_manifest

    prepared = prepare(config, progress)
    source = config.reuse
    if config.out is not None and config.resume and read_leg(config.out) is not None:
        source = None  # taken up already
    if source is not None:
        reuse.check_reusable(config, source, prepared.identity)
    config = leg.configured(config)
    run, resumed = open_run_directory(config)
    if source is None:
        leg.write(run)
    else:
        progress.stage(f"take up {source}")
        leg = reuse.take_up(source, run, leg.budget_s)
    prepared.identity.write(run)
    clock = Clock(run / ".work" / "spent.json", leg.budget_s, leg.began_s, leg.number)
    with log_to(run / "log.jsonl"):
        logger.info("%s %s", "resumed" if resumed else "started", run)
        write_environment(run, resolve_device(config.device, repeatable=config.time_budget is None))
        profile = prepared.profile
        stored = run / "profile.yaml"
        if stored.is_file():
            profile = type(profile).load(stored)
        else:
            profile.save(stored)
        engine = Engine(config, prepared.space, prepared.task, prepared.teacher, profile, run, clock, progress)
        try:
            engine.execute()
        except UsageError:
            # Found wrong only once the model was read (a pattern, say): what was set up is no run to go on with.
            if not resumed and not (run / "front.json").is_file():
                shutil.rmtree(run)
            raise
        finally:
            if (run / "front.json").is_file():
                write_manifest(run)
                report(run)
    return load_front(run)


def _finished_front(run: Path) -> LoadedFront:
    """The front of a run that ended; where it ended without one, that is said again."""
    front = load_front(run)
    if not front.points and not front.front.constraints:
        raise InfeasibleError(
            f"the run in {str(run)!r} ended without a compressed model; its rejected.csv and log.jsonl say what failed"
        )
    if not front.points:
        limits = ", ".join(f"{name} <= {limit:g}" for name, limit in front.front.constraints.items())
        raise InfeasibleError(
            f"the run in {str(run)!r} ended without a model that keeps its budgets ({limits}); its rejected.csv says "
            "how far each model is; raise the budgets and choose another --out"
        )
    return front


def dry_run(config: RunConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """What a search would choose from and what the corners of its space are predicted to cost; nothing is written."""
    from autocompress.search.prepared import prepare
    from autocompress.search.preview import preview

    prepared = prepare(config, progress or SilentProgress())
    return preview(config, prepared.space, prepared.task, prepared.profile)


def report(run: str | Path) -> Path:
    """Writes ``report.html`` of a run, complete or still going, and returns its path."""
    from autocompress.report.html import write_report

    return write_report(Path(run))


def export(
    model: nn.Module | str,
    *,
    calibration: object = None,
    test: object = None,
    task: str | None = None,
    weights: str | Path | None = None,
    data: str | Path | None = None,
    compute: str | None = None,
    weight_bits: int | None = None,
    block: int = 128,
    layers: Sequence[str] = (),
    plan: str | Path | None = None,
    freeze: Sequence[str] = (),
    calibration_samples: int = 128,
    ranges: str = "auto",
    equalize: Literal["auto", "on", "off"] = "auto",
    bias_correction: bool = True,
    threads: int = 1,
    seed: int = 0,
    archive: bool = False,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> ExportedModel:
    """Exports one model to a small and fast ONNX file, without any search, and measures it beside the original.

    Args:
        model: a trained module, which stays as it is; or a model's name; or ``module:function``.
        calibration: of a module, real inputs: a tensor ``[N, ...]``, a dict of them by argument, or a DataLoader.
        test: of a module, inputs with targets, where its accuracy is wanted.
        task: of a name, the task it is for; ``digits`` by default.
        weights: of a name or function, the checkpoint to load.
        data: likewise, the data set's directory.
        compute: what layers compute in; ``int8`` by default.
        weight_bits: bits that weights are stored in; the largest that ``compute`` takes by default.
        block: weights that share a scale under ``weight_only``.
        layers: ``PATTERN=COMPUTE[:BITS]`` for some layers; a later one wins.
        plan: a delivered model's folder or ``plan.json``, in place of ``compute``.
        freeze: patterns of layers that stay float32.
        calibration_samples: inputs that ranges are chosen on.
        ranges: how: ``auto``, ``minmax``, ``percentile``, ``mse`` or ``entropy``.
        equalize: whether scales are moved between layers first: ``auto``, ``on`` or ``off``.
        bias_correction: whether biases make up for the mean error of rounded weights.
        threads: of the timed runs.
        seed: of every sampling.
        archive: whether ``model.acz``, an entropy-coded copy for storage, is written too.
        out: a new or empty folder; ``results/<model>-<compute>-<n>`` by default.
        progress: told what happens; silent by default.

    Returns:
        The export; its folder is ``.path``, ``.session()`` runs it, ``.load()`` gives it in torch.

    Raises:
        UsageError: something was asked for that is not possible as written.
        ArtifactError: the runtime executes the file otherwise than planned.

    >>> autocompress.export(net, calibration=images, out="small").metrics.speedup  # doctest: +SKIP
    """
    from autocompress.exporting.folder import check_free
    from autocompress.exporting.options import ExportOptions
    from autocompress.hardware.profile import LOCAL, refuse_threads

    options = ExportOptions(
        compute=compute,
        weight_bits=weight_bits,
        block=block,
        layers=tuple(layers),
        plan=None if plan is None else Path(plan),
        freeze=tuple(freeze),
        calibration_samples=calibration_samples,
        ranges=ranges,
        equalize=equalize,
        bias_correction=bias_correction,
        threads=threads,
        seed=seed,
        archive=archive,
    )
    refuse_threads(threads, LOCAL)
    folder = None if out is None else Path(out)
    check_free(folder)
    progress = progress or SilentProgress()
    progress.stage("load the model")
    from autocompress.exporting.deliver import export_subject
    from autocompress.exporting.subject import load_subject, make_subject, origin_of

    if isinstance(model, str):
        if calibration is not None or test is not None:
            raise UsageError(f"model {model!r} brings its own data: leave out calibration and test, or give the module")
        subject = load_subject(origin_of(model, task, weights, data), calibration_samples, seed, progress)
    else:
        if (task, weights, data) != (None, None, None):
            raise UsageError("a module comes with its weights: leave out task, weights and data, and give calibration")
        subject = make_subject(model, calibration, test, calibration_samples)
    return export_subject(subject, options, folder, progress)


def verify(path: str | Path, *, progress: Progress | None = None) -> list[Check]:
    """Measures a run, an export or any ONNX file again, from outside.

    Args:
        path: a run's directory, ``RUN/models/ID/model.onnx``, an export's folder or the ``model.onnx`` in it; of any
            other ONNX file, what holds for every file is checked.
        progress: told how far it is.
    """
    from autocompress.exporting.verify import verify_export, verify_file
    from autocompress.verification import is_of_run, verify_path

    given, progress = Path(path), progress or SilentProgress()
    folder = given if given.is_dir() else given.parent
    if is_export(folder) and (given.is_dir() or given.name in (ARTIFACT, METRICS)):
        return verify_export(folder, progress)
    if given.is_file() and not is_of_run(given):
        return verify_file(given, progress)
    if given.is_dir() and not any((given / name).is_file() for name in ("front.json", "config.yaml")):
        raise UsageError(
            f"{str(given)!r} is neither a run directory (it has no front.json) nor an export (no metrics.json of one); "
            "give one of them, or an ONNX file"
        )
    from autocompress.search.prepared import task_of

    return verify_path(given, lambda config: task_of(config, progress), progress)


def profile(
    *,
    runtime: str = RUNTIME,
    threads: int = 1,
    batch: int = 1,
    out: str | Path | None = None,
    refresh: bool = False,
    progress: Progress | None = None,
) -> HardwareProfile:
    """The profile of this machine, measured where it is not known yet and kept in the cache.

    Args:
        runtime: whose kernels are timed.
        threads: threads of one run; no more than the machine has cores.
        batch: samples of one run.
        out: a YAML file to write it to as well, in a folder that exists.
        refresh: measure again; the old profile stays until the new one is complete.
        progress: told how far the measuring is.

    >>> autocompress.profile(threads=2, out="my-laptop.yaml").holdout  # doctest: +SKIP
    """
    from autocompress.hardware.profile import LOCAL, refuse_threads
    from autocompress.runtime.base import load_runtime

    load_runtime(runtime)
    refuse_threads(threads, LOCAL)
    if out is not None:
        _check_target(Path(out))
    from autocompress.hardware.measure import local_profile

    made = local_profile(threads, batch, refresh=refresh, progress=progress, runtime=runtime)
    if out is not None:
        made.save(Path(out))
    return made


def calibrate(
    measurements: str | Path,
    hardware: str | Path,
    *,
    out: str | Path | None = None,
    threads: int | None = None,
    batch: int | None = None,
) -> HardwareProfile:
    """The analytic profile of a device, rescaled to what you measured on it.

    Args:
        measurements: a YAML list of ``{model: FILE.onnx, latency_ms: X}``, two at least; paths are from its folder.
        hardware: the profile to start from: a shipped name or a YAML file.
        out: a YAML file to write the new profile to, in a folder that exists.
        threads: threads of the measured runs; the profile's by default.
        batch: samples of the measured runs; likewise.
    """
    from autocompress.hardware.analytic_calibration import calibrate_profile, read_measurements
    from autocompress.hardware.predict import predict_onnx
    from autocompress.hardware.profile import load_hardware

    if out is not None:
        _check_target(Path(out))
    found = read_measurements(Path(measurements))
    made = calibrate_profile(load_hardware(hardware, threads, batch), found, predict_onnx)
    if out is not None:
        made.save(Path(out))
    return made


def predict(
    model: str | Path,
    hardware: str | Path = "local",
    *,
    threads: int | None = None,
    batch: int | None = None,
    runtime: str | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """What a model is predicted to cost on a device; the model is not measured.

    Args:
        model: an ONNX file, or a delivered point: ``RUN/models/ID`` or the ``plan.json`` in it.
        hardware: ``local``, a name of ``autocompress list hardware``, or a profile's YAML file.
        threads: threads of one run; the profile's by default.
        batch: samples of one run; likewise.
        runtime: what runs the model; likewise, ``onnxruntime`` for ``local``.
        dims: sizes of axes that an ONNX file leaves open, by name; an open first axis takes the batch.
        progress: told how far the measuring of this machine is, where it is not known yet.

    >>> autocompress.predict("model.onnx").costs["latency_ms"]  # doctest: +SKIP
    """
    return predict_in_detail(
        model, hardware, threads=threads, batch=batch, runtime=runtime, dims=dims, progress=progress
    ).estimate


def predict_in_detail(
    model: str | Path,
    hardware: str | Path = "local",
    *,
    threads: int | None = None,
    batch: int | None = None,
    runtime: str | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Prediction:
    """As :func:`predict`, with the class and the time of each kernel."""
    from autocompress.hardware.predict import check_path, predict_path
    from autocompress.hardware.profile import load_hardware

    path = Path(model)
    check_path(path)
    device = load_hardware(hardware, threads, batch, runtime, progress=progress)
    return predict_path(path, device, dims=dims)


def _check_target(path: Path) -> None:
    """What would only fail after a minute of measuring is found before it."""
    if path.is_dir():
        raise UsageError(f"--out: {str(path)!r} is a folder; give a file in it, such as {str(path / 'profile.yaml')!r}")
    if not path.parent.is_dir():
        raise UsageError(f"--out: there is no folder {str(path.parent)!r}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--out: cannot write to {str(path.parent)!r}; choose another folder")
