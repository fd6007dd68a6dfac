"""Random use of llama.cpp under `steerbridge run`, compared with the oracle of the kit.

`native/sessions.py` says what it meant, the preload tells its verdicts, and the oracle computes the
scores from the tokens alone. Used by `make fuzz`, which builds the preload with sanitizers, and by
a test.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge import reference
from steerbridge.fingerprint import ModelFacts
from steerbridge.package import SteeringPackage, parse
from steerbridge.spec import SPEC_VERSION, tensor_shapes
from steerbridge.tensors import Tensor
from steerbridge.testing.cases import at_layers, head, linear, of_rows, reading, rule
from steerbridge.testing.model import TinyModel

TESTS: Final = Path(__file__).resolve().parent
PRELOAD: Final = TESTS.parent / "plugins" / "steerbridge_run" / "native"
STUB: Final = TESTS / "native" / "stub_llama.c"
PROGRAM: Final = TESTS / "native" / "sessions.py"
TOLERANCE: Final = 2e-3  # of scores: real ones are computed in float32, in other orders
_PROBES: Final = (  # and the deepest block input that they read
    (linear("identity", readings=[reading("layer_input[2]")]), 2),
    (linear("identity", readings=[reading("layer_input[2]", "prompt_mean")]), 2),
    (of_rows(linear(), scope="prompt"), 2),
    (
        linear(
            "identity", readings=[reading("layer_input[2]", offset=-2), reading("layer_input[3]")]
        ),
        3,
    ),
    (
        linear(
            "identity",
            readings=[reading("layer_input[1]", "prompt_mean"), reading("layer_input[3]")],
        ),
        3,
    ),
    (of_rows(linear(), sites=("layer_input[3]",), scope="prompt", window=9, skip=0), 3),
    (linear("identity", readings=[reading("layer_input[4]")]), 4),
)

State = Callable[[list[int]], dict[int, np.ndarray]]


@dataclass(frozen=True)
class Backend:
    """A llama.cpp, and the states that it must show for tokens."""

    kind: str
    path: Path
    facts: ModelFacts
    states: State


def real(folder: Path) -> Backend:
    """The installed libllama, with the tiny model of the kit."""
    model = TinyModel()
    path = model.save_gguf(folder / "tiny.gguf")
    return Backend("real", path, model.facts, lambda ids: model.forward(ids)[0])


def stub(folder: Path) -> Backend:
    """The stand-in, whose states are hashes."""
    path = folder / "libllama.so"
    flags = ["-shared", "-fPIC", "-O1", "-g", f"-I{PRELOAD}"]
    subprocess.run(["cc", *flags, STUB, "-o", path, "-lm"], check=True)
    facts = ModelFacts("llama", hidden_size=8, num_layers=4, vocab_size=300, name="stub")
    return Backend("stub", path, facts, hashed)


_M1: Final = np.uint64(0xBF58476D1CE4E5B9)
_M2: Final = np.uint64(0x94D049BB133111EB)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def hashed(ids: list[int]) -> dict[int, np.ndarray]:
    """The stand-in's states [T, 8] by depth; see `value_of` in stub_llama.c."""
    with np.errstate(over="ignore"):
        hashes = np.empty(len(ids), np.uint64)
        before = np.uint64(1)
        for i, token in enumerate(ids):
            before = hashes[i] = _mixed(before * np.uint64(3) + np.uint64(token + 7))
        states = {}
        for depth in range(1, 6):
            channels = np.arange(depth * 8 + 1, depth * 8 + 9, dtype=np.uint64)
            bits = _mixed(hashes[:, None] + channels[None])
            states[depth] = ((bits >> np.uint64(40)) / np.float64(1 << 23) - 1.0).astype(np.float32)
    return states


def guard(backend: Backend, seed: int) -> SteeringPackage:
    """A package with one linear probe that fires on about half of the prompts."""
    draw = random.Random(seed)
    probe_of, deepest = _PROBES[seed % len(_PROBES)]
    block = at_layers("add_vector", deepest - 1, alpha=2.0)  # its rows stay in the cache
    acts = draw.choice([[head("dense")], [head("low_rank")], [block], [head("dense"), block]])
    raw = {
        "spec_version": SPEC_VERSION,
        "name": "fuzz",
        "base_model": backend.facts.info().model_dump(mode="json", exclude_none=True),
        "probes": [probe_of],
        "interventions": acts,
        "rules": [rule(["p"], [act["id"] for act in acts])],
    }
    spec = parse(raw)
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for _, name, shape in tensor_shapes(spec):
        sizes = [4 if isinstance(n, str) else n for n in shape]
        values = rng.normal(scale=0.5, size=sizes).astype(np.float32)
        tensors[name] = Tensor.of(values)
    package = SteeringPackage(spec, tensors)
    scores = [
        score(backend, package, [draw.randrange(97, 105) for _ in range(20)])[0] for _ in range(40)
    ]
    probe = package.spec.probes[0].replace(threshold=float(np.median(scores)))
    return package.replace(probes=(probe,))


