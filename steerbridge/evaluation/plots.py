"""Plots of a package's evidence and of an evaluation's record, by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.atomic import replacing
from steerbridge.errors import DataError, Problem
from steerbridge.package import SteeringPackage
from steerbridge.registry import requires

# Okabe and Ito's colours, told apart by colour-blind readers, on white and on black.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK: Final = "#123457"  # stands for the colour of the text around a plot
_LEGEND: Final[Any] = {"frameon": False, "labelcolor": _INK}


def readings(package: SteeringPackage, path: Path) -> Path:
    """Write a PNG: SAS and AUROC of every reading alone, by layer, position and channel.

    The file is written beside its place and renamed.

    Raises:
        DataError: the package's evidence holds no figures by reading.
        RuntimeMissing: matplotlib is not installed.
    """
    figure = awareness(package)
    with replacing(path) as fresh:
        figure.savefig(fresh, format="png", dpi=144)
    return path


def require() -> None:
    """Raise RuntimeMissing now, and not after an hour of work, if plots cannot be drawn."""
    with requires("report"):
        import matplotlib  # noqa: F401


def svg(figure: Any, name: str) -> str:
    """A figure as an element of an HTML page, in the page's own text colour.

    Args:
        name: what its ids begin with; distinct for each figure of a page.
    """
    import matplotlib

    out = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()[out.getvalue().index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # The caption and the text beside it are the alternative; the drawing itself is skipped.
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'aria-hidden="true"', text, count=1)


def _new(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], drawn in the ink that `svg` replaces."""
    require()
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(ink, _INK) | {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "axes.prop_cycle": cycler(color=COLOURS),
        "font.family": "sans-serif",
        "grid.color": _INK,
        "grid.alpha": 0.15,
        "axes.grid": True,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


# ---------------------------------------------------------------- of a package

Series = Mapping[str, Mapping[str, float]]  # reading -> channel -> value


def awareness(package: SteeringPackage) -> Any:
    """SAS and AUROC of every reading alone: a column for each kind of harmful prompt.

    Raises:
        DataError: the package's evidence holds no figures by reading.
        RuntimeMissing: matplotlib is not installed.
    """
    measured = _measured(package)
    channels = sorted({c for series in measured.values() for v in series.values() for c in v})
    figure, axes = _new(
        max(3.2 * len(channels), 6.4), 5.2, 2, len(channels), sharex=True, sharey="row"
    )
    for row, (name, series) in zip(axes, measured.items(), strict=True):
        for axis, channel in zip(row, channels, strict=True):
            for position, points in _lines(series, channel).items():
                layers, values = zip(*sorted(points), strict=True)
                axis.plot(layers, values, marker=".", label=position)
        row[0].set_ylabel(name)
    for axis, channel in zip(axes[0], channels, strict=True):
        axis.set_title("all" if channel == "*" else channel)
    for axis in axes[-1]:
        axis.set_xlabel("layer input")
    handles, labels = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, **_LEGEND)
    return figure


def _measured(package: SteeringPackage) -> dict[str, Series]:
    """The figures by reading: SAS, and AUROC of a linear probe."""
    evidence: Any = package.spec.evidence
    safety = (evidence and evidence.safety) or {}
    series: dict[str, Series] = {
        "SAS": safety.get("sas_per_reading", {}),
        "AUROC": safety.get("auroc_per_reading", {}),
    }
    if not all(series.values()):
        raise DataError(Problem("evidence.safety", "SAS and AUROC by reading", "none"))
    return series


