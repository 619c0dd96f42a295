"""The command that exports one model without a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from autocompress.cli_options import AsJson, console

EXPORT_CODES = (
    "Exit codes: 0 exported, 1 the runtime does not execute the file as planned, 2 bad usage, 130 interrupted. "
    "Except for 0 nothing is left behind."
)


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's name, or your own module:function, which returns {'model': module, 'calibration': loader}.",
            metavar="MODEL",
            show_default=False,
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option("--task", help="The task whose data MODEL is for; 'digits' by default. See 'list tasks'."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="The model's checkpoint: .safetensors or .pt.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Where the data set is, or what your function is given."),
    ] = None,
    compute: Annotated[
        str | None,
        typer.Option(
            "--compute",
            metavar="TYPE",
            help="What layers compute in: int8 (default), fp32, fp16, int8_dynamic or weight_only.",
        ),
    ] = None,
    weight_bits: Annotated[
        int | None,
        typer.Option("--weight-bits", metavar="N", help="Bits that weights are stored in; 8 under int8 by default."),
    ] = None,
    block: Annotated[
        int, typer.Option("--block", metavar="N", help="Weights that share a scale under weight_only.")
    ] = 128,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer",
            metavar="PATTERN=TYPE[:BITS]",
            help="Another type for some layers: a name, a glob or re:EXPRESSION. Repeatable; a later one wins.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Take each layer's type from RUN/models/ID or a plan.json."),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            "--freeze", metavar="PATTERN", help="Layers that stay float32, whatever else is said. Repeatable."
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option("--calibration-samples", metavar="N", help="Inputs that ranges are chosen on.")
    ] = 128,
    ranges: Annotated[
        str, typer.Option("--ranges", help="How they are chosen: auto, minmax, percentile, mse or entropy.")
    ] = "auto",
    equalize: Annotated[
        str, typer.Option("--equalize", help="Move scales between layers first where it helps: auto, on or off.")
    ] = "auto",
    no_bias_correction: Annotated[bool, typer.Option("--no-bias-correction", help="Leave biases as they are.")] = False,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="Threads of the timed runs.")] = 1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of every sampling.")] = 0,
    archive: Annotated[
        bool, typer.Option("--archive", help="Write model.acz too: the file, entropy-coded for storage.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="A new folder; results/<model>-<compute>-<n> by default."),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; print only the folder.")] = False,
) -> None:
    """Export one model to ONNX, small and fast, without any search.

    The model is calibrated, exported and opened in the runtime; what the runtime executes is compared with what was
    asked for, and size, latency and outputs with those of the fp32 original.

    \b
    autocompress export resnet20 --task fashion-mnist --compute int8
    autocompress export my_module:my_model --layer 'head.*=fp32' --freeze conv1
    """
    from autocompress.terminal import showing_progress

    with showing_progress(quiet=quiet or as_json) as progress:
        from autocompress import api

        made = api.export(
            model,
            task=task,
            weights=weights,
            data=data,
            compute=compute,
            weight_bits=weight_bits,
            block=block,
            layers=layer or (),
            plan=plan,
            freeze=freeze or (),
            calibration_samples=calibration_samples,
            ranges=ranges,
            equalize=cast("Literal['auto', 'on', 'off']", equalize),
            bias_correction=not no_bias_correction,
            threads=threads,
            seed=seed,
            archive=archive,
            out=out,
            progress=progress,
        )
    if as_json:
        facts = {"path": str(made.path), **made.metrics.model_dump(mode="json", by_alias=True)}
        typer.echo(json.dumps(facts, indent=1))
    elif quiet:
        typer.echo(str(made.path))
    else:
        from autocompress.terminal_export import export_view

        console().print(export_view(made.metrics))
        console().print(f"\nexported: {made.onnx_path}", highlight=False, soft_wrap=True)
