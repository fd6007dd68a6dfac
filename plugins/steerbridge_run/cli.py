"""`steerbridge run` and `steerbridge doctor`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import command_line, gguf_model
from steerbridge.errors import SteerbridgeError
from steerbridge.fingerprint import check_template
from steerbridge.package import SteeringPackage, load
from steerbridge_run import preload, programs, supervisor, watchdog

UNREAD_SECONDS = 0.3  # until what a program said before its end is read
UNGUARDED = 78  # exit code: nothing was answered, because it would not have been guarded

Command = Annotated[list[str], typer.Argument(help="The program and its arguments, after --.")]
PackageOption = Annotated[str, typer.Option("--package", "-p", help="Package that steers.")]
Also = Annotated[
    list[Path],
    typer.Option(help="GGUF model that may run beside, unsteered (embeddings; drafts are found)."),
]


def run(
    command: Command,
    package: PackageOption,
    log: Annotated[
        str | None,
        typer.Option(help="File, or unix:PATH of a listening socket, for one JSON line an event."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Loopback port for Prometheus.", min=1, max=65535)
    ] = None,
    also: Also = [],
    ignore: command_line.Ignore = [],
) -> None:
    """Run an unmodified llama.cpp program with a package inside it.

    The program is refused before it starts where the package could not reach it; a model that
    the package was not made for ends it before its first token, and so does a process that opens
    a model without the guard. Exit code 78 then, and if no model was run.
    """
    loaded = load(package)
    programs.inspect(command[0])
    models = preload.named_models(command, os.environ)
    _check(loaded, models, ignore)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steerbridge-")))
        opened = stack.enter_context(supervisor.open_log(log)) if log else None
        metrics = supervisor.Metrics()
        if metrics_port is not None:
            metrics.serve(metrics_port)
        nonce = preload.new_nonce()
        listener = supervisor.Supervisor(folder / "events", opened, metrics, nonce)
        environment = preload.environment(
            loaded,
            loaded.save(folder / "package.gguf"),
            folder / "events",
            [*also, *models.drafts],
            os.environ,
            nonce=nonce,
            ignore=ignore,
        )
        watchdog.adopt()
        guard = watchdog.Watchdog(listener.answered, listener.attached, listener.stop)
        guard.start()
        code = supervisor.run(command, environment)
        guard.close()
        if not listener.is_active(UNREAD_SECONDS):
            watchdog.kill_all()  # what it left behind may still load a model
        listener.close()
    if listener.stopped:
        sys.exit(UNGUARDED)
    if not listener.active:
        supervisor.note("the program ended without running a model; nothing was steered")
        code = code or UNGUARDED
    sys.exit(code)


def _check(package: SteeringPackage, models: preload.Models, ignore: list[str]) -> None:
    """Raise ModelMismatch if the command line names a model, or a chat template, that the package
    was not made for."""
    base = package.spec.base_model
    if models.main is not None:
        facts = gguf_model.read_facts(models.main)
        package.check(gguf_model.in_words_of(base, facts), ignore)
    if "chat_template_sha256" not in ignore:
        check_template(base.chat_template_sha256, models.template)


def doctor(
    command: Command = [],
    package: PackageOption = "",
    also: Also = [],
    ignore: command_line.Ignore = [],
    json: command_line.Json = False,
) -> None:
    """Say what `run` finds, and why it would or would not work. Exit code 1 if not."""
    facts: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {
        "preload": lambda: str(preload.library()),
        "package": lambda: _describe(load(package)) if package else None,
        "program": lambda: _program(programs.inspect(command[0])) if command else None,
        "model": lambda: _model(command, package, ignore),
        "unsteered": lambda: [gguf_model.read_facts(path).name for path in also],
    }
    problems = []
    for name, look in steps.items():
        try:
            facts[name] = look()
        except (SteerbridgeError, FileNotFoundError) as error:
            facts[name] = None
            problems.append(f"{name}: {error}")
    facts["problems"] = problems
    if json:
        command_line.print_json(facts)
    else:
        for name, value in facts.items():
            if value:
                print(f"{name:10} {value}")
        print(_verdict(facts))
    if problems:
        sys.exit(1)


def _verdict(facts: dict[str, Any]) -> str:
    """The last line of a report."""
    if facts["problems"]:
        return "would not work"
    if facts["program"] and facts["program"]["loads_later"]:
        return (
            "would work, if it loads a llama.cpp that is a library of its own; otherwise `run` "
            "ends it when it opens a model (exit code 78)"
        )
    return "would work"


def _describe(package: SteeringPackage) -> dict[str, Any]:
    base = package.spec.base_model
    return {"name": package.spec.name, "base_model": base.name, "width": base.hidden_size}


def _program(program: programs.Program) -> dict[str, Any]:
    runs = program.runs
    libraries = [n for n in runs.libraries if n.startswith(("libllama", "libggml", "libmtmd"))]
    return {
        "path": str(program.path),
        "runs": str(runs.path),
        "libraries": libraries,
        "loads_later": not runs.names_llama,
    }


def _model(command: list[str], package: str, ignore: list[str]) -> dict[str, Any] | None:
    models = preload.named_models(command, os.environ)
    if package:
        _check(load(package), models, ignore)
    if models.main is None:
        return None
    facts = gguf_model.read_facts(models.main)
    steered = gguf_model.is_tried(facts.model_type or "")
    pictures = models.tower and gguf_model.describe_tower(models.tower)
    return {
        "path": str(models.main),
        "architecture": facts.model_type,
        "tried": "models of it were steered" if steered else "names fit, not run (docs/models.md)",
        "name": facts.name,
        **({"pictures": pictures} if pictures else {}),
    }
