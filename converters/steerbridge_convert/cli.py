"""`steerbridge convert` and `steerbridge formats`, found through the entry points of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from steerbridge.cli import common
from steerbridge.errors import DataError, Problem, SteerbridgeError
from steerbridge.evaluation import measure
from steerbridge.formats import formats as known_formats
from steerbridge.package import SteeringPackage, load
from steerbridge.tensors import Dtype
from steerbridge_convert import conversion


def convert(
    source: Annotated[Path, typer.Argument(help="File or directory to convert.")],
    target: Annotated[Path, typer.Argument(help="File or directory to write.")],
    to: Annotated[
        str, typer.Option(help="Target format; without it, .gguf is a package of one file.")
    ] = "",
    source_format: Annotated[
        str, typer.Option("--from", help="Source format, where the files do not tell.")
    ] = "",
    answers: Annotated[
        list[str],
        typer.Option("--set", help="NAME=VALUE that the files leave open (see `formats`)."),
    ] = [],
    base: Annotated[
        Path | None,
        typer.Option(help="The model it was made for: directory, GGUF file or steering package."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Weights of that model, where a format needs them.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Cut head matrices to this rank.", min=1)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or to the rank with this share of squared values.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Store tensors as F32, F16 or BF16.")] = "",
    allow_loss: Annotated[
        bool, typer.Option(help="Write although the target holds less; the report says what.")
    ] = False,
    data: Annotated[
        list[Path],
        typer.Option(help="Prompts on which to measure what a lower rank does, with --model."),
    ] = [],
    runtime: common.Runtime = "hf",
    json: common.Json = False,
) -> None:
    """Convert an artifact between formats; nothing is lost without being said."""
    if dtype not in ("", "F32", "F16", "BF16"):
        raise SteerbridgeError(f"--dtype: expected F32, F16 or BF16, found {dtype!r}")
    if data and model is None:
        raise SteerbridgeError("--data: measuring needs --model")
    known: dict[str, Any] = {
        "source_format": source_format or None,
        "answers": dict(_pair(text) for text in answers),
        "base": base,
        "model": model,
    }
    report = conversion.convert(
        source,
        target,
        to=to or None,
        rank=rank,
        energy=energy,
        dtype=cast(Dtype, dtype) if dtype else None,
        allow_loss=allow_loss,
        **known,
    )
    result = report.plain()
    if data:
        before, _ = conversion.read(source, **known)
        result["refused"] = _refused(before, load(target), str(model), runtime, data)
    if json:
        common.print_json(result)
        return
    print(f"{report.path}: {report.target}, from {report.source}")
    for loss in report.losses:
        print(f"lost       {loss}")
    for cut in report.truncations:
        print(f"rank       {cut.intervention}: {cut.rank}, relative error {cut.error:.4g}")
    if data:
        print(
            "refused    {before:.1%} of the harmful prompts before, {after:.1%} after".format(
                **result["refused"]
            )
        )


def _refused(
    before: SteeringPackage, after: SteeringPackage, model: str, runtime: str, data: list[Path]
) -> dict[str, float]:
    """Shares of the harmful prompts that are refused with either package."""
    loaded = common.open_model(model, runtime)
    prompts = [e for e in common.examples(data, "none") if e.harmful]
    if not prompts:
        raise DataError(Problem("--data", "harmful prompts", "none"))
    shares = {}
    for name, package in (("before", before), ("after", after)):
        rows = measure.run(loaded, package, prompts)
        shares[name] = 1 - measure.summary(rows)["asr_steered"]
    return shares


def formats(json: common.Json = False) -> None:
    """List the formats, and what each must be told."""
    found = known_formats()
    if json:
        common.print_json(
            {
                name: {
                    "title": f.title,
                    "asks": {a.name: a.help for a in f.asks},
                    "write_asks": {a.name: a.help for a in f.write_asks},
                }
                for name, f in found.items()
            }
        )
        return
    for name, format in found.items():
        print(f"{name:<18} {format.title}")
        for title, asks in (("reading", format.asks), ("writing", format.write_asks)):
            for ask in asks:
                print(f"{'':<18} {title}: --set {ask.name}=  {ask.help}")


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise SteerbridgeError(f"--set: expected NAME=VALUE, found {text!r}")
    return name, value
