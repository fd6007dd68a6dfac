"""`steerbridge calibrate`: thresholds for the runtime and quantisation that will serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import calibration, command_line
from steerbridge.datasets import options
from steerbridge.package import check_target, load


def calibrate(
    package: command_line.Package,
    model: command_line.Model = "smollm2",
    runtime: command_line.Runtime = "llama.cpp",
    mmproj: command_line.Mmproj = "",
    data: options.Data = [],
    label: options.Label = [],
    map: options.Map = [],
    encoding: options.Encoding = "",
    corpus: options.Corpus = "none",
    fpr: command_line.Fpr = 0.01,
    borderline_fpr: command_line.BorderlineFpr = 0.02,
    traffic: Annotated[
        list[Path],
        typer.Option(
            help="Harmless prompts as users send them: at most --fpr of others like them fire, "
            "with a confidence of 0.95 unless --confidence says another; may be repeated."
        ),
    ] = [],
    confidence: Annotated[
        float | None,
        typer.Option(
            help="Hold the rates of prompts like these with this confidence, such as 0.95; 0: of "
            "these prompts alone.",
            show_default="0, or 0.95 with --traffic",
            min=0,
            max=0.9999,
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="Runtime to compare the scores with, for the same model.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Write here instead of overwriting the package.")
    ] = None,
    json: command_line.Json = False,
) -> None:
    """Fit the thresholds again on this runtime's hidden states and record them in the package.

    Use prompts that the package was not trained on; `steerbridge inspect` shows the result.
    """
    steering = load(package)
    target = check_target(out or Path(package))
    chosen = options.Prompts(data, label, map, encoding, corpus, traffic)
    prompts = chosen.read("to calibrate on")
    if confidence is None:
        confidence = 0.95 if traffic else 0.0
    elsewhere = None
    if baseline:
        other = command_line.open_model(model, baseline)
        steering.check(other.facts, ignore=("model_type",))
        elsewhere = calibration.scores(other, steering, prompts, command_line.progress())
    loaded = command_line.open_model(model, runtime, mmproj)
    steering.check(loaded.facts, ignore=("model_type",))
    fitted = calibration.fit(
        loaded,
        steering,
        prompts,
        command_line.targets(fpr, borderline_fpr),
        confidence=confidence or None,
        baseline=elsewhere,
        progress=command_line.progress(),
    )
    saved = calibration.with_calibration(steering, fitted).save(target)
    evidence: Any = fitted.evidence
    result = {
        "package": str(saved),
        "runtime": fitted.runtime,
        "quantisation": fitted.quantisation,
        "thresholds": dict(fitted.thresholds),
        "probes": evidence["probes"],
    }
    if json:
        command_line.print_json(result)
        return
    print(f"{saved}: {fitted.runtime} {fitted.quantisation}")
    for probe, states in evidence["probes"].items():
        for when, rates in states.items():
            print(f"{probe:<8} {when:<7} " + ", ".join(f"{k} {v}" for k, v in rates.items()))
