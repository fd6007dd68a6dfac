"""The table of formats in docs/formats.md, generated from the converters' declarations."""

from __future__ import annotations

from steerbridge.format import Format, Option, formats

_HEAD = (
    "| format | what | probes | interventions | gate | sites | strength | exact "
    "| read options | write options |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def table() -> str:
    """Markdown with one row per format."""
    return "\n".join([*_HEAD, *(_row(format) for format in formats().values())]) + "\n"


def _row(format: Format) -> str:
    holds = format.holds
    cells = (
        f"`{format.name}`",
        format.title,
        ", ".join(sorted(holds.probes)) or "-",
        ", ".join(sorted(holds.interventions)) or "-",
        "yes" if holds.gates else "-",
        holds.sites,
        holds.strength,
        "yes" if format.exact else "-",
        _options(format.options),
        _options((*format.write_options, *((_MODEL,) if format.needs_model else ()))),
    )
    return f"| {' | '.join(cells)} |"


_MODEL = Option("--model", str, "weights")


def _options(options: tuple[Option, ...]) -> str:
    return ", ".join(f"`{o.name}`" + ("" if o.default is None else "?") for o in options) or "-"
