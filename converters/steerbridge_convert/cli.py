"""The commands `steerbridge convert` and `steerbridge formats`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from steerbridge import command_line
from steerbridge.conversion import ConversionReport
from steerbridge.data import Example
from steerbridge.datasets import options as prompt_options
from steerbridge.errors import DataError, Problem, SteerbridgeError
from steerbridge.evaluation import measure
from steerbridge.format import formats as installed_formats
from steerbridge.package import SteeringPackage, load
from steerbridge.tensors import Dtype
from steerbridge_convert import conversion
from steerbridge_convert.scope import LIKES


def convert(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE... TARGET",
            help="File or directory to convert (several with --combine), and the one to write.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Target format (default: steering package; one file if TARGET ends in .gguf)."
        ),
    ] = "",
    source_format: Annotated[
        str, typer.Option("--from", help="Source format (default: detected from the files).")
    ] = "",
    answers: Annotated[
        list[str],
        typer.Option(
            "--set",
            help="NAME=VALUE of an option (see `steerbridge formats`); with --combine, "
            "2:NAME=VALUE is of the second source.",
        ),
    ] = [],
    combine: Annotated[
        bool, typer.Option(help="Several sources into one: each acts as it would alone.")
    ] = False,
    like: Annotated[
        str,
        typer.Option(help="Vectors act as in a tool's example: " + ", ".join(LIKES) + "."),
    ] = "",
    base: Annotated[
        Path | None,
        typer.Option(help="The model it was made for: directory, GGUF file or steering package."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Weights of that model, if a format needs them.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Reduce head matrices to this rank.", min=1)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Reduce head matrices to this share of squared singular values."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Storage type of tensors: F32, F16 or BF16.")] = "",
    allow_loss: Annotated[
        bool,
        typer.Option(
            help="Write even if the target cannot represent everything; losses are listed."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace what Steerbridge wrote to TARGET; other files stay.")
    ] = False,
    data: Annotated[
        list[Path],
        typer.Option(help="Prompts for comparing refusals before and after; needs --model."),
    ] = [],
    label: prompt_options.Label = [],
    map: prompt_options.Map = [],
    runtime: command_line.Runtime = "hf",
    json: command_line.Json = False,
) -> None:
    """Convert an artifact between formats; every loss is reported."""
    *sources, target = paths
    if len(sources) != 1 and not (combine and sources):
        want = "SOURCE and TARGET, or several sources and --combine"
        raise SteerbridgeError(f"expected {want}, found {len(paths)} paths")
    if data and combine:
        raise SteerbridgeError("--data compares one source with what it becomes")
    if dtype not in ("", "F32", "F16", "BF16"):
        raise SteerbridgeError(f"--dtype: expected F32, F16 or BF16, found {dtype!r}")
    if data and model is None:
        raise SteerbridgeError("--data needs --model")
    prompts = prompt_options.Prompts(data, label, map).read("to compare on") if data else []
    prompts = [e for e in prompts if e.harmful]
    if data and not prompts:
        raise DataError(Problem("--data", "harmful prompts", "none"))
    origin: dict[str, Any] = {
        "source_format": source_format or None,
        "answers": dict(_pair(text) for text in answers) | ({"like": like} if like else {}),
        "base": base,
        "model": model,
    }
    report = conversion.convert(
        sources,
        target,
        to=to or None,
        rank=rank,
        energy=energy,
        dtype=cast(Dtype, dtype) if dtype else None,
        allow_loss=allow_loss,
        overwrite=overwrite,
        **origin,
    )
    refused: dict[str, float] = {}
    if prompts:
        before, _ = conversion.read(sources[0], **origin)
        refused = _refused(before, load(target), str(model), runtime, prompts)
    if json:
        command_line.print_json(report.to_json() | ({"refused": refused} if refused else {}))
    else:
        _print(report, refused)


def _print(report: ConversionReport, refused: dict[str, float]) -> None:
    print(f"{report.path}: {report.target}, from {report.source}")
    for act in report.acts:
        print(f"acts       {act}")
    for loss in report.losses:
        print(f"lost       {loss}")
    for cut in report.truncations:
        print(f"rank       {cut.intervention}: {cut.rank}, relative error {cut.error:.4g}")
    if refused:
        print(
            f"refused    {refused['before']:.1%} of harmful prompts before, "
            f"{refused['after']:.1%} after"
        )


def _refused(
    before: SteeringPackage,
    after: SteeringPackage,
    model: str,
    runtime: str,
    prompts: list[Example],
) -> dict[str, float]:
    """The refused share of harmful prompts with each package."""
    loaded = command_line.open_model(model, runtime)
    shares = {}
    for name, package in (("before", before), ("after", after)):
        rows = measure.run(loaded, package, prompts)
        shares[name] = 1 - measure.summary(rows)["asr_guard_steered"]
    return shares


def formats(json: command_line.Json = False) -> None:
    """List the formats and the options of each."""
    installed = installed_formats()
    if json:
        command_line.print_json(
            {
                name: {
                    "title": format.title,
                    "options": {o.name: o.help for o in format.options},
                    "write_options": {o.name: o.help for o in format.write_options},
                }
                for name, format in installed.items()
            }
        )
        return
    for name, format in installed.items():
        print(f"{name:<18} {format.title}")
        for title, options in (("reading", format.options), ("writing", format.write_options)):
            for option in options:
                print(f"{'':<18} {title}: --set {option.name}=  {option.help}")


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise SteerbridgeError(f"--set: expected NAME=VALUE, found {text!r}")
    return name, value
