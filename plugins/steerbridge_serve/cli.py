"""`steerbridge serve`."""

from __future__ import annotations

import ipaddress
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import typer
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from steerbridge import command_line, registry
from steerbridge.errors import SteerbridgeError
from steerbridge.package import load
from steerbridge.runtime import model_path
from steerbridge.serving import EngineOpener
from steerbridge_serve.admission import Limits
from steerbridge_serve.app import create_app
from steerbridge_serve.service import Settings
from steerbridge_serve.worker import Worker

# The guard of the first act of `make demo`, its head cut to rank 32 and stored as F16.
DEMO: Final = Path(__file__).with_name("demo.gguf")
HEAD_SECONDS: Final = 15
END_SECONDS: Final = 5


CONNECTIONS: Final = 512  # of one address, those of a proxy in front included


class Impatient(H11Protocol):
    """Closes a connection on which no request came in time, which uvicorn would keep for ever, and
    those of an address that has too many."""

    _open: ClassVar[Counter[str]] = Counter()
    _address = ""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._address = (transport.get_extra_info("peername") or ("",))[0]
        self._open[self._address] += 1
        if self._open[self._address] > CONNECTIONS:
            transport.abort()
        self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._open[self._address] -= 1
        if not self._open[self._address]:
            del self._open[self._address]

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


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
    allow_host: Annotated[
        list[str], typer.Option(help="A name by which clients call this server. Repeatable.")
    ] = [],
    allow_origin: Annotated[
        list[str], typer.Option(help="Origin of a page whose scripts may ask. Repeatable.")
    ] = [],
    waiting: Annotated[int, typer.Option(help="Requests that may wait.", min=1)] = 64,
    per_client: Annotated[
        int, typer.Option(help="Requests of one address at once; 0: any.", min=0)
    ] = 0,
    rate: Annotated[
        int, typer.Option(help="Requests of one address in a minute; 0: any.", min=0)
    ] = 0,
    max_body_mib: Annotated[int, typer.Option(help="Largest body, images included.", min=1)] = 8,
    max_images: Annotated[int, typer.Option(help="Images of a request.", min=0)] = 16,
    max_pixels: Annotated[
        int, typer.Option(help="Pixels of a request, all images together.", min=1)
    ] = 16_000_000,
    raw_prompts: Annotated[
        bool,
        typer.Option(help="Answer raw prompts and go on with answers that a client begins."),
    ] = False,
    show_scores: Annotated[
        bool, typer.Option(help="Tell clients scores and thresholds, not only what fired.")
    ] = False,
    hold_back: Annotated[
        int | None,
        typer.Option(
            help="Tokens by which answers are told later, so that those in which a probe fires are "
            "never shown; by default the longest window of a probe that reads answers.",
            min=0,
        ),
    ] = None,
    allow_unsteered: Annotated[
        bool,
        typer.Option(help="Let chats ask for the answer without the package (`steering: false`)."),
    ] = False,
    ignore: command_line.Ignore = [],
) -> None:
    """Serve a steered model to clients of OpenAI, TGI and Ollama, and a page to try it.

    If STEERBRIDGE_API_KEY is set in the environment, clients must send it as a bearer token.
    """
    if not package and model != "smollm2":
        raise SteerbridgeError(f"{model}: name the package made for it with --package")
    open_engine: EngineOpener = registry.runtime(runtime).load_engine()
    options: dict[str, Any] = {"mmproj": mmproj} if mmproj else {}
    engine = open_engine(
        model_path(model), load(package or DEMO), context=context, ignore=ignore, **options
    )
    app = create_app(
        Worker(engine, hold_back),
        settings=Settings(allow_unsteered, raw_prompts, show_scores, max_images, max_pixels),
        limits=Limits(
            body_bytes=max_body_mib << 20, waiting=waiting, per_client=per_client, rate=rate
        ),
        api_key=os.environ.get("STEERBRIDGE_API_KEY", ""),
        hosts=(*allow_host, *_own_hosts(host)),
        origins=tuple(allow_origin),
    )
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="info",
        http=Impatient,
        timeout_graceful_shutdown=END_SECONDS,
        server_header=False,
    )


def _own_hosts(host: str) -> tuple[str, ...]:
    """The names of the address to listen on; "*" if it is every one."""
    try:
        return ("*",) if ipaddress.ip_address(host).is_unspecified else (host,)
    except ValueError:
        return (host,)
