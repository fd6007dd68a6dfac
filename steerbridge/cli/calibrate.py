"""`steerbridge calibrate`: thresholds for the runtime and quantisation that will serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerbridge import calibration
from steerbridge.cli import common
from steerbridge.errors import DataError, Problem
from steerbridge.package import load


def calibrate(
    package: common.Package,
    model: common.Model = "smollm2",
    runtime: common.Runtime = "llama.cpp",
    mmproj: common.Mmproj = "",
    data: common.Data = [],
    corpus: common.Corpus = "none",
    fpr: common.Fpr = 0.01,
    borderline_fpr: common.BorderlineFpr = 0.02,
    baseline: Annotated[
        str, typer.Option(help="Runtime to compare the scores with, on the same model.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Write here instead of over the package.")
    ] = None,
    json: common.Json = False,
) -> None:
    """Fit the thresholds again on this runtime's hidden states and record them in the package.

    Use prompts that the package was not trained on; `steerbridge inspect` shows the result.
    """
    steering = load(package)
    prompts = common.examples(data, corpus)
    if not prompts:
        raise DataError(Problem("--data or --corpus", "prompts to calibrate on", "none"))
    elsewhere = None
    if baseline:
        other = common.open_model(model, baseline)
        steering.check(other.facts, ignore=("model_type",))
        elsewhere = calibration.scores(other, steering, prompts, common.progress(baseline))
    loaded = common.open_model(model, runtime, mmproj)
    steering.check(loaded.facts, ignore=("model_type",))
    fitted = calibration.fit(
        loaded,
        runtime,
        steering,
        prompts,
        common.targets(fpr, borderline_fpr),
        baseline=elsewhere,
        progress=common.progress("capture"),
    )
    saved = calibration.with_calibration(steering, fitted).save(out or Path(package))
    evidence: Any = fitted.evidence
    result = {
        "package": str(saved),
        "runtime": fitted.runtime,
        "quantisation": fitted.quantisation,
        "thresholds": dict(fitted.thresholds),
        "probes": evidence["probes"],
    }
    if json:
        common.print_json(result)
        return
    print(f"{saved}: {fitted.runtime} {fitted.quantisation}")
    for probe, found in evidence["probes"].items():
        for when, rates in found.items():
            print(f"{probe:<8} {when:<7} " + ", ".join(f"{k} {v}" for k, v in rates.items()))
