"""The command line: reads what is asked, calls the library, shows what comes back."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import yaml
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from autocompress import cli_export, cli_hardware
from autocompress.cli_options import CHECKS_FAILED, INTERRUPTED, AsJson, interruptible
from autocompress.cli_options import console as _console
from autocompress.config import RunConfig, load_config
from autocompress.errors import AutocompressError, InfeasibleError, UsageError, unknown_name
from autocompress.version import __version__

if TYPE_CHECKING:
    from autocompress.front import LoadedFront, Preference


class _Commands(TyperGroup):
    """Turns the errors raised on purpose into one message and an exit code; anything else is a bug and shows itself."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AutocompressError as error:
            _say_error(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            _console(error=True).print("interrupted")
            ctx.exit(INTERRUPTED)


app = typer.Typer(
    cls=_Commands,
    name="autocompress",
    help="Turns a trained PyTorch model, some data and a target device into a Pareto front of compressed models that "
    "are exported, run in the target runtime and measured there.",
    epilog="A first run, in about four minutes: autocompress search --task digits --time-budget 2m",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The ``autocompress`` command."""
    # Worker threads that spin while they wait make training several times slower as soon as anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.warnoptions:
        # Libraries warn their developers; python -W default shows it.
        warnings.simplefilter("ignore")
    app(prog_name="autocompress")


def _version(given: bool) -> None:
    if given:
        typer.echo(f"autocompress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _flag(key: str, *names: str, metavar: str | None = None) -> Any:
    """A search option; its help is the description of the configuration key."""
    return typer.Option(
        *(names or (f"--{key.replace('_', '-')}",)), help=RunConfig.model_fields[key].description, metavar=metavar
    )


Run = Annotated[Path, typer.Argument(help="The run directory.", metavar="RUN", show_default=False)]


@app.command(
    epilog="Flags win over the file. Exit codes: 0 a front, 2 bad usage, 3 no feasible point, 130 interrupted."
)
def search(
    config_file: Annotated[
        Path | None,
        typer.Argument(help="A YAML file with any of the options below, as keys.", metavar="[CONFIG.yaml]"),
    ] = None,
    task: Annotated[str | None, _flag("task")] = None,
    model: Annotated[str | None, _flag("model")] = None,
    weights: Annotated[Path | None, _flag("weights", metavar="FILE")] = None,
    data: Annotated[Path | None, _flag("data", metavar="DIR")] = None,
    hardware: Annotated[str | None, _flag("hardware")] = None,
    runtime: Annotated[str | None, _flag("runtime")] = None,
    threads: Annotated[int | None, _flag("threads", metavar="N")] = None,
    batch: Annotated[int | None, _flag("batch", metavar="N")] = None,
    device: Annotated[str | None, _flag("device")] = None,
    space: Annotated[str | None, _flag("space")] = None,
    freeze: Annotated[list[str] | None, _flag("freeze", metavar="PATTERN")] = None,
    teacher: Annotated[str | None, _flag("teacher")] = None,
    max_latency_ms: Annotated[float | None, _flag("max_latency_ms", metavar="X")] = None,
    max_size_mb: Annotated[float | None, _flag("max_size_mb", metavar="X")] = None,
    max_memory_mb: Annotated[float | None, _flag("max_memory_mb", metavar="X")] = None,
    max_energy_mj: Annotated[float | None, _flag("max_energy_mj", metavar="X")] = None,
    max_macs: Annotated[str | None, _flag("max_macs", metavar="X")] = None,
    max_drop: Annotated[float | None, _flag("max_drop", metavar="POINTS")] = None,
    objectives: Annotated[str | None, _flag("objectives", metavar="A,B,C")] = None,
    time_budget: Annotated[str | None, _flag("time_budget", metavar="10m")] = None,
    trials: Annotated[int | None, _flag("trials", metavar="N")] = None,
    sampler: Annotated[str | None, _flag("sampler")] = None,
    seed: Annotated[int | None, _flag("seed", metavar="N")] = None,
    executor: Annotated[str | None, _flag("executor")] = None,
    storage: Annotated[str | None, _flag("storage", metavar="URL")] = None,
    out: Annotated[Path | None, _flag("out", metavar="DIR")] = None,
    resume: Annotated[bool, _flag("resume", "--resume")] = False,
    reuse: Annotated[Path | None, _flag("reuse", metavar="RUN")] = None,
    dry_run: Annotated[bool, _flag("dry_run", "--dry-run")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; print only the run directory.")] = False,
) -> None:
    """Search for compressed models and deliver a verified front of them.

    The model is pruned, quantized and distilled in one search. What comes out is exported to ONNX, run in the
    runtime and measured there; the run directory holds the models, front.json and report.html.

    \b
    autocompress search --task digits --time-budget 2m
    autocompress search --task fashion-mnist --model resnet20 --time-budget 15m --max-drop 1
    autocompress search --task my_module:my_task --max-latency-ms 4 --max-size-mb 5
    autocompress search --task digits --objectives latency_ms --max-drop 1     the fastest within a point
    autocompress search --out results/first --resume --time-budget 10m         ten more minutes for a finished run
    autocompress search --reuse results/first --max-size-mb 0.1 --time-budget 0s     other budgets, at once
    """
    given = {key: value for key, value in locals().items() if key in RunConfig.model_fields}
    config = load_config(config_file, {**given, "resume": resume or None, "dry_run": dry_run or None})
    from autocompress.terminal import showing_progress

    if config.dry_run:
        _dry_run(config, as_json=as_json, quiet=quiet)
        return
    from autocompress.front import load_front
    from autocompress.rundir import claim_run_directory, discard_unstarted

    config, directory = claim_run_directory(config)
    try:
        # A stop from outside (a scheduler, a closed session) is an interruption like Ctrl-C: the front is kept.
        with interruptible(signal.SIGTERM), showing_progress(quiet=quiet or as_json) as progress:
            # Reached here, not at the top: it brings torch in.
            from autocompress import api

            api.search(config, progress=progress)
    except KeyboardInterrupt:
        discard_unstarted(directory)
        _say_interrupted(directory)
        raise typer.Exit(INTERRUPTED) from None
    except InfeasibleError as error:
        if as_json:
            typer.echo(_infeasible_json(error))
        raise
    except AutocompressError:
        discard_unstarted(directory)
        raise
    front = load_front(directory)
    if as_json:
        typer.echo((directory / "front.json").read_text(encoding="utf-8"))
    elif quiet:
        typer.echo(str(directory))
    else:
        _show_front(front)
        _console().print(f"\nreport: {directory / 'report.html'}", highlight=False, soft_wrap=True)


def _dry_run(config: RunConfig, *, as_json: bool, quiet: bool) -> None:
    from autocompress.terminal import showing_progress

    with showing_progress(quiet=quiet or as_json) as progress:
        from autocompress import api

        facts: Mapping[str, Any] = api.dry_run(config, progress=progress)
    typer.echo(json.dumps(facts, indent=1) if as_json else yaml.safe_dump(dict(facts), sort_keys=False).rstrip())


@app.command()
def show(run: Run, as_json: AsJson = False) -> None:
    """Show the front of a run as a table."""
    from autocompress.front import load_front

    front = load_front(run)
    if as_json:
        typer.echo(front.front.model_dump_json(by_alias=True, indent=1))
    else:
        _show_front(front)


@app.command()
def pick(
    run: Run,
    max_latency_ms: Annotated[float | None, _flag("max_latency_ms", metavar="X")] = None,
    max_size_mb: Annotated[float | None, _flag("max_size_mb", metavar="X")] = None,
    max_memory_mb: Annotated[float | None, _flag("max_memory_mb", metavar="X")] = None,
    max_energy_mj: Annotated[float | None, _flag("max_energy_mj", metavar="X")] = None,
    max_macs: Annotated[str | None, _flag("max_macs", metavar="X")] = None,
    max_drop: Annotated[float | None, _flag("max_drop", metavar="POINTS")] = None,
    prefer: Annotated[
        str | None,
        typer.Option(
            "--prefer",
            metavar="WHAT",
            help="Among those that fit: quality, latency, size, balance, or knee (the best trade-off of all). "
            "Default: balance with --max-drop, else quality.",
        ),
    ] = None,
    copy_to: Annotated[
        Path | None, typer.Option("--copy-to", metavar="DIR", help="Copy the model's files to a new folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pick one model of a run: the best one that meets the budgets.

    With a budget, all models that the run delivered are looked at, also those that its own budgets or objectives kept
    off the front, as long as its .work folder is there. The run's budgets hold unless another one is given for the
    same thing.

    \b
    autocompress pick results/quickstart --max-latency-ms 0.2 --copy-to my-model
    """
    from autocompress.delivered import copy_model, delivered_points, why_not_on_the_front
    from autocompress.front import PREFERENCES, load_front
    from autocompress.report.describe import gains_text
    from autocompress.units import parse_count

    front = load_front(run)
    budgets: dict[str, Any] = {
        "max_latency_ms": max_latency_ms,
        "max_size_mb": max_size_mb,
        "max_memory_mb": max_memory_mb,
        "max_energy_mj": max_energy_mj,
        "max_drop": max_drop,
    }
    try:
        budgets["max_macs"] = None if max_macs is None else parse_count(max_macs)
    except ValueError as error:
        raise UsageError(f"--max-macs: {error}") from error
    if prefer is not None and prefer not in (*PREFERENCES, "knee"):
        raise unknown_name("--prefer value", prefer, (*PREFERENCES, "knee"))
    if prefer == "knee":
        if any(value is not None for value in budgets.values()):
            raise UsageError("--prefer knee looks at the whole front; leave the budgets out")
        point = front.knee()
    else:
        try:
            asked = any(value is not None for value in budgets.values())
            # What is off the front answers another question than the run was asked; without one, the front does.
            among = delivered_points(front) if asked else None
            point = front.best(**budgets, prefer=cast("Preference | None", prefer), among=among)
        except InfeasibleError as error:
            if as_json:
                typer.echo(_infeasible_json(error))
            raise
    path = point.path if copy_to is None else copy_model(point, copy_to)
    reason = why_not_on_the_front(front, point)
    if as_json:
        facts = {"path": str(path), "on_front": reason is None, "not_on_front_because": reason}
        typer.echo(json.dumps({**point.info.model_dump(mode="json"), **facts}, indent=1))
        return
    typer.echo(f"{point.id}: {gains_text(point)}, drop {point.drop:.2f} points")
    if reason is not None:
        typer.echo(f"delivered, but not on the run's front: {reason}")
    typer.echo(str(path / point.onnx_path.name))


@app.command()
def verify(
    path: Annotated[
        Path,
        typer.Argument(
            help="A run directory, the folder of an export, a model.onnx of either, or any other ONNX file.",
            metavar="RUN|DIR|MODEL.onnx",
        ),
    ],
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; print only what fails.")] = False,
) -> None:
    """Measure delivered models again and compare with what was written; exit code 1 where something differs.

    Of an ONNX file from elsewhere, it checks that it is valid and opens, and shows what is executed and how fast.
    """
    if not path.exists():
        raise UsageError(
            f"no such file or directory: {str(path)!r}; give a run directory, an export's folder or a model.onnx"
        )
    from autocompress.terminal import showing_progress

    with showing_progress(quiet=quiet or as_json) as progress:
        from autocompress import api

        checks = api.verify(path, progress=progress)
    if as_json:
        typer.echo(json.dumps([{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks], indent=1))
    else:
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        for check in checks:
            if not (quiet and check.ok):
                word = Text("ok", style="green") if check.ok else Text("FAILED", style="bold red")
                table.add_row(word, Text(check.name), Text(check.detail, style="dim"))
        if table.row_count:
            _console().print(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(CHECKS_FAILED)


app.command(epilog=cli_export.EXPORT_CODES)(cli_export.export)
app.command(epilog=cli_hardware.PROFILE_CODES)(cli_hardware.profile)
app.command()(cli_hardware.predict)


@app.command()
def report(run: Run) -> None:
    """Write report.html of a run anew: one page that needs nothing else. Works while the run goes on, too."""
    from autocompress.report.html import write_report

    typer.echo(str(write_report(run)))


@app.command("list")
def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            help="tasks, models, methods, samplers, hardware or spaces.", metavar="KIND", show_default=False
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List the names that can be given: tasks, models, methods, samplers, hardware or spaces."""
    if kind not in _LISTS:
        raise unknown_name("list", kind, _LISTS)
    names = _LISTS[kind]()
    if as_json:
        typer.echo(json.dumps(names, indent=1))
        return
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for name, description in names.items():
        table.add_row(Text(name, style="bold"), Text(description, style="dim"))
    _console().print(table)


# ------------------------------------------------------------------------------------------------------- what exists


def _tasks() -> dict[str, str]:
    from autocompress.tasks.registry import DEFAULT_MODELS, FALLBACK_MODEL, TASKS

    found = {name: f"built in; its model is {DEFAULT_MODELS.get(name, FALLBACK_MODEL)} by default" for name in TASKS}
    found["imagefolder:DIR"] = "a folder of images, one subfolder a class"
    found["module:function"] = "your own: a function that returns the model, loaders, metric and loss"
    return found


def _models() -> dict[str, str]:
    from autocompress.tasks.registry import MODELS

    found = dict.fromkeys(MODELS, "built in, for small images")
    found["NAME"] = "any torchvision classifier, e.g. resnet18, mobilenet_v2; classes and channels are adapted"
    found["module:function"] = "your own: a function that returns the module"
    return found


def _methods() -> dict[str, str]:
    from autocompress.methods.registry import METHODS, SUMMARIES

    return {name: SUMMARIES.get(name, f"from {METHODS[name]}") for name in METHODS}


def _samplers() -> dict[str, str]:
    from autocompress.search.samplers import AUTO, SAMPLERS, SUMMARIES

    return {name: SUMMARIES.get(name) or f"from {SAMPLERS[name]}" for name in (AUTO, *SAMPLERS)}


def _spaces() -> dict[str, str]:
    return _described("search_spaces")


def _described(folder: Any) -> dict[str, str]:
    from autocompress.config import read_yaml
    from autocompress.resources import resource_dir, resource_names

    names = resource_names(folder)
    return {name: str(read_yaml(resource_dir(folder) / f"{name}.yaml").get("description", "")) for name in names}


_LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "tasks": _tasks,
    "models": _models,
    "methods": _methods,
    "samplers": _samplers,
    "hardware": cli_hardware.describe_hardware,
    "spaces": _spaces,
}


# --------------------------------------------------------------------------------------------------------- helpers


def _show_front(front: LoadedFront) -> None:
    from autocompress.terminal import front_table

    console = _console()
    console.print(front_table(front, console.width))


def _say_error(error: AutocompressError) -> None:
    console = _console(error=True)
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    if isinstance(error, InfeasibleError) and error.nearest is not None:
        nearest = error.nearest
        latency = nearest.latency_ms.measured or nearest.latency_ms.predicted
        shown = "" if latency is None else f"{latency:.3g} ms, "
        console.print(
            f"nearest: {nearest.id}: validation {nearest.quality.validation:.4g}, {shown}{nearest.size_bytes} bytes",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _infeasible_json(error: InfeasibleError) -> str:
    nearest = None if error.nearest is None else error.nearest.model_dump(mode="json")
    return json.dumps({"error": str(error), "nearest": nearest}, indent=1)


def _say_interrupted(directory: Path) -> None:
    kept = (directory / "front.json").is_file()
    state = f"interrupted; the front so far is kept in {directory}" if kept else "interrupted before the first model"
    resume = f"\ngo on with: autocompress search --out {directory} --resume" if directory.is_dir() else ""
    _console(error=True).print(
        state + resume,
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