def _lines(series: Series, channel: str) -> dict[str, list[tuple[int, float]]]:
    """position -> points (layer, value) of a channel."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for text, values in series.items():
        site, _, position = text.partition(" @ ")
        if channel in values:
            layer = int(site.removeprefix("layer_input[").rstrip("]"))
            lines.setdefault(position, []).append((layer, values[channel]))
    return lines


# ---------------------------------------------------------------- of a record

Rows = Sequence[Mapping[str, Any]]


def scores_of(rows: Rows, probe: str) -> dict[str, tuple[Any, Any]]:
    """Finite scores of a probe by kind of harmful prompt, each beside those of harmless ones."""
    sides: dict[str | None, list[float]] = {}
    for row in rows:
        for verdict in row["verdicts"]:
            if verdict["probe"] == probe and verdict["score"] is not None:
                kind = row["kind"] if row["harmful"] else None
                sides.setdefault(kind, []).append(verdict["score"])
    harmless = np.sort(np.asarray(sides.pop(None, [])))
    return {k: (np.sort(np.asarray(v)), harmless) for k, v in sorted(sides.items()) if k}


def probes_of(rows: Rows) -> dict[str, tuple[float, int]]:
    """Threshold of each probe that gave verdicts, and 1 if scores above it fire, else -1."""
    return {
        v["probe"]: (v["threshold"], 1 if v["comparator"].startswith(">") else -1)
        for row in rows
        for v in row["verdicts"]
    }


def roc(rows: Rows) -> Any:
    """ROC of every probe, a line for each kind of harmful prompt; the dot is the threshold."""
    probes = probes_of(rows)
    figure, axes = _new(max(3.4 * len(probes), 4.2), 3.6, 1, len(probes), sharey=True)
    for axis, (probe, (limit, sign)) in zip(axes[0], probes.items(), strict=True):
        for kind, sides in scores_of(rows, probe).items():
            harmful, harmless = (np.sort(sign * side) for side in sides)
            steps = np.unique(np.concatenate([harmful, harmless, [np.inf, -np.inf]]))[::-1]
            points = np.array([(_above(harmless, s), _above(harmful, s)) for s in steps])
            (line,) = axis.step(*points.T, where="post", label=kind)
            axis.plot(
                _above(harmless, sign * limit, strict=True),
                _above(harmful, sign * limit, strict=True),
                "o",
                color=line.get_color(),
            )
        axis.set_xscale("symlog", linthresh=0.01)
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1.02)
        axis.set_xticks([0, 0.01, 0.1, 1], ["0", "1 %", "10 %", "100 %"])
        axis.set_title(f"probe {probe}")
        axis.set_xlabel("harmless prompts that would fire")
        axis.legend(loc="lower right", **_LEGEND)
    axes[0][0].set_ylabel("harmful prompts that would fire")
    return figure


def _above(scores: Any, limit: float, strict: bool = False) -> float:
    """Share of sorted scores at or above (or only above) a limit."""
    below = np.searchsorted(scores, limit, "right" if strict else "left")
    return 1 - float(below) / max(len(scores), 1)


def histograms(rows: Rows) -> Any:
    """Scores of every probe: a line for each kind of harmful prompt, harmless ones filled."""
    probes = probes_of(rows)
    figure, axes = _new(max(3.4 * len(probes), 4.2), 3.2, 1, len(probes), sharey=True)
    for axis, (probe, (limit, _)) in zip(axes[0], probes.items(), strict=True):
        by_kind = scores_of(rows, probe)
        every = np.concatenate([part for sides in by_kind.values() for part in sides])
        bins = np.linspace(every.min(), every.max() or 1.0, 31)
        harmless = next(iter(by_kind.values()))[1]
        share = {"weights": np.full(len(harmless), 1 / max(len(harmless), 1))}
        axis.hist(harmless, bins, alpha=0.35, color=_INK, label="harmless", **share)
        for kind, (harmful, _) in by_kind.items():
            weights = np.full(len(harmful), 1 / len(harmful))
            axis.hist(harmful, bins, histtype="step", linewidth=1.6, label=kind, weights=weights)
        axis.axvline(limit, color=_INK, linestyle="--", linewidth=1, label="threshold")
        axis.set_title(f"probe {probe}")
        axis.set_xlabel("score")
        axis.legend(loc="upper center", **_LEGEND)
    axes[0][0].set_ylabel("share of prompts")
    return figure


def trade_off(comparison: Mapping[str, Any]) -> Any:
    """ASR against harmless answers left alone: every way, and the guard's two curves."""
    figure, ((axis,),) = _new(6.8, 4.4, 1, 1)
    for name, style in (("thresholds", "-"), ("strengths", ":")):
        if curve := comparison[name]:
            points = sorted((p["harmless_identical"], p["asr"]) for p in curve)
            axis.plot(*zip(*points, strict=True), style, label=f"guard, {name} varied")
    for i, way in enumerate(comparison["ways"]):
        marker = "osD^vPX*"[i % 8]
        colour = COLOURS[i % len(COLOURS)]
        at = (way["harmless_identical"], way["asr"])
        axis.plot(*at, marker, color=colour, markersize=9, label=way["way"], clip_on=False)
    for direction in (axis.set_xlim, axis.set_ylim):
        direction(-0.03, 1.03)
    axis.set_xlabel("harmless prompts with an identical answer (right is better)")
    axis.set_ylabel("attack success (down is better)")
    figure.legend(loc="outside right upper", **_LEGEND)
    return figure
