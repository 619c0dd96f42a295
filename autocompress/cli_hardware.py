"""The commands about devices: measuring this machine, and predicting what a model costs on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autocompress.cli_options import CHECKS_FAILED, AsJson, console
from autocompress.errors import UsageError

PROFILE_CODES = "Exit codes: 0 done, 1 --check found faults, 2 bad usage, 130 interrupted, what was there is kept."

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def profile(
    runtime: Annotated[str, typer.Option("--runtime", help="The runtime whose kernels are timed.")] = "onnxruntime",
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="Threads of one run.")] = 1,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Samples of one run.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the profile there too, to take it elsewhere.")
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again, though this machine is known.")] = False,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="FILE", help="Say what is wrong with a profile; measure nothing.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="Rescale the profile of --hardware to your own measurements of a few models, and write it to --out.",
        ),
    ] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", metavar="NAME", help="What --calibrate starts from.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a profile.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine, so that searches and predictions know what every kernel costs on it.

    A few dozen small models are timed whole and kernel by kernel, for under a minute; the result is kept for this
    processor, runtime version, threads and batch, and is what --hardware local means.

    \b
    autocompress profile --threads 2
    autocompress profile --refresh --out my-laptop.yaml
    autocompress profile --check my-laptop.yaml
    autocompress profile --calibrate measured.yaml --hardware raspberry-pi-5 --out my-pi.yaml
    """
    from autocompress.terminal import showing_progress

    _one_of(schema=schema, check=check is not None, calibrate=calibrate is not None)
    if schema:
        from autocompress.hardware.profile_check import profile_schema

        typer.echo(json.dumps(profile_schema(), indent=1))
        return
    if check is not None:
        _check(check, as_json=as_json)
        return
    if calibrate is None and hardware is not None:
        raise UsageError("--hardware says what --calibrate starts from; without it, 'profile' measures this machine")
    with showing_progress(quiet=quiet or as_json) as progress:
        from autocompress import api

        if calibrate is not None:
            if hardware is None or out is None:
                raise UsageError("--calibrate needs --hardware NAME to start from and --out FILE to write to")
            made = api.calibrate(calibrate, hardware, out=out, threads=threads, batch=batch)
        else:
            made = api.profile(
                runtime=runtime, threads=threads, batch=batch, out=out, refresh=refresh, progress=progress
            )
    if as_json:
        typer.echo(made.model_dump_json(indent=1))
        return
    from autocompress.hardware.profile import local_path
    from autocompress.terminal_hardware import profile_view

    console().print(profile_view(made))
    where = out if out is not None else local_path(made.runtime, made.runtime_version, made.threads, made.batch)
    console().print(f"\nstored: {where}", highlight=False, soft_wrap=True)


def predict(
    model: Annotated[
        Path,
        typer.Argument(
            help="Any ONNX file, or a delivered point: RUN/models/ID or its plan.json.",
            metavar="MODEL.onnx|PLAN",
            show_default=False,
        ),
    ],
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="NAME", help="local, a name of 'list hardware', or a profile's YAML.")
    ] = "local",
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", help="Threads of one run; the profile's by default.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="N", help="Samples of one run; the profile's by default.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="What runs the model; the profile's by default.")
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", metavar="NAME=N", help="The size of an axis the ONNX file leaves open."),
    ] = None,
    top: Annotated[int, typer.Option("--top", metavar="N", min=0, help="Slowest kernels shown.")] = 15,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Predict what a model costs on a device: latency with its error band, size, memory, multiply-accumulates, energy.

    Nothing is measured but the device itself, once. A kernel that the device's profile has never seen is named and
    widens the band; it is never free.

    \b
    autocompress predict model.onnx
    autocompress predict bert.onnx --dim sequence=128 --top 30
    autocompress predict results/quickstart/models/p0001 --hardware raspberry-pi-5
    """
    from autocompress.terminal import showing_progress

    with showing_progress(quiet=quiet or as_json) as progress:
        from autocompress import api

        prediction = api.predict_in_detail(
            model, hardware, threads=threads, batch=batch, runtime=runtime, dims=_sizes(dim or []), progress=progress
        )
    if as_json:
        typer.echo(prediction.estimate.model_dump_json(indent=1))
        return
    from autocompress.terminal_hardware import prediction_view

    console().print(prediction_view(model, prediction, top))


def _check(path: Path, *, as_json: bool) -> None:
    """Shows what was found; exit code 2 where there is no such file, 1 where something keeps it from being used."""
    from autocompress.hardware.profile_check import check_profile

    if not path.is_file():
        raise UsageError(f"--check: no such file: {str(path)!r}")
    checks = check_profile(path)
    if as_json:
        typer.echo(json.dumps([check.model_dump(mode="json") for check in checks], indent=1))
    else:
        from autocompress.terminal_hardware import checks_view

        console().print(checks_view(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(CHECKS_FAILED)


def describe_hardware() -> dict[str, str]:
    """What ``list hardware`` shows: every device that can be named, and how far its figures can be trusted."""
    from autocompress.hardware.cached import cached_profiles
    from autocompress.hardware.profile import LOCAL, HardwareProfile
    from autocompress.resources import resource_dir, resource_names
    from autocompress.terminal_hardware import target_text, trust_text

    cached = [f"{target_text(p)}, {trust_text(p)}" for p in cached_profiles()]
    known = f"; measured: {'; '.join(cached)}" if cached else "; not measured yet"
    found = {LOCAL: f"this machine, measured on first use and kept{known}"}
    for name in resource_names("hardware_profiles"):
        shipped, _ = HardwareProfile.read(resource_dir("hardware_profiles") / f"{name}.yaml")
        found[name] = f"{shipped.description}; {target_text(shipped)}; {trust_text(shipped)}"
    return found


def _sizes(given: list[str]) -> dict[str, int]:
    sizes = {}
    for text in given:
        name, _, size = text.rpartition("=")
        if not name or not size.isdecimal():
            raise UsageError(f"--dim {text!r}: write the axis and its size, e.g. --dim sequence=128")
        sizes[name] = int(size)
    return sizes


def _one_of(**given: bool) -> None:
    names = [f"--{name}" for name, here in given.items() if here]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} do different things; give one of them")
