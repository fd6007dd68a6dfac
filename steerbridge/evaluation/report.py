"""A report: what a guard does, measured, as one HTML file or as Markdown.

The HTML file holds its plots, pictures and style; nothing is fetched, nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from steerbridge import data
from steerbridge.atomic import replacing
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import plots
from steerbridge.package import SteeringPackage
from steerbridge.registry import requires

EXAMPLES: Final = 4  # of each outcome
_HERE: Final = Path(__file__).parent

Record = Mapping[str, Any]

_NAMES: Final = {
    "asr_judge_unsteered": "attack success (not refused), unsteered",
    "asr_judge_steered": "attack success (not refused), steered",
    "asr_guard_unsteered": "attack success (not stopped by the guard), unsteered",
    "asr_guard_steered": "attack success (not stopped by the guard), steered",
    "harmless_identical": "harmless prompts with an identical answer",
    "over_refusal_unsteered": "harmless prompts refused, unsteered",
    "over_refusal_steered": "harmless prompts refused, steered",
    "refusal_wellformed": "steered refusals that are a sentence and end",
}

_PERPLEXITIES: Final = {
    "unsteered": "perplexity of a benign text",
    "steered": "the same with the guard",
    "unconditional": "the same with its head acting on everything",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot with its caption and what it shows in words."""

    svg: str
    caption: str
    words: str


def write(records: Sequence[Record], package: SteeringPackage | None, path: Path) -> Path:
    """Write the report of some evaluations to a `.html` or `.md` file, atomically.

    Args:
        package: what was evaluated, for its card and its evidence; None: not shown.

    Raises:
        DataError: a name that ends otherwise, no records, or a package that was not evaluated.
        RuntimeMissing: jinja2 or matplotlib is not installed (extra `report`).
    """
    if path.suffix not in (".html", ".md"):
        raise DataError(Problem("report", "a name ending in .html or .md", path.name))
    if not records:
        raise DataError(Problem("records", "at least one", "none"))
    if package is not None:
        for record in records:
            measured = (record["package"] or {}).get("sha256")
            if measured != package.sha256:
                want = f"a record of {package.spec.name} ({package.sha256[:12]})"
                raise DataError(Problem("package", want, str(measured)[:12]))
    text = _template(path.suffix).render(
        title=package.spec.name if package else "Evaluation",
        package=package and _card(package),
        awareness=_awareness(package) if path.suffix == ".html" else None,
        records=[_section(r, i, path.suffix == ".html") for i, r in enumerate(records)],
    )
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path


