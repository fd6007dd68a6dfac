"""The table of formats in docs/formats.md, out of the converters' own declarations."""

from __future__ import annotations

from steerbridge.formats import Ask, Format, formats

_HEAD = (
    "| format | what | probes | acts | gate | sites | strength | exact | read asks | write asks |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def table() -> str:
    """Markdown, one row a format."""
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
        _asks(format.asks),
        _asks((*format.write_asks, *((_MODEL,) if format.needs_model else ()))),
    )
    return f"| {' | '.join(cells)} |"


_MODEL = Ask("--model", str, "weights")


def _asks(asks: tuple[Ask, ...]) -> str:
    return ", ".join(f"`{a.name}`" + ("" if a.default is None else "?") for a in asks) or "-"
