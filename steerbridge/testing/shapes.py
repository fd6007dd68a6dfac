"""The shapes of requests that a runtime is tried on: the contract as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from steerbridge.fingerprint import text_sha256
from steerbridge.testing import cases
from steerbridge.testing.cases import NEW, Case, at_layers, cosine, head, linear, mlp, rule
from steerbridge.testing.driver import Ability, Driver, How
from steerbridge.testing.kit import Guarded, Lacking, Shape, Trial, Wrong
from steerbridge.testing.model import EOS, NAN, OVERFLOW, TRAP_LAYER, VOCAB
from steerbridge.testing.oracle import answer

LONG: Final = 150  # tokens of a long answer
FEW: Final = 24  # prompts for a package of a certain kind
KINDS: Final = {
    "head": "",
    "layers": ", steering a layer",
    "mean": ", reading a mean",
    "earlier": ", reading an earlier token",
    "both": ", reading and steering at several places",
}
_SHAPES: list[Shape] = []


def shape(name: str, *needs: Ability) -> Callable[[Callable[[Trial], None]], None]:
    """Add a shape to the table."""

    def add(run: Callable[[Trial], None]) -> None:
        _SHAPES.append(Shape(name, run, frozenset(needs)))

    return add


def each(
    name: str, *needs: Ability, kinds: Sequence[str] = ("head", "mean", "layers")
) -> Callable[[Callable[[Guarded], None]], None]:
    """Add a shape for each kind of package; it is given a running guard."""

    def add(run: Callable[[Guarded], None]) -> None:
        for kind in kinds:

            @shape(name + KINDS[kind], *needs)
            def _(trial: Trial, kind: str = kind) -> None:
                with trial.guarded(kind) as guard:
                    run(guard)

    return add


def first(prompts: Iterable[str], wanted: Callable[[str], bool], what: str) -> str:
    """The first prompt that will do; the tiny model has many."""
    found = next((p for p in prompts if wanted(p)), None)
    assert found is not None, f"the tiny model has no prompt for: {what}"
    return found


# ------------------------------------------------------------ prompts


@shape("a quiet prompt")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.quiet[:1])


@shape("a prompt that fires")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.fired[:1])


@shape("many prompts, one after another")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for pair in zip(guard.case.fired[:8], guard.case.quiet[:8], strict=True):
            for prompt in pair:
                guard.right([prompt])


def _of_length(case: Case, length: int) -> Iterator[str]:
    """Sound prompts of a length, quiet ones and ones that fire in turn."""
    stem = "".join(cases.prompts_of(5, count=2 + length // 3))
    sides: dict[bool, str] = {}
    for start in range(len(stem)):
        prompt = (stem[start:] + stem[:start])[:length]
        if case.sound(prompt):
            sides.setdefault(bool(case.expected(prompt, 1).outcome.rules), prompt)  # type: ignore[union-attr]
        if len(sides) == 2:
            break
    return iter(sides.values())


def _length_shape(name: str, length: Callable[[Driver], int]) -> None:
    @each(name, kinds=("head", "mean"))
    def _(guard: Guarded) -> None:
        for prompt in _of_length(guard.case, length(guard.driver)):
            guard.right([prompt])


_length_shape("prompts of one token", lambda _: 1)
_length_shape("prompts of two tokens", lambda _: 2)
_length_shape("prompts of exactly one batch", lambda driver: driver.batch)
_length_shape("prompts of one batch and a token", lambda driver: driver.batch + 1)
_length_shape("prompts of two batches and a token", lambda driver: 2 * driver.batch + 1)


@shape("a prompt longer than the context")
def _(trial: Trial) -> None:
    """A runtime without a limit answers it; one with a limit refuses it before a token."""
    with trial.guarded() as guard:
        guard.right(["ab" * (trial.driver.context // 2 + 1)], new=1)


@shape("a prompt of characters of several bytes")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        texts = [f"{p}é€\N{SNOWMAN}{p[:4]}" for p in cases.prompts_of(6)]
        for fired in (True, False):
            sound = [p for p in texts if _sound(guard.case, p, fired)]
            guard.right(sound[:1])


def _sound(case: Case, prompt: str, fired: bool) -> bool:
    outcome = case.expected(prompt, 1).outcome
    assert outcome is not None
    return bool(outcome.rules) == fired and case.sound(prompt)


@shape("an answer of many tokens")
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for prompts in (guard.case.fired, guard.case.quiet):
            best = max(prompts[:6], key=lambda p: guard.case.expected(p, LONG).margin)
            guard.right([best], LONG)


# ------------------------------------------------------------ batches


@each("a batch of prompts that fire and quiet ones", Ability.BATCH)
def _(guard: Guarded) -> None:
    guard.right([guard.case.quiet[0], guard.case.fired[0], guard.case.quiet[1]])


@shape("a batch of eight", Ability.BATCH)
def _(trial: Trial) -> None:
    with trial.guarded("both") as guard:
        guard.right([*guard.case.fired[:4], *guard.case.quiet[:4]])


@shape("the same prompt twice in a batch", Ability.BATCH)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right([guard.case.fired[0], guard.case.fired[0], guard.case.quiet[0]])


def _padded(side: str) -> None:
    @each(
        f"a batch padded on the {side}",
        Ability.BATCH,
        Ability.PADDING,
        kinds=("head", "mean", "earlier"),
    )
    def _(guard: Guarded) -> None:
        mixed = [*guard.case.fired[:2], *guard.case.quiet[:2]]
        guard.right(sorted(mixed, key=len), padding=side)


_padded("left")
_padded("right")


@shape("quiet logits are bit-identical to the unsteered model's", Ability.LOGITS)
def _(trial: Trial) -> None:
    for which in ("head", "layers", "mean"):
        quiet = trial.case(which).quiet[:3]
        plain = [trial.plain([p])[0] for p in quiet]
        with trial.guarded(which) as guard:
            for prompt, want in zip(quiet, plain, strict=True):
                [reply] = guard.right([prompt])
                _same_bits(prompt, reply.logits, want.logits)


@shape("a quiet neighbour in a batch keeps its logits", Ability.BATCH, Ability.LOGITS)
def _(trial: Trial) -> None:
    for which in ("head", "layers"):
        case = trial.case(which)
        batch = [case.quiet[0], case.fired[0], case.quiet[1]]
        plain = trial.plain(batch)
        with trial.guarded(which) as guard:
            replies = guard.right(batch)
        for i in (0, 2):
            _same_bits(batch[i], replies[i].logits, plain[i].logits)


def _same_bits(prompt: str, got: Any, want: Any) -> None:
    if got is None or want is None:
        raise Wrong(f"{prompt!r}: no logits, although the driver reads them")
    if not np.array_equal(got, want):
        raise Wrong(f"{prompt!r}: logits differ by {np.abs(got - want).max()}")


@shape("steered logits equal the oracle's", Ability.LOGITS)
def _(trial: Trial) -> None:
    for which in ("head", "layers", "both"):
        with trial.guarded(which) as guard:
            prompt = guard.case.fired[0]
            [reply] = guard.right([prompt])
            want = guard.case.expected(prompt, 1).logits
            if reply.logits is None:
                raise Wrong(f"{prompt!r}: no logits, although the driver reads them")
            off = np.abs(reply.logits - want).max() / max(1.0, np.abs(want).max())
            if off > trial.driver.tolerance:
                raise Wrong(f"{prompt!r}: logits are off by {off}")


# ------------------------------------------------------------ one cache, many requests


def _in_turn(guard: Guarded, prompts: Sequence[str]) -> None:
    """One prompt after another on the same cache."""
    for prompt in prompts:
        guard.right([prompt], keep=True)


@each("the same prompt again", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    for prompts in (guard.case.fired, guard.case.quiet):
        _in_turn(guard, [prompts[0]] * 3)


def _longer(case: Case, prompt: str, more: Sequence[str], fired: bool) -> str:
    texts = (prompt + text for text in more)
    return first(texts, lambda p: _sound(case, p, fired), f"an extension of {prompt!r}")


_ONE: Final = [chr(c) for c in range(33, 127)]


@each("a prompt that extends the last by one token", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    case, pairs = guard.case, 0
    for fired, prompts in ((True, case.quiet), (False, case.fired)):
        for prompt in prompts:
            texts = (prompt + c for c in _ONE)
            more = next((p for p in texts if _sound(case, p, fired)), None)
            if more is not None:
                _in_turn(guard, [prompt, more])
                pairs += 1
                break
    assert pairs, "the tiny model has no such prompts"


@shape("a prompt that grows token by token", Ability.CONVERSATION)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        whole = first(guard.case.fired, lambda p: len(p) > 12, "a longer prompt")
        for length in range(len(whole) - 6, len(whole) + 1):
            if guard.case.sound(whole[:length]):
                guard.right([whole[:length]], keep=True)


@each(
    "a further turn, behind the answer",
    Ability.CONVERSATION,
    kinds=("head", "mean", "layers", "earlier"),
)
def _(guard: Guarded) -> None:
    case = guard.case
    for start in (case.quiet[0], case.fired[0]):
        said = bytes(case.expected(start).tokens).decode()
        turns = cases.prompts_of(8)
        for fired in (True, False):
            _in_turn(guard, [start, _longer(case, start + said, turns, fired)])


@each("a prompt that is a prefix of the last", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    case = guard.case
    for fired in (True, False):
        start = (case.fired if fired else case.quiet)[0]
        longer = _longer(case, start, cases.prompts_of(9), not fired)
        _in_turn(guard, [longer, start])


@each("prompts that share their beginning", Ability.CONVERSATION)
def _(guard: Guarded) -> None:
    case, stem = guard.case, guard.case.quiet[0]
    ends = cases.prompts_of(10)
    a, b = (_longer(case, stem, ends, fired) for fired in (True, False))
    _in_turn(guard, [a, b, a, b])


@each("two conversations in turn on one cache", Ability.SEQUENCES)
def _(guard: Guarded) -> None:
    for a, b in zip(guard.case.fired[:3], guard.case.quiet[:3], strict=True):
        guard.right([a], keep=True, sequence=0)
        guard.right([b], keep=True, sequence=1)


@each("a cancelled answer, then another prompt", Ability.CANCEL)
def _(guard: Guarded) -> None:
    case = guard.case
    guard.right(case.fired[:1], cancel_after=3)
    guard.right(case.quiet[:1])
    guard.right(case.quiet[1:2], cancel_after=3)
    guard.right(case.fired[1:2])


@each("a cancelled answer, then the same prompt", Ability.CANCEL)
def _(guard: Guarded) -> None:
    for prompt in (guard.case.fired[0], guard.case.quiet[0]):
        guard.right([prompt], cancel_after=2)
        guard.right([prompt])


# ------------------------------------------------------------ ways to generate


@shape("streaming", Ability.STREAM)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.fired[:1], stream=True)
        guard.right(guard.case.quiet[:1], stream=True)


@shape("sampling at a very low temperature", Ability.SAMPLING)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for prompts in (guard.case.fired, guard.case.quiet):
            for prompt in prompts[:2]:
                guard.right([prompt], temperature=1e-3)


@shape("several answers to one prompt", Ability.SAMPLES)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        guard.right(guard.case.fired[:1], samples=3, temperature=1e-3)
        guard.right(guard.case.quiet[:1], samples=2, temperature=1e-3)


@shape("beam search", Ability.BEAMS)
def _(trial: Trial) -> None:
    """Which beam wins is the runtime's choice; the verdict is not, nor a quiet prompt's beams."""
    case = trial.case()
    quiet, fired = case.quiet[:1], case.fired[:1]
    plain = [trial.plain(prompts, beams=3)[0].tokens for prompts in (quiet, fired)]
    with trial.guarded() as guard:
        if guard.right(quiet, beams=3)[0].tokens != plain[0]:
            raise Wrong("a quiet prompt has other beams than without the package")
        if guard.right(fired, beams=3)[0].tokens == plain[1]:
            raise Wrong("a prompt that fires has the beams of the unsteered model")


@shape("requests from several threads", Ability.THREADS)
def _(trial: Trial) -> None:
    with trial.guarded("both") as guard:
        mixed = [p for pair in zip(guard.case.fired, guard.case.quiet, strict=False) for p in pair]
        guard.right(mixed[:8], threads=True)


@shape("drafts from n-grams", Ability.NGRAM_DRAFTS)
def _(trial: Trial) -> None:
    with trial.guarded() as guard:
        for prompt in (guard.case.fired[0], guard.case.quiet[0], guard.case.fired[1]):
            repeated = prompt + prompt
            text = repeated if guard.case.sound(repeated, 16) else prompt
            guard.right([text], 16 if text is repeated else NEW, drafts="ngram")


@shape("drafts from a smaller model", Ability.MODEL_DRAFTS)
def _(trial: Trial) -> None:
    """The drafting model has other weights, so most of its drafts are rejected."""
    with trial.guarded() as guard:
        for prompt in (guard.case.fired[0], guard.case.quiet[0], guard.case.fired[1]):
            guard.right([prompt], drafts="model")


# ------------------------------------------------------------ every probe, reading, intervention


def package_shape(name: str, **parts: Any) -> None:
    """A shape that asks some prompts with a package of a certain kind."""

    @shape(name)
    def _(trial: Trial) -> None:
        case = trial.ground.case(name, lambda: cases.case(trial.model, count=FEW, **parts))
        assert min(len(case.fired), len(case.quiet)) >= 2 or not parts.get("probes", True), name
        with trial.guarded(case) as guard:
            for prompt in (*case.fired[:3], *case.quiet[:3]):
                guard.right([prompt])


def _probe(name: str, probe: cases.Json, **more: Any) -> None:
    package_shape(f"probe: {name}", probes=[{**probe, **more}])


_probe("linear", linear("identity"))
_probe("linear with a sigmoid", linear())
_probe("fires at or above the threshold", linear(comparator=">="))
_probe("fires below the threshold", linear(comparator="<"))
_probe("fires at or below the threshold", linear(comparator="<="))
_probe("MLP, ReLU, softmax", mlp())
_probe("MLP, tanh, softmax", mlp("tanh"))
_probe("MLP, GELU, softmax", mlp("gelu"))
_probe("MLP of three layers", mlp(layers=3))
_probe("MLP, sigmoid, high is harm", mlp(output={"type": "sigmoid", "harmful_when": "high"}))
_probe("MLP, sigmoid, low is harm", mlp(output={"type": "sigmoid", "harmful_when": "low"}))
_probe("cosine", cosine())
_probe("cosine without a squash", cosine("none"))
_probe("standardised inputs", linear(), input_mean="p.mean", input_scale="p.scale")


def _reading(name: str, *readings: cases.Json) -> None:
    package_shape(f"reading: {name}", probes=[linear(readings=readings)])


_reading("an earlier token", cases.reading("layer_input[2]", offset=-2))
_reading("the mean of the prompt", *cases.means())
_reading("the first block's output", cases.reading("layer_input[1]"))
_reading("a layer's output", cases.reading("layer_output[1]"))
_reading("the last block's input", cases.reading("layer_input[3]"))
_reading("the input of the final norm", cases.reading(cases.LAST))
_reading("several places", *cases.END, cases.reading("layer_input[1]"), *cases.means())
_reading(
    "images, in a prompt without one",
    *cases.END,
    cases.reading("layer_input[2]", "image_mean"),
)


def _acts(name: str, *acts: cases.Json, probes: Sequence[cases.Json] = (linear(),)) -> None:
    package_shape(f"intervention: {name}", probes=probes, interventions=acts)


_acts("a dense head", head("dense"))
_acts("a head of low rank", head())
_acts("a vector at one layer", at_layers("add_vector", 2, alpha=2.0))
_acts("a vector at several layers", at_layers("add_vector", 1, 2, alpha=1.5))
_acts("a projection", at_layers("project_out", 2, alpha=0.8))
_acts("a head and a vector", head(), at_layers("add_vector", 2, alpha=1.0))


def _unconditional(name: str, act: cases.Json) -> None:
    package_shape(
        f"rule: unconditional, {name}",
        probes=[],
        interventions=[act],
        rules=[rule(None, [act["id"]])],
    )


_unconditional("a head", head())
_unconditional("a vector from the prompt end", at_layers("add_vector", 2, alpha=2.0))
_unconditional(
    "a vector at all positions", at_layers("add_vector", 1, alpha=1.0, position="all_positions")
)

_TWO: Final = [linear(id="p"), linear(id="q", readings=cases.means())]
package_shape("rule: any of two probes", probes=_TWO)
package_shape("rule: all of two probes", probes=_TWO, rules=[rule(["p", "q"], ["h"], "all")])
package_shape(
    "rule: strength by score",
    rules=[rule(["p"], ["h"], strength={"type": "score", "probe": "p", "scale": 1.5})],
)
package_shape(
    "rule: two rules of two probes",
    probes=_TWO,
    interventions=[head(), at_layers("add_vector", 2, alpha=2.0)],
    rules=[rule(["p"], ["h"]), rule(["q"], ["v"], id="s")],
)


# ------------------------------------------------------------ what fails closed


@shape("a state that is not a number")
def _(trial: Trial) -> None:
    for which in ("head", "mean"):
        with trial.guarded(which) as guard:
            _unjudged(guard, guard.case.quiet[0] + NAN)
            guard.right(guard.case.quiet[:1])


@shape("an infinite state that a sigmoid would hide")
def _(trial: Trial) -> None:
    """Channel 0 overflows; with a negative weight the logit is minus infinity, its sigmoid 0."""
    site = f"layer_input[{TRAP_LAYER + 1}]"
    case = trial.ground.case("overflow", lambda: _negative(trial, site))
    with trial.guarded(case) as guard:
        _unjudged(guard, case.quiet[0] + OVERFLOW)
        guard.right(case.quiet[:1])


def _negative(trial: Trial, site: str) -> Case:
    case = cases.case(trial.model, probes=[linear(readings=[cases.reading(site)])], seed=11)
    weight = case.package.tensors["p.weight"]
    if weight.float32()[0] < 0:
        return case
    return cases.case(trial.model, probes=[linear(readings=[cases.reading(site)])], seed=12)


def _unjudged(guard: Guarded, prompt: str) -> None:
    """Ask a prompt that cannot be judged: its rule must hold. Its tokens mean nothing."""
    [reply] = guard.ask([prompt])
    if reply.outcome is None:
        return
    outcome = reply.outcome
    if not (outcome.fired and outcome.rules):
        raise Wrong(f"{prompt!r} cannot be judged, and did not fire: {outcome}")
    silent = [v.probe for v in outcome.verdicts if not v.unjudged]
    if silent:
        raise Wrong(f"{prompt!r} cannot be judged, and the verdict of {silent} does not say so")


@shape("a neighbour of a state that is not a number", Ability.BATCH)
def _(trial: Trial) -> None:
    case = trial.case()
    quiet, want = case.quiet[0], case.expected(case.quiet[0])
    batch = [quiet, case.quiet[1] + NAN, quiet]
    if any(reply.tokens not in (None, want.tokens) for reply in trial.plain(batch)[::2]):
        raise Lacking("without a package, too, NaN reaches the other sequences of a batch")
    with trial.guarded() as guard:
        replies = guard.ask(batch)
        for reply in replies[::2]:
            if reply.outcome is not None and reply.outcome.fired:
                raise Wrong(f"{quiet!r} fired beside a prompt that cannot be judged")
            if reply.tokens is not None and reply.tokens != want.tokens:
                raise Wrong(f"{quiet!r} got other tokens beside a prompt that cannot be judged")


@shape("a prompt shorter than its reading needs")
def _(trial: Trial) -> None:
    with trial.guarded("earlier") as guard:
        short = first(_ONE, lambda p: guard.case.expected(p).margin > 0.02, "one token")
        guard.right([short])
        guard.right(guard.case.quiet[:1])


@shape("a package for another model")
def _(trial: Trial) -> None:
    package = trial.case().package
    for change in ({"vocab_size": VOCAB + 1}, {"tokenizer_sha256": "0" * 64}):
        other = package.replace(base_model=package.spec.base_model.replace(**change))
        with (
            trial.refusal(f"a package for a model with another {next(iter(change))}"),
            trial.driver.open(trial.ground.files, other) as running,
        ):
            running.ask(["hello"], 1, How())


@shape("a package for another chat template", Ability.TEMPLATE)
def _(trial: Trial) -> None:
    package = trial.case().package
    base = package.spec.base_model
    other = package.replace(base_model=base.replace(chat_template_sha256=text_sha256("another")))
    with (
        trial.refusal("a package for another chat template"),
        trial.driver.open(trial.ground.templated, other) as running,
    ):
        running.ask(["hello"], 1, How())


@shape("a hook that was removed", Ability.BREAK)
def _(trial: Trial) -> None:
    for which in ("head", "layers"):
        with trial.guarded(which) as guard:
            guard.right(guard.case.fired[:1])
            guard.running.break_hook()
            with trial.refusal("a request without the hook"):
                guard.ask(guard.case.fired[:1])


@shape("a restart in the middle", Ability.RESTART)
def _(trial: Trial) -> None:
    for _ in range(2):
        with trial.guarded("mean") as guard:
            guard.right(guard.case.fired[:1])
            guard.right(guard.case.quiet[:1])


@shape("the unsteered model after the guard")
def _(trial: Trial) -> None:
    """A package leaves no trace on a model that is opened again without it."""
    with trial.guarded() as guard:
        prompt = guard.case.fired[0]
        guard.right([prompt])
    [reply] = trial.plain([prompt])
    plain = answer(trial.model, None, trial.model.encode(prompt), NEW)
    if reply.tokens is not None and reply.tokens != plain.tokens:
        raise Wrong(f"{prompt!r}: expected {plain.tokens}, found {reply.tokens}")


@shape("a probe that acts on nothing")
def _(trial: Trial) -> None:
    """Verdicts alone: no rule, no intervention."""
    name = "a probe that acts on nothing"
    case = trial.ground.case(
        name, lambda: cases.case(trial.model, interventions=[], rules=[], seed=13)
    )
    with trial.guarded(case) as guard:
        for prompt in case.prompts[:4]:
            guard.right([prompt])


SHAPES: Final = tuple(_SHAPES)
assert len({s.name for s in SHAPES}) == len(SHAPES)
assert EOS  # answers of the tiny model never end by themselves
