"""`steerbridge eval`: what the guard stops and what it disturbs, on labelled prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import command_line
from steerbridge.atomic import require_writable
from steerbridge.data import Example
from steerbridge.datasets import options
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import compare as comparing
from steerbridge.evaluation import judges, measure, record, verdicts
from steerbridge.evaluation.answers import Source, Store
from steerbridge.evaluation.endpoint import BASELINE_KEY, KEY, Client
from steerbridge.evaluation.evaluate import evaluate as measured
from steerbridge.evaluation.evaluate import evaluate_server
from steerbridge.evaluation.record import Evaluation
from steerbridge.package import SteeringPackage, load
from steerbridge.runtime import LoadedModel


def evaluate(
    package: Annotated[
        str, typer.Argument(help="Directory, .gguf file or hub id. Leave it out with --url.")
    ] = "",
    model: command_line.Model = "smollm2",
    runtime: command_line.Runtime = "hf",
    mmproj: command_line.Mmproj = "",
    url: Annotated[
        str,
        typer.Option(help="Measure an OpenAI-compatible server instead: ADDRESS or ADDRESS#MODEL."),
    ] = "",
    baseline_url: Annotated[
        str, typer.Option(help="The same model without a guard, for comparison with --url.")
    ] = "",
    data: options.Data = [],
    label: options.Label = [],
    map: options.Map = [],
    encoding: options.Encoding = "",
    corpus: options.Corpus = "none",
    limit: Annotated[
        int, typer.Option(help="Number of prompts to use, evenly spaced; 0 uses all.")
    ] = 0,
    max_new_tokens: command_line.MaxNew = 48,
    ignore: command_line.Ignore = [],
    judge: Annotated[
        list[str],
        typer.Option(
            help="Judge of refusals: `matcher`, an OpenAI-compatible ADDRESS#MODEL, or "
            "module:function. May be repeated: the first one counts, the others are compared."
        ),
    ] = ["matcher"],
    compare: Annotated[
        bool,
        typer.Option(
            help="Also measure a system prompt, the head without the probe, a control vector, "
            "and curves over thresholds and strength."
        ),
    ] = False,
    forms: Annotated[
        bool,
        typer.Option(
            help="Verdicts alone, on the prompts in every form: behind a system message, as a "
            "later turn, raw, inside a long text, ..."
        ),
    ] = False,
    attacks: Annotated[
        bool, typer.Option(help="Verdicts alone, on the prompts behind attacks of public papers.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Keep answers here; a later run continues from them.")
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(help="Prompts per batch, in a runtime that takes it; 0: its own.", min=0),
    ] = 0,
    concurrency: Annotated[int, typer.Option(help="Concurrent requests to servers.", min=1)] = 4,
    rows: Annotated[
        Path | None, typer.Option(help="Write one JSON object per prompt to this file.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--record", help="Write the record that `steerbridge report` reads."),
    ] = None,
    json: command_line.Json = False,
) -> None:
    """Measure attack success, false positives and changed answers."""
    if bool(package) == bool(url):
        raise DataError(Problem("package or --url", "one of the two", "both" if url else "none"))
    if url and compare:
        raise DataError(Problem("--compare", "a package, whose probe is left out", "--url"))
    if url and (forms or attacks):
        raise DataError(Problem("--forms, --attacks", "a package, whose scores are read", "--url"))
    if not forms and not attacks:
        measure.require()
    for path in filter(None, (rows, out)):
        require_writable(path)
    prompts = options.Prompts(data, label, map, encoding, corpus).read("to measure on")
    prompts = _limited(prompts, limit)
    if forms or attacks:
        steering = load(package)
        loaded = command_line.open_model(model, runtime, mmproj)
        steering = _fitting(steering, loaded, ignore)
        _verdicts(loaded, steering, prompts, json, forms=forms, attacks=attacks)
        return
    how: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "judges": [judges.named(name, concurrency) for name in judge],
        "progress": command_line.progress(),
    }
    if url:
        store = Store(cache, "http") if cache else None
        baseline = (
            _server("unsteered", baseline_url, concurrency, BASELINE_KEY) if baseline_url else None
        )
        server = _server("steered", url, concurrency, KEY)
        evaluation = evaluate_server(server, baseline, prompts, store=store, **how)
    else:
        steering = load(package)
        sizes = {"batch_size": batch_size} if batch_size else {}
        loaded = command_line.open_model(model, runtime, mmproj, **sizes)
        identity = command_line.identity(model, runtime, mmproj, loaded)
        store = Store(cache, identity) if cache else None
        how |= {"compare": compare, "ignore": ignore, "name": model, "store": store}
        evaluation = measured(loaded, steering, prompts, **how)
    if rows:
        measure.write_rows(rows, evaluation.rows)
    _tell(evaluation, out, json)


def _fitting(
    steering: SteeringPackage, loaded: LoadedModel, ignore: Sequence[str]
) -> SteeringPackage:
    """The package with the thresholds for this runtime."""
    steering.check(loaded.facts, ignore=tuple(ignore))
    return steering.calibrated(loaded.runtime, loaded.quantisation, lambda: loaded.weights_sha256)


def _verdicts(
    loaded: LoadedModel,
    steering: SteeringPackage,
    prompts: Sequence[Example],
    json: bool,
    *,
    forms: bool,
    attacks: bool,
) -> None:
    """The tables of verdicts that were asked for."""
    wanted = {"forms": forms, "attacks": attacks}
    made = {"forms": lambda: verdicts.in_forms(loaded), "attacks": verdicts.behind_attacks}
    tables = {
        name: verdicts.table(loaded, steering, prompts, made[name](), command_line.progress())
        for name, is_wanted in wanted.items()
        if is_wanted
    }
    if json:
        shown = {n: {line.name: line.to_json() for line in lines} for n, lines in tables.items()}
        command_line.print_json(shown)
        return
    for name, lines in tables.items():
        print("\n".join([name, *verdicts.shown(lines), ""]))


def _tell(evaluation: Evaluation, out: Path | None, json: bool) -> None:
    """Write the record if it was asked for, and print the figures."""
    result = evaluation.to_json()
    if out:
        record.write(result, out)
    if json:
        kept = ("intervals", "perplexity", "judges", "comparison")
        command_line.print_json({**result["summary"], **{key: result[key] for key in kept}})
        return
    print("\n".join(_shown(result)))
    if evaluation.comparison:
        print("\n".join(["", *comparing.table(evaluation.comparison)]))


def _limited(prompts: list[Example], limit: int) -> list[Example]:
    """At most so many, evenly spaced; 0: all."""
    if limit and limit < len(prompts):
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return prompts


def _server(name: str, url: str, concurrency: int, key: str) -> Source:
    return Source(name, Client.named(url, concurrency, key), identity=url)


def _shown(result: dict[str, Any]) -> list[str]:
    """The summary as lines of text, with 95 % intervals where there are any."""
    summary, intervals = dict(result["summary"]), result["intervals"]
    kinds = summary.pop("kinds")
    lines = []
    for key, value in summary.items():
        nested = isinstance(value, dict)
        for name, one in (value if nested else {"": value}).items():
            interval = intervals.get(key)
            interval = interval.get(name) if nested and interval else interval
            bounds = "" if not interval else "  ({} to {})".format(*interval)
            lines.append(f"{' '.join([key, name]).strip():<26} {one}{bounds}")
    for kind, rates in kinds.items():
        shown = ", ".join(f"{name} {rate}" for name, rate in rates.items() if rate is not None)
        lines.append(f"{kind:<26} {shown}")
    if result["perplexity"]:
        lines.append(f"{'perplexity (benign text)':<26} {result['perplexity']}")
    lines += [f"judge {name}: {rates}" for name, rates in result["judges"].items()]
    return lines
