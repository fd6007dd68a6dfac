"""Readings over tokens, watched answers and forced ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from steerbridge.testing import cases
from steerbridge.testing.cases import NEW, Case, at_layers, head, linear, mlp, of_rows, rule, says
from steerbridge.testing.driver import Ability
from steerbridge.testing.kit import Guarded, Trial
from steerbridge.testing.model import END, MARK
from steerbridge.testing.shapes.conversations import with_one_beginning
from steerbridge.testing.shapes.packages import package_shape
from steerbridge.testing.shapes.table import Table, first, sound

TABLE: Final = Table()

_LOW: Final = {"type": "sigmoid", "harmful_when": "low"}
_SAY: Final = says()


def _token(name: str, probe: cases.Json, **reading: Any) -> None:
    package_shape(TABLE, f"token reading: {name}", probes=[of_rows(probe, **reading)])


_token("the prompt", linear(), scope="prompt")
_token("the answer", linear(), scope="answer", skip=0)
_token("prompt and answer", linear())
_token("MLP, softmax, the answer", mlp(), scope="answer")
_token("MLP, sigmoid, low is harm", mlp(output=_LOW), scope="prompt")
_token("one row at a time, one site", linear(), sites=("layer_input[3]",), window=1)
_token("a window longer than most prompts", linear(), scope="prompt", window=40)
_token("rows of text, many skipped", linear(), rows="text", skip=6)
_token("standardised inputs", linear(input_mean="p.mean", input_scale="p.scale"), scope="prompt")
_token("four sites", mlp(), sites=[f"layer_input[{k}]" for k in (3, 1, 2)], scope="answer")

_VECTOR: Final = at_layers("add_vector", 2, alpha=6.0)
_WATCHED: Final = of_rows(linear(id="w"), scope="answer", skip=0)
package_shape(
    TABLE, "token reading: steering a layer", probes=[of_rows(linear())], interventions=[_VECTOR]
)
package_shape(
    TABLE,
    "token reading: any of it and a pooled probe",
    probes=[linear(), _WATCHED],
    count=96,
)
package_shape(
    TABLE,
    "token reading: all of it and a pooled probe",
    probes=[linear(), _WATCHED],
    count=64,
    rules=[rule(["p", "w"], ["h"], "all")],
)
package_shape(
    TABLE,
    "token reading: two rules that begin apart",
    probes=[linear(), _WATCHED],
    count=64,
    interventions=[head(), _VECTOR],
    rules=[rule(["p"], ["v"]), rule(["w"], ["h"], id="s")],
)
package_shape(TABLE, "say: at the prompt's end", interventions=[_SAY])
package_shape(
    TABLE, "say: in the middle of the answer", probes=[of_rows(linear())], interventions=[_SAY]
)
package_shape(TABLE, "say: nothing but the end", interventions=[says("")])
package_shape(
    TABLE,
    "say: behind a head",
    probes=[linear(), _WATCHED],
    count=64,
    interventions=[head(), _SAY],
    rules=[rule(["p"], ["h"]), rule(["w"], ["s"], id="s")],
)
package_shape(
    TABLE,
    "say: two sentences, of which one began first",
    probes=[linear(), _WATCHED],
    count=64,
    interventions=[says("Later.", id="a"), says("First.", id="b")],
    rules=[rule(["w"], ["a"]), rule(["p"], ["b"], id="s")],
)
package_shape(
    TABLE,
    "say: unconditional",
    probes=[],
    interventions=[_SAY],
    rules=[rule(None, ["s"])],
)


@TABLE.shape("token reading: strength by its score")
def _(trial: Trial) -> None:
    """It stays what it was where the rule began, however the score goes on."""

    def make() -> Case:
        by_score = {"type": "score", "probe": "p", "scale": 1.5}
        rules = [rule(["p"], ["h"], strength=by_score)]
        return cases.case(
            trial.model, [of_rows(linear(), window=1)], rules=rules, seed=25, count=96
        )

    case = trial.ground.case("strength by a token reading", make)

    def grown(prompt: str) -> float:
        verdicts = [case.expected(prompt, new).outcome for new in (1, NEW)]
        scores = [outcome.verdicts[0].score for outcome in verdicts if outcome]
        return abs(scores[1] - scores[0])

    at_end = [p for p in case.fired if case.expected(p, 1).outcome.rules]  # type: ignore[union-attr]
    with trial.guarded(case) as guard:
        guard_each(guard, [*sorted(at_end, key=grown)[-3:], *case.fired[:2], *case.quiet[:2]])


# ---------------------------------------------------------------- chunks


def _marked(trial: Trial, window: int) -> Case:
    name = f"marks, {window} at a time"
    return trial.ground.case(name, lambda: cases.marked(trial.model, window))


def _with_mark(case: Case, length: int, at: int, mark: str) -> str:
    """A sound prompt of a length whose mark begins at a row; none: a quiet one."""
    fired = bool(mark)
    texts = (
        text[:at] + mark + text[at + len(mark) : length]
        for text in ("".join(cases.prompts_of(seed, length)) for seed in range(20, 220))
    )
    return first(texts, lambda p: sound(case, p, fired), f"{mark!r} at row {at} of {length}")


def _marks(name: str, window: int) -> None:
    @TABLE.shape(f"a prompt of three batches, a mark at the edges of each, {name}")
    def _(trial: Trial) -> None:
        case, batch = _marked(trial, window), trial.driver.batch
        mark = MARK * window
        # The row that crosses is the last of the mark, or one before it.
        rows = [window, batch - 1, batch, 2 * batch - 1, 2 * batch, 3 * batch - 1]
        with trial.guarded(case) as guard:
            for row in rows:
                at = max(1, row - window + 1)
                guard.right([_with_mark(case, 3 * batch, at, mark)])
            guard.right([_with_mark(case, 3 * batch, 0, "")])


_marks("a row at a time", 1)
_marks("four rows at a time", 4)


# ---------------------------------------------------------------- answers

_KINDS: Final = {
    "the prompt": lambda model: cases.case(model, [of_rows(linear(), scope="prompt")], seed=27),
    "a head": lambda model: cases.case(model, [of_rows(linear(), window=2)], seed=21),
    "a layer": lambda model: cases.case(
        model, [of_rows(linear(), window=2)], [_VECTOR], seed=22, count=96
    ),
    "a sentence": lambda model: cases.case(
        model, [of_rows(linear(), window=1, scope="answer", skip=0)], [_SAY], seed=23
    ),
}


def _answers(
    name: str, *needs: Ability, kinds: Sequence[str] = tuple(_KINDS)
) -> Callable[[Callable[[Guarded], None]], None]:
    """A shape for each kind of package that watches answers."""

    def add(run: Callable[[Guarded], None]) -> None:
        for kind in kinds:

            @TABLE.shape(f"token readings, {name}, {kind}", *needs)
            def _(trial: Trial, kind: str = kind) -> None:
                case = trial.ground.case(
                    f"token readings: {kind}", lambda: _KINDS[kind](trial.model)
                )
                with trial.guarded(case) as guard:
                    run(guard)

    return add


def _crossing(case: Case, row: int) -> str | None:
    """A prompt whose answer crosses at a row of it; None if there is none."""
    for prompt in case.fired:
        outcome = case.expected(prompt).outcome
        assert outcome is not None
        [verdict] = outcome.verdicts
        if verdict.row == len(case.model.encode(prompt)) + row:
            return prompt
    return None


def _late(case: Case) -> str:
    """A prompt that fires as late in its answer as any, if answers are read."""
    if case.new == 1:
        return case.fired[0]
    prompts = (_crossing(case, row) for row in range(NEW - 2, -1, -1))
    return first((p for p in prompts if p), lambda _: True, "one that fires in its answer")


@_answers("at every row of an answer", kinds=("a head", "a layer", "a sentence"))
def _(guard: Guarded) -> None:
    found = [p for row in range(NEW - 1) if (p := _crossing(guard.case, row))]
    assert len(found) >= 2, "the tiny model crosses at too few rows"
    guard_each(guard, [*found, *guard.case.quiet[:2]])


def guard_each(guard: Guarded, prompts: Sequence[str], **how: Any) -> None:
    """One after another."""
    for prompt in prompts:
        guard.right([prompt], **how)


@_answers("in a stream", Ability.STREAM)
def _(guard: Guarded) -> None:
    guard_each(guard, [_late(guard.case), guard.case.quiet[0]], stream=True)


@_answers("in a batch", Ability.BATCH)
def _(guard: Guarded) -> None:
    case = guard.case
    guard.right([case.quiet[0], _late(case), case.fired[0], case.quiet[1]])


@_answers(
    "in a batch padded on the left", Ability.BATCH, Ability.PADDING, kinds=("the prompt", "a head")
)
def _(guard: Guarded) -> None:
    mixed = [_late(guard.case), guard.case.fired[0], *guard.case.quiet[:2]]
    guard.right(sorted(mixed, key=len), padding="left")


@_answers("several of one prompt", Ability.SAMPLES, kinds=("the prompt", "a head", "a sentence"))
def _(guard: Guarded) -> None:
    for prompt in (_late(guard.case), guard.case.quiet[0]):
        guard.right([prompt], samples=3, temperature=1e-3)


@_answers("at a high temperature", Ability.SAMPLING, kinds=("a sentence",))
def _(guard: Guarded) -> None:
    """What is said is said whatever is sampled; what comes before it is not known."""
    first_row = _crossing(guard.case, 0)
    replies = guard.ask([first_row], temperature=2.0) if first_row else []
    assert all(reply.tokens is not None for reply in replies)


@_answers("from several threads", Ability.THREADS, kinds=("the prompt", "a head"))
def _(guard: Guarded) -> None:
    guard.right([_late(guard.case), *guard.case.quiet[:2], guard.case.fired[0]], threads=True)


@_answers("with drafts from n-grams", Ability.NGRAM_DRAFTS)
def _(guard: Guarded) -> None:
    guard_each(guard, [_late(guard.case), guard.case.quiet[0], guard.case.fired[0]], drafts="ngram")


@_answers("with drafts from a smaller model", Ability.MODEL_DRAFTS)
def _(guard: Guarded) -> None:
    guard_each(guard, [_late(guard.case), guard.case.quiet[0], guard.case.fired[0]], drafts="model")


@_answers("then a further turn", Ability.CONVERSATION, kinds=("the prompt", "a head", "a layer"))
def _(guard: Guarded) -> None:
    """The whole context counts: what crossed earlier, crosses in every later turn."""
    case = guard.case
    for starts, fired in ((case.quiet, True), (case.quiet, False), ([_late(case)], True)):
        start, further = _turns(case, starts, fired)
        guard.right([start], keep=True)
        guard.right([further], keep=True)


def _turns(case: Case, starts: Sequence[str], fired: bool) -> tuple[str, str]:
    """A prompt, and a sound one that goes on behind its answer."""
    for start in starts:
        said = bytes(t for t in case.expected(start).tokens if t < 256).decode(errors="ignore")
        for text in cases.prompts_of(8):
            if sound(case, further := start + said + END + text, fired):
                return start, further
    raise AssertionError("the tiny model has no such turns")


@_answers("then the same prompt", Ability.CONVERSATION, kinds=("the prompt", "a head", "a layer"))
def _(guard: Guarded) -> None:
    for prompt in (_late(guard.case), guard.case.quiet[0]):
        guard_each(guard, [prompt] * 2, keep=True)


@_answers("two that share their beginning", Ability.CONVERSATION, kinds=("the prompt", "a head"))
def _(guard: Guarded) -> None:
    a, b = with_one_beginning(guard.case)
    guard_each(guard, [a, b, a, b], keep=True)


@_answers("two in turn on one cache", Ability.SEQUENCES, kinds=("the prompt", "a head"))
def _(guard: Guarded) -> None:
    for sequence, prompt in ((0, _late(guard.case)), (1, guard.case.quiet[0])) * 2:
        guard.right([prompt], keep=True, sequence=sequence)


@_answers("given up, then another", Ability.CANCEL, kinds=("the prompt", "a head", "a sentence"))
def _(guard: Guarded) -> None:
    case = guard.case
    guard.right([_late(case)], cancel_after=2)
    guard.right(case.quiet[:1])
    guard.right(case.quiet[:1], cancel_after=2)
    guard.right([_late(case)])


# ---------------------------------------------------------------- pictures


def _pictured(name: str, **reading: Any) -> None:
    @TABLE.shape(f"token reading: {name}", Ability.PICTURES)
    def _(trial: Trial) -> None:
        def make() -> Case:
            model = trial.ground.with_tower.model
            probes = [of_rows(linear(), **reading)]
            return cases.case(model, probes, seed=24, prompts=cases.with_pictures(24))

        case = trial.ground.case(name, make)
        with trial.guarded(case) as guard:
            shown = [p for p in case.prompts if case.model.of_picture(case.model.encode(p)).any()]
            texts = [p for p in case.prompts if p not in shown]
            fired = [p for p in shown if case.holds(p)][:2]
            quiet = [p for p in shown if not case.holds(p)][:2]
            guard_each(guard, [*fired, *quiet, *texts[:1]])


_pictured("rows of pictures", scope="prompt", rows="image")
_pictured("rows of text beside pictures", rows="text")
_pictured("all rows, pictures among them", scope="prompt")