def score(backend: Backend, package: SteeringPackage, ids: list[int]) -> tuple[float, bool]:
    """The oracle's score of a prompt, and whether it fires; a prompt too short fires."""
    states = backend.states(ids)
    depth = package.spec.depth
    [probe] = package.spec.probes
    if probe.token_reading is not None:
        x = reference.row_inputs(probe.token_reading, lambda site: states[depth(site)])
        logits = reference.row_logits(probe, package.tensors, x)
        every = np.ones(len(ids), np.bool_)
        rows = reference.judge_rows(probe, logits, every, every, len(ids) - 1)
        return rows.score, rows.fired
    verdict = reference.judge(probe, package.tensors, lambda site: states[depth(site)])
    return verdict.score, verdict.fired


def library(folder: Path, *flags: str) -> Path:
    """The preload, built with these flags of the C compiler."""
    options = [f"-DCMAKE_C_FLAGS={' '.join(flags)}", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (
        ["cmake", "-S", PRELOAD, "-B", folder, *options],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "libsteerpreload.so"


def environment(preload: Path, package: Path, events: Path, first: Sequence[str]) -> dict[str, str]:
    """What `steerbridge run` would set, with another build of the preload behind `first`."""
    return {
        **os.environ,
        "LD_PRELOAD": ":".join([*first, str(preload)]),
        "STEERBRIDGE_PACKAGE": str(package),
        "STEERBRIDGE_EVENTS": str(events),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def run(
    backend: Backend, seed: int, steps: int, preload: Path, folder: Path, first: Sequence[str] = ()
) -> tuple[int, list[str]]:
    """Steps of one program, and what was found: verdicts that differ, or a sanitizer's report."""
    package = guard(backend, seed)
    file = package.save(folder / f"{backend.kind}-{seed}.gguf")
    meant, events = folder / f"{seed}.meant", folder / f"{seed}.events"
    events.touch()
    meant.touch()
    command = [PROGRAM, backend.kind, backend.path, seed, steps, meant]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment(preload, file, events, first),
        capture_output=True,
        text=True,
        check=False,
    )
    findings = [f"exit code {done.returncode}: {done.stderr[-3000:]}"] if done.returncode else []
    told = [json.loads(line) for line in events.read_text().splitlines()]
    findings += [str(e) for e in told if e["event"] in ("refused", "failed", "stopped")]
    verdicts = [e for e in told if e["event"] == "verdict"]
    wanted = [json.loads(line) for line in meant.read_text().splitlines()]
    findings += compare(backend, package, wanted, verdicts)
    for path in (file, meant, events):
        path.unlink()
    ran = json.loads(done.stdout)["steps"] if not done.returncode else 0
    return ran, [f"{backend.kind}, seed {seed}: {finding}" for finding in findings]


def compare(
    backend: Backend, package: SteeringPackage, wanted: Sequence[Any], told: Sequence[Any]
) -> list[str]:
    findings = []
    if len(wanted) != len(told):
        findings.append(f"{len(wanted)} prompts were used, {len(told)} verdicts were told")
    limit = package.spec.probes[0].threshold
    writes = any(i.type != "head_matrix" for i in package.spec.interventions)
    known: dict[tuple[int, ...], tuple[float, bool]] = {}

    def judged(ids: list[int]) -> tuple[float, bool]:
        key = tuple(ids)
        if key not in known:
            known[key] = score(backend, package, ids)
        return known[key]

    for number, (want, event) in enumerate(zip(wanted, told, strict=False)):
        where = f"verdict {number}, on {len(want['ids'])} tokens"
        if (want["context"], want["sequence"]) != (event["context"], event["sequence"]):
            findings.append(f"{where}: another sequence: {event}")
            break
        if want["moved"]:
            continue  # rows in the cache are no longer those of these tokens
        right, fires = judged(want["ids"])
        held = [judged(h["ids"]) for h in want["held"]]
        close = [abs(s - limit) <= TOLERANCE for s, _ in (*held, (right, fires))]
        found = event["probes"][0]["score"]
        # Behind rows of an answer that a rule steered in a block nothing can be judged.
        sure = [fired is False and not c for (_, fired), c in zip(held, close, strict=False)]
        behind = writes and not (all(sure) and not any(h["moved"] for h in want["held"]))
        same = (found is None and (behind or np.isnan(right))) or (
            found is not None and abs(found - right) <= TOLERANCE
        )
        if not same:
            findings.append(f"{where}: expected {right}, found {event}")
        if any(h["moved"] for h in want["held"]) or any(close):
            continue
        if bool(event["fired"]) != (fires or any(f for _, f in held)):
            findings.append(f"{where}: {len(held)} held, expected {fires}: {event}")
        if len(findings) > 5:
            break
    return findings
