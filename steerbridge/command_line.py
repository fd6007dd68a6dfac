"""What commands of the `steerbridge` program share: options, opening models, progress, JSON.

Commands of other packages use it too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import registry, runtime
from steerbridge.errors import UnsupportedFeature
from steerbridge.runtime import LoadedModel, Progress, TrainableModel, model_path

Package = Annotated[str, typer.Argument(help="Directory, .gguf file or hub id.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Directory, hub id, GGUF file, or `smollm2`.")
]
Runtime = Annotated[
    str,
    typer.Option(help="Runtime to open the model in (see `steerbridge --help` for extras)."),
]
Mmproj = Annotated[
    str, typer.Option(help="GGUF file of the vision tower (llama.cpp), for prompts with images.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
MaxNew = Annotated[int, typer.Option(help="Maximum number of tokens per answer.", min=1)]
Ignore = Annotated[
    list[str],
    typer.Option(
        "--ignore", help="Field of the base model that may differ, such as chat_template_sha256."
    ),
]
Fpr = Annotated[
    float, typer.Option(help="Largest share of harmless prompts that may fire.", min=0, max=0.5)
]
BorderlineFpr = Annotated[
    float,
    typer.Option(help="The same for harmless prompts that sound or look harmful.", min=0, max=0.5),
]


def targets(fpr: float, borderline_fpr: float) -> dict[str, float]:
    """False-positive targets by kind: `borderline` sounds harmful, `pair` mirrors what is."""
    return {"*": fpr, "borderline": borderline_fpr, "pair": borderline_fpr}


def open_model(name: str, runtime_name: str, mmproj: str = "", **options: Any) -> LoadedModel:
    """Open a model; `mmproj` is the GGUF file of its vision tower (llama.cpp).

    Raises:
        SteerbridgeError: no such runtime.
        RuntimeMissing: the runtime's extra is not installed.
        UnsupportedFeature: an option that the runtime does not know.
    """
    registry.runtime(runtime_name).load()  # a missing extra is the only line that is printed
    say(f"opening {name} in {runtime_name}")
    if mmproj:
        options["mmproj"] = mmproj
    return runtime.open_model(runtime_name, name, **options)


def identity(name: str, runtime_name: str, mmproj: str, loaded: LoadedModel) -> str:
    """Names the model that answers, for kept answers: a changed file is another model."""
    paths = [Path(model_path(name)), *([Path(mmproj)] if mmproj else [])]
    stamps = []
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stamps += [
            f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
            for file in files
            if file.is_file()
        ]
    return "|".join([runtime_name, name, loaded.quantisation, *stamps])


def say(text: str) -> None:
    """Print one line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def progress() -> Progress:
    """A bar for each step of a job on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        return runtime.silent
    return _bar


def _bar(step: str, done: int, total: int, width: int = 30) -> None:
    filled = width * done // total if total else 0
    shown = f"{'#' * filled:<{width}} {done}/{total}" if total else str(done)
    end = "\n" if total and done >= total else ""
    print(f"\r{step:<16} {shown}", end=end, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The machine's answer: one object on one line."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def trainable(model: LoadedModel) -> TrainableModel:
    """The model if it can be trained on.

    Raises:
        UnsupportedFeature: its runtime cannot train.
    """
    if not isinstance(model, TrainableModel):
        raise UnsupportedFeature(model.runtime, "this runtime cannot train")
    return model
