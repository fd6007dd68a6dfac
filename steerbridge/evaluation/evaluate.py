"""`steerbridge.evaluate`: ask, judge and measure, for a model in a runtime or behind a server."""

from __future__ import annotations

from collections.abc import Sequence

from steerbridge import data
from steerbridge.data import Example
from steerbridge.datasets import checks
from steerbridge.errors import DataError, Problem
from steerbridge.evaluation import compare as comparing
from steerbridge.evaluation import measure
from steerbridge.evaluation.answers import Asking, Source, Store
from steerbridge.evaluation.judges import Judge, Matcher
from steerbridge.evaluation.record import Evaluation
from steerbridge.package import SteeringPackage
from steerbridge.runtime import LoadedModel, Progress, silent


def evaluate(
    model: LoadedModel,
    package: SteeringPackage,
    prompts: Sequence[Example],
    *,
    max_new_tokens: int = 48,
    judges: Sequence[Judge] = (Matcher(),),
    compare: bool = False,
    store: Store | None = None,
    ignore: Sequence[str] = (),
    name: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Answer labelled prompts with and without a package, and measure the difference.

    Args:
        model: opened by a runtime (`open_model`).
        prompts: at least one; `compare` needs both labels.
        max_new_tokens: length of answers, at most.
        judges: who says what refuses; the first one counts, the others' rates stand beside.
        compare: also measure a system prompt, the head without the probe, a control vector
            (fitted on the shipped prompts), and curves over thresholds and strength.
        store: where answers are kept, so that a later run continues from them.
        ignore: base-model fields that may differ from the package's.
        name: what the report calls the model; empty: its own name.
        progress: told how many prompts are answered.

    Raises:
        DataError: no prompts, or one under both labels.
        ModelMismatch: the package was made for another model.
        RuntimeMissing: scipy is not installed (extra `eval`).
    """
    _check(prompts)
    first, *others = judges
    asking = Asking(max_new_tokens, first, store, progress or silent)
    comparison = None
    if compare:
        contrasts = [e for e in data.corpus_examples("train") if e.harmful]
        comparison = comparing.compare(model, package, prompts, contrasts, asking, ignore)
        rows = comparison.rows
    else:
        rows = measure.run(model, package, prompts, asking, ignore)
    return Evaluation(
        rows=rows,
        package=package,
        runtime=model.runtime,
        model=name or model.facts.name or "model",
        quantisation=model.quantisation,
        judge=first.name,
        max_new_tokens=max_new_tokens,
        comparison=comparison,
        perplexity=measure.perplexity(model, package, ignore),
        judges={judge.name: measure.judged(rows, judge) for judge in others},
        weights=model.weights_sha256,
    )


def evaluate_server(
    server: Source,
    baseline: Source | None,
    prompts: Sequence[Example],
    *,
    max_new_tokens: int = 48,
    judges: Sequence[Judge] = (Matcher(),),
    store: Store | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The same for a guarded model behind an address, compared with an unguarded one if given.

    Raises:
        DataError: no prompts, or one under both labels.
        EndpointFailed: a server gives no answer.
        RuntimeMissing: scipy is not installed (extra `eval`).
    """
    _check(prompts)
    first, *others = judges
    asking = Asking(max_new_tokens, first, store, progress or silent)
    rows = measure.rows(prompts, baseline, server, asking)
    return Evaluation(
        rows=rows,
        package=None,
        runtime="http",
        model=server.identity,
        quantisation="unknown",
        judge=first.name,
        max_new_tokens=max_new_tokens,
        judges={judge.name: measure.judged(rows, judge) for judge in others},
    )


def _check(prompts: Sequence[Example]) -> None:
    """Fail before an hour of answers, not after it."""
    measure.require()
    if not prompts:
        raise DataError(Problem("prompts", "at least one to measure on", "none"))
    checks.check(prompts)
