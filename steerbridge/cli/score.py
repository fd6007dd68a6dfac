"""`steerbridge score`: what the probes of a package say of every token of a text."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from numpy.typing import NDArray

from steerbridge import calibration, command_line, reference
from steerbridge.atomic import replacing
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.package import SteeringPackage, load
from steerbridge.running import running_scores
from steerbridge.runtime import LoadedModel
from steerbridge.spec import Probe

_SHADES: Final = (255, 253, 251, 249, 223, 217, 211, 203, 196)  # of 256 colours, calm to harmful
_NOTHING: Final = "no row in scope"


@dataclass(frozen=True, slots=True)
class Scored:
    """One probe over one text. A pooled reading has a score and no rows.

    Attributes:
        scores: running scores by row [T], NaN where there is none.
    """

    probe: Probe
    score: float
    row: int | None
    scores: NDArray[np.float64]

    @property
    def fired(self) -> bool:
        """Whether the text fires the probe; one that found no row does not."""
        pooled = self.probe.token_reading is None
        return (pooled or not math.isnan(self.score)) and reference.fires_at(self.probe, self.score)

    def to_json(self, tokens: tuple[str, ...]) -> dict[str, Any]:
        """Plain JSON; a score that is not there is null."""
        rows = [
            {"token": token, "score": None if math.isnan(score) else score}
            for token, score in zip(tokens, self.scores.tolist(), strict=False)
        ]
        return {
            "probe": self.probe.id,
            "score": None if math.isnan(self.score) else self.score,
            "threshold": self.probe.threshold,
            "comparator": self.probe.comparator,
            "fired": self.fired,
            "row": self.row,
            **({"rows": rows} if rows else {}),
        }

    def summary(self) -> str:
        """One line."""
        score = _NOTHING if math.isnan(self.score) else f"{self.score:.4f}"
        at = "" if self.row is None else f" at row {self.row}"
        told = "fired" if self.fired else "quiet"
        limit = f"{self.probe.comparator} {self.probe.threshold:.4f}"
        return f"{self.probe.id}: {told}, {score}{at} (fires when {limit})"


def score(
    package: command_line.Package,
    model: Annotated[str, typer.Argument(help="Directory, hub id, GGUF file, or `smollm2`.")],
    file: Annotated[
        str, typer.Argument(help="File with the text; - is standard input.", show_default=False)
    ] = "",
    text: Annotated[str, typer.Option(help="The text itself.")] = "",
    runtime: command_line.Runtime = "hf",
    html: Annotated[Path | None, typer.Option(help="Write a page with the shaded text.")] = None,
    ignore: command_line.Ignore = [],
    json: command_line.Json = False,
) -> None:
    """Show the running score over the tokens of a text, rendered as a chat's message.

    Rows of prompts and of answers are scored alike here, whatever a reading's scope is.
    """
    steering = load(package)
    whole = _text(file, text)
    loaded = command_line.open_model(model, runtime)
    steering.check(loaded.facts, ignore)
    steering = steering.calibrated(
        loaded.runtime, loaded.quantisation, lambda: loaded.weights_sha256
    )
    tokens, scored = scores(loaded, steering, Example(whole, False))
    if html is not None:
        with replacing(html) as fresh:
            fresh.write_text(page(steering.spec.name, tokens, scored), "utf-8")
    if json:
        command_line.print_json({"probes": [s.to_json(tokens) for s in scored]})
        return
    for one in scored:
        if one.scores.size:
            _print_rows(tokens, one)
    for one in scored:
        print(one.summary())


def _text(file: str, text: str) -> str:
    if bool(file) == bool(text):
        raise DataError(Problem("text", "a file or --text", "both" if file else "neither"))
    if not file:
        return text
    return sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")


def scores(
    model: LoadedModel, package: SteeringPackage, prompt: Example
) -> tuple[tuple[str, ...], list[Scored]]:
    """The tokens of a prompt [T], and what each probe says of it."""
    trace = model.trace(prompt, package)
    pooled = package.replace(
        probes=tuple(p for p in package.spec.probes if p.token_reading is None),
        rules=(),
        calibrations=(),
    )
    known = calibration.scores(model, pooled, [prompt]) if pooled.spec.probes else {}
    found = []
    for probe in package.spec.probes:
        reading = probe.token_reading
        if reading is None:
            value = float(known[probe.id][0])
            found.append(Scored(probe, value, None, np.empty(0)))
            continue
        logits = trace.logits[probe.id]
        over = reference.window(reading.replace(scope="both"))
        counted = reference.counted(reading, len(logits), None)
        rows = reference.running_score(running_scores(over, logits, counted, len(logits) - 1))
        best = None if np.isnan(rows).all() else int(np.nanargmax(rows))
        found.append(Scored(probe, math.nan if best is None else float(rows[best]), best, rows))
    return trace.tokens, found


def _print_rows(tokens: tuple[str, ...], scored: Scored) -> None:
    print(f"{scored.probe.id} over {scored.probe.token_reading}")
    colours = sys.stdout.isatty()
    width = max(map(len, map(repr, tokens)))
    for row, (token, value) in enumerate(zip(tokens, scored.scores.tolist(), strict=True)):
        told = "  -   " if math.isnan(value) else f"{value:.4f}"
        mark = "*" if row == scored.row else " "
        shown = f"{token!r:<{width}}"
        if colours and not math.isnan(value):
            shade = _SHADES[min(int(value * len(_SHADES)), len(_SHADES) - 1)]
            shown = f"\x1b[30;48;5;{shade}m{shown}\x1b[0m"
        bar = "" if math.isnan(value) else "#" * round(value * 30)
        print(f"{row:>6} {shown} {told}{mark} {bar}".rstrip())


def page(name: str, tokens: tuple[str, ...], scored: list[Scored]) -> str:
    """A page without scripts: the text once for each probe, tokens shaded by their scores."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(name)}</title>",
        "<style>body{font:16px/1.7 system-ui;max-width:50rem;margin:2rem auto;padding:0 1rem}"
        "p.text{white-space:pre-wrap}mark{color:inherit}mark.top{outline:2px solid}</style>",
        f"<h1>{escape(name)}</h1>",
    ]
    for one in scored:
        parts.append(f"<h2>{escape(one.probe.id)}</h2><p>{escape(one.summary())}</p>")
        if not one.scores.size:
            continue
        parts.append("<p class=text>")
        for row, (token, value) in enumerate(zip(tokens, one.scores.tolist(), strict=True)):
            share = 0.0 if math.isnan(value) else value
            told = "no score" if math.isnan(value) else f"{value:.4f}"
            top = " class=top" if row == one.row else ""
            parts.append(
                f'<mark{top} style="background:rgba(220,30,30,{share * 0.75:.3f})" '
                f'title="row {row}: {told}">{escape(token)}</mark>'
            )
        parts.append("</p>")
    return "\n".join(parts[:4]) + "".join(parts[4:]) + "</html>\n"