def _template(suffix: str) -> Any:
    with requires("report"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    engine = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=suffix == ".html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters.update(percent=_percent, between=_between, cell=_cell, number=_number)
    return engine.get_template(f"report{suffix}.j2")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:#.5g}"


def _cell(text: str | None) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join((text or "").replace("|", "\\|").replace("<", "&lt;").split())


def _card(package: SteeringPackage) -> dict[str, Any]:
    spec = package.spec
    return {
        "name": spec.name,
        "sha256": package.sha256,
        "base_model": spec.base_model.name,
        "created": spec.created,
        "description": spec.description,
        "probes": [
            {
                "id": p.id,
                "type": p.type,
                "rule": f"{p.comparator} {p.threshold:.4f}",
                "readings": list(p.reads),
            }
            for p in spec.probes
        ],
        "acts": [f"{x.type} {x.id}" for x in spec.interventions],
        "calibrations": [f"{c.runtime} {c.quantisation}" for c in spec.calibrations],
    }


def _awareness(package: SteeringPackage | None) -> Figure | None:
    evidence: Any = package and package.spec.evidence
    best = ((evidence and evidence.safety) or {}).get("sas_per_reading")
    if package is None or not best:
        return None
    scores = {reading: max(by_kind.values()) for reading, by_kind in best.items()}
    top = max(scores, key=scores.__getitem__)
    words = f"The reading with the highest Safety Awareness Score is {top}."
    if not any(scores.values()):
        words = "The score needs aligned pairs of prompts, and there were none to train on."
    return Figure(
        plots.svg(plots.awareness(package), "sas"),
        "Safety Awareness Score and AUROC of single readings, by layer",
        words,
    )


# ---------------------------------------------------------------- of one record


def _section(record: Record, index: int, drawn: bool) -> dict[str, Any]:
    rows, summary, intervals = record["rows"], record["summary"], record["intervals"]
    comparison = record["comparison"]
    return {
        **{key: record[key] for key in ("model", "runtime", "quantisation", "created", "judge")},
        "id": f"r{index}",
        "prompts": summary["prompts"],
        "harmful": sum(row["harmful"] for row in rows),
        "figures": [
            (name, summary[key], intervals.get(key))
            for key, name in _NAMES.items()
            if summary.get(key) is not None
        ],
        "kinds": summary["kinds"],
        "fpr": [(kind, share, intervals["fpr"][kind]) for kind, share in summary["fpr"].items()],
        "auroc": [
            (probe, value, intervals["auroc"].get(probe))
            for probe, value in summary["auroc"].items()
        ],
        "perplexity": [
            (name, value)
            for key, name in _PERPLEXITIES.items()
            if (value := (record["perplexity"] or {}).get(key)) is not None
        ],
        "comparison": comparison,
        "plots": _plots(rows, comparison, f"r{index}") if drawn else [],
        "examples": _examples(rows, drawn),
        "origin": {
            "data (sha256)": record["data_sha256"],
            "new tokens": record["max_new_tokens"],
            **record["versions"],
            **record["machine"],
        },
    }


def _plots(rows: Sequence[Any], comparison: Any, name: str) -> list[Figure]:
    made = []
    if plots.probes_of(rows) and any(plots.scores_of(rows, p) for p in plots.probes_of(rows)):
        made += [
            Figure(
                plots.svg(plots.roc(rows), f"{name}-roc"),
                "ROC of every probe, by kind of harmful prompt; the dot is its threshold",
                "The same shares are in the tables above.",
            ),
            Figure(
                plots.svg(plots.histograms(rows), f"{name}-scores"),
                "Scores of harmless and harmful prompts, and the threshold",
                _overlap(rows),
            ),
        ]
    if comparison:
        better = comparison["better_than_the_guard"]
        made.append(
            Figure(
                plots.svg(plots.trade_off(comparison), f"{name}-ways"),
                "Attack success against harmless prompts left alone",
                f"Better in both than the guard: {', '.join(better) or 'none of the others'}.",
            )
        )
    return made


def _overlap(rows: Sequence[Any]) -> str:
    """How often each probe fires, in words."""
    said = []
    for probe in plots.probes_of(rows):
        shares = []
        for harmful in (True, False):
            verdicts = [
                v["fired"]
                for row in rows
                if row["harmful"] is harmful
                for v in row["verdicts"]
                if v["probe"] == probe
            ]
            shares.append(_percent(sum(verdicts) / len(verdicts)) if verdicts else "none")
        said.append(f"{probe} fires on {shares[0]} of harmful and {shares[1]} of harmless prompts")
    return "; ".join(said) + "."


def _examples(rows: Sequence[Any], drawn: bool) -> list[dict[str, Any]]:
    """Some rows of each outcome, the rare ones first: what a reader should look at."""
    outcomes: tuple[tuple[str, Callable[[Any], bool]], ...] = (
        ("harmful, let through", lambda r: r["harmful"] and not _stopped(r)),
        ("harmless, fired", lambda r: not r["harmful"] and r["fired"]),
        ("harmful, stopped", lambda r: r["harmful"] and _stopped(r)),
        ("harmless, left alone", lambda r: not r["harmful"] and not r["fired"]),
    )
    examples = []
    for name, belongs in outcomes:
        chosen = [row for row in rows if belongs(row)]
        step = max(len(chosen) // EXAMPLES, 1)
        examples += [
            {
                **row,
                "outcome": name,
                "pictures": [_picture(Path(p)) for p in row.get("images", [])] if drawn else [],
            }
            for row in chosen[::step][:EXAMPLES]
        ]
    return examples


def _stopped(row: Mapping[str, Any]) -> bool:
    return row["fired"] is not False and bool(row["steered_refused"])


def _picture(path: Path) -> str | None:
    """A picture as a `data:` URL; None if it is gone."""
    return data.as_url(path) if path.is_file() else None
