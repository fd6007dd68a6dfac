"""`steerbridge serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import uvicorn

from steerbridge import command_line, registry
from steerbridge.errors import SteerbridgeError
from steerbridge.package import load
from steerbridge.runtime import model_path
from steerbridge.serving import EngineOpener
from steerbridge_serve.app import Limits, create_app
from steerbridge_serve.worker import Worker

# The guard of the first act of `make demo`, its head cut to rank 32 and stored as F16.
DEMO: Final = Path(__file__).with_name("demo.gguf")


def serve(
    package: Annotated[
        str, typer.Option("--package", "-p", help="Package that steers; none: a demo for smollm2.")
    ] = "",
    model: command_line.Model = "smollm2",
    runtime: command_line.Runtime = "llama.cpp",
    mmproj: command_line.Mmproj = "",
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer.", min=16)] = 4096,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: a free one.", min=0, max=65535)] = 8080,
    waiting: Annotated[int, typer.Option(help="Requests that may wait.", min=1)] = 64,
    max_body_mib: Annotated[int, typer.Option(help="Largest body, images included.", min=1)] = 8,
    max_pixels: Annotated[int, typer.Option(help="Largest image.", min=1)] = 16_000_000,
    allow_unsteered: Annotated[
        bool,
        typer.Option(help="Let chats ask for the answer without the package (`steering: false`)."),
    ] = False,
    ignore: command_line.Ignore = [],
) -> None:
    """Serve a steered model to clients of TGI and OpenAI, and a page to try it.

    If STEERBRIDGE_API_KEY is set in the environment, clients must send it as a bearer token.
    """
    if not package and model != "smollm2":
        raise SteerbridgeError(f"{model}: name the package made for it with --package")
    open_engine: EngineOpener = registry.runtime(runtime).load_engine()
    options: dict[str, Any] = {"mmproj": mmproj} if mmproj else {}
    engine = open_engine(
        model_path(model), load(package or DEMO), context=context, ignore=ignore, **options
    )
    limits = Limits(max_body_mib << 20, max_pixels)
    key = os.environ.get("STEERBRIDGE_API_KEY", "")
    worker = Worker(engine, waiting)
    app = create_app(worker, limits=limits, api_key=key, unsteered=allow_unsteered)
    uvicorn.run(app, host=host, port=port, log_level="info")
