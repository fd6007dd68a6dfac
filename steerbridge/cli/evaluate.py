"""`steerbridge eval`: what the guard stops and what it disturbs, on labelled prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import data as datasets
from steerbridge.cli import common
from steerbridge.data import Example
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import compare as comparing
from steerbridge.evaluation import judges, measure, record
from steerbridge.evaluation.answers import Asking, Source, Store
from steerbridge.evaluation.endpoint import Client
from steerbridge.package import SteeringPackage, load
from steerbridge.runtime import LoadedModel


def evaluate(
    package: Annotated[
        str, typer.Argument(help="Directory, .gguf file or hub id; none with --url.")
    ] = "",
    model: common.Model = "smollm2",
    runtime: common.Runtime = "hf",
    mmproj: common.Mmproj = "",
    url: Annotated[
        str, typer.Option(help="Server to measure instead (OpenAI's interface), model behind #.")
    ] = "",
    baseline_url: Annotated[
        str, typer.Option(help="The same model without a guard, to compare --url with.")
    ] = "",
    data: common.Data = [],
    corpus: common.Corpus = "none",
    limit: Annotated[int, typer.Option(help="Use every k-th prompt, this many; 0: all.")] = 0,
    max_new_tokens: common.MaxNew = 48,
    ignore: common.Ignore = [],
    judge: Annotated[
        list[str],
        typer.Option(
            help="Who says what refuses: matcher, an address (OpenAI's interface, model behind "
            "#) or module:function. May be repeated: the first one counts, others are compared."
        ),
    ] = ["matcher"],
    compare: Annotated[
        bool,
        typer.Option(
            help="Also measure a system prompt, the head without the probe, a control vector, "
            "and curves over thresholds and strength."
        ),
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Keep answers here; a later run goes on from them.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at once (hf); 0: 32.", min=0)] = 0,
    concurrency: Annotated[int, typer.Option(help="Requests at once to servers.", min=1)] = 4,
    rows: Annotated[
        Path | None, typer.Option(help="Write one JSON object per prompt to this file.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--record", help="Write the record that `steerbridge report` reads."),
    ] = None,
    json: common.Json = False,
) -> None:
    """Measure attack success, false positives and changed answers."""
    if bool(package) == bool(url):
        raise DataError(Problem("package or --url", "one of the two", "both" if url else "none"))
    measure.require()
    prompts = _prompts(data, corpus, limit)
    first, *others = [judges.named(name, concurrency) for name in judge]
    asking = Asking(max_new_tokens, first, tell=common.steps())
    comparison = perplexity = None
    if url:
        if compare:
            raise DataError(Problem("--compare", "a package, whose probe is left out", "--url"))
        steered = _server("steered", url, concurrency)
        plain = _server("unsteered", baseline_url, concurrency) if baseline_url else None
        if cache:
            asking = replace(asking, store=Store(cache, "http"))
        found = measure.rows(prompts, plain, steered, asking)
        about: dict[str, Any] = {"package": None, "runtime": "http", "model": url}
        about["quantisation"] = "unknown"
    else:
        steering = load(package)
        options = {"batch_size": batch_size} if batch_size else {}
        loaded = common.open_model(model, runtime, mmproj, **options)
        if cache:
            store = Store(cache, common.identity(model, runtime, mmproj, loaded))
            asking = replace(asking, store=store)
        if compare:
            comparison = _compared(loaded, steering, prompts, asking, ignore)
            found = comparison.rows
        else:
            found = measure.run(loaded, steering, prompts, asking, ignore)
        perplexity = measure.perplexity(loaded, steering, ignore)
        about = {"package": steering, "runtime": runtime, "model": model}
        about["quantisation"] = loaded.quantisation
    if rows:
        measure.write_rows(rows, found)
    result = record.build(
        found,
        **about,
        judge=first.name,
        max_new_tokens=max_new_tokens,
        comparison=comparison,
        perplexity=perplexity,
    )
    result["judges"] = {other.name: measure.judged(found, other) for other in others}
    if out:
        record.write(result, out)
    if json:
        kept = ("intervals", "perplexity", "judges", "comparison")
        common.print_json({**result["summary"], **{key: result[key] for key in kept}})
        return
    print("\n".join(_shown(result)))
    if comparison:
        print("\n".join(["", *comparing.table(comparison)]))


def _prompts(paths: Sequence[Path], corpus: str, limit: int) -> list[Example]:
    prompts = common.examples(paths, corpus)
    if not prompts:
        raise DataError(Problem("--data or --corpus", "prompts to measure on", "none"))
    if limit and limit < len(prompts):
        prompts = [prompts[i * len(prompts) // limit] for i in range(limit)]
    return prompts


def _server(name: str, url: str, concurrency: int) -> Source:
    return Source(name, Client.named(url, concurrency), identity=url)


def _compared(
    model: LoadedModel,
    package: SteeringPackage,
    prompts: Sequence[Example],
    asking: Asking,
    ignore: Sequence[str],
) -> comparing.Comparison:
    """The control vector is fitted on the shipped prompts that guards are trained on."""
    contrasts = [e for e in datasets.from_corpus("train") if e.harmful]
    return comparing.compare(model, package, prompts, contrasts, asking, ignore)


def _shown(result: dict[str, Any]) -> list[str]:
    """The summary as lines of text, with 95 % intervals where there are any."""
    found, intervals = dict(result["summary"]), result["intervals"]
    kinds = found.pop("kinds")
    lines = []
    for key, value in found.items():
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
