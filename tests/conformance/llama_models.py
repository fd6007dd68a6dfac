"""Architectures of llama.cpp, steered in process: a part of `make conformance-models`.

Tiny random models of transformers are turned into GGUF files by llama.cpp's own converter. Where
both compute the same logits without a guard, verdicts and tokens must be those of the numpy
reference on the hidden states of transformers: each prompt alone, in small batches, and on a cache
that holds another prompt. The last line is one JSON object. `--update` writes the pins and
docs/models.md.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # what tests share
import converting
import helpers
import models_page
import programs
from model_oracle import (
    MARGIN,
    NEW,
    TOLERANCE,
    Greedy,
    Plain,
    acting,
    agree,
    half_fired,
    judged,
    same,
)
from model_types import PROMPTS, TYPES, Absent, chosen, short, tiny
from models_page import Found
from steerbridge.atomic import replacing
from steerbridge.errors import SteerbridgeError, UnsupportedFeature
from steerbridge.package import SteeringPackage
from steerbridge.testing.kit import Status, Wrong
from steerbridge.testing.pins import Pins
from steerbridge_llama_cpp import steer
from steerbridge_llama_cpp.native import NativeSession, Shape

# What `doctor` knows of it.
TRIED: Final = Path(__file__).resolve().parent.parent.parent / "steerbridge" / "architectures.json"
# The largest difference of logits, relative to the largest of them: of float32, and where
# llama.cpp has a table of F16 (GELU).
EXACT: Final = 1e-5
ROUNDED: Final = 5e-3
# Settings that llama.cpp takes for granted.
_ONE_GROUP: Final = {"n_group": 1, "topk_group": 1}
_ALL_HEADS: Final = {"num_key_value_heads": 4}  # the converter reads no groups
_SECTIONS: Final = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "mrope_section": [2, 1, 1],
}
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "afmoe": {"mup_enabled": True},
    "deepseek_v3": {**_ONE_GROUP, "num_nextn_predict_layers": 0},
    "deepseek_v32": {**_ONE_GROUP, "num_nextn_predict_layers": 0},
    "dots1": {**_ALL_HEADS, **_ONE_GROUP},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4},
    "falcon_mamba": {"intermediate_size": 64},
    "glm4_moe_lite": _ONE_GROUP,
    "qwen3_5": {"text_config": {"rope_parameters": _SECTIONS}},
    "qwen3_5_moe": {"text_config": {"rope_parameters": _SECTIONS}},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"text_config": {"query_pre_attn_scalar": 8}},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"attention_chunk_size": 64},
    "mamba": {"intermediate_size": 64},
    "mistral": {"sliding_window": None},
    "olmoe": _ALL_HEADS,
    "phi": {**_ALL_HEADS, "intermediate_size": 128},
    "phi3": {"vocab_size": 104},
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_5_moe_text": {"rope_parameters": _SECTIONS},
    "qwen3_5_text": {"rope_parameters": _SECTIONS},
    "solar_open": _ONE_GROUP,
}
# What has another name in older versions of transformers, or a default that the converter does not
# know.
_OLDER: Final[dict[str, dict[str, Any]]] = {
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "deepseek_v32": {"scoring_func": "sigmoid"},
    "exaone_moe": {"scoring_func": "sigmoid"},
    "falcon_h1": {"head_dim": 8},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "scoring_func": "sigmoid"},
    "gpt2": {"n_ctx": 128},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "dots1": {"scoring_func": "sigmoid"},
    "minimax_m2": {"rotary_dim": 8, "scoring_func": "sigmoid"},
}
_TOKENIZER: Final = {"model": {"vocab": {chr(i): i for i in range(96)}}, "added_tokens": []}
CONTEXT: Final = 128

_ERROR: Final = 4  # GGML_LOG_LEVEL_ERROR
_errors: list[str] = []  # that llama.cpp told


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, data: Any) -> None:
    if level == _ERROR:
        _errors.append(text.decode(errors="replace").strip())


llama_cpp.llama_log_set(_log, None)


@dataclass
class Trial:
    """A GGUF file, and what a guard must make of it."""

    path: Path
    plain: Plain
    package: SteeringPackage
    tolerance: float
    told: bool = False  # whether a token was given

    def alone(self) -> None:
        """Each prompt by itself."""
        for ids in PROMPTS:
            self._each([ids])

    def in_small_batches(self) -> None:
        """In batches of four rows, computed in parts of two."""
        self._each(PROMPTS, n_batch=4, n_ubatch=2)

    def on_one_cache(self) -> None:
        """Behind one another, some with the beginning of the one before."""
        self._each([PROMPTS[2], PROMPTS[2][:5], [*PROMPTS[2][:5], 50, 51, 52], PROMPTS[0]])

    def _each(self, prompts: Sequence[list[int]], **options: Any) -> None:
        llama = opened(self.path, **options)
        with steer(llama, self.package) as session:
            for ids in prompts:
                want = judged(self.package, self.plain.states(ids))
                expected = self.plain.greedy(ids, acting(self.package, want), self.package)
                answer = greedy(llama, ids)
                self.told = True
                self._compare(session.outcomes[0].verdicts[0], answer, want, expected)

    def _compare(self, got: Any, answer: list[int], want: Any, expected: list[Greedy]) -> None:
        if not same(got, want, self.tolerance):
            raise Wrong(
                f"score {got.score:.6g} ({got.fired}), expected {want.score:.6g} ({want.fired})"
            )
        if not agree(answer, expected[: len(answer)]):
            raise Wrong(f"tokens {answer}, expected {[g.token for g in expected]}")


def opened(path: Path, **options: Any) -> Any:
    """A Llama that computes in float32."""
    exact = {"flash_attn_type": 0, "type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1}
    return llama_cpp.Llama(str(path), verbose=False, **{"n_ctx": CONTEXT, **exact, **options})


def greedy(llama: Any, ids: list[int], new: int = NEW) -> list[int]:
    """Greedy tokens, up to one that ends generation."""
    answer: list[int] = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        answer.append(int(token))
        if len(answer) == new or token == converting.EOS:
            break
    return answer


def tried(name: str, folder: Path, converter: converting.Converter) -> Found:
    """What the adapter makes of a type."""
    found = Found()
    try:
        found.status, found.note = _tried(name, folder, converter, found)
    except (Absent, converting.NotConverted) as error:
        found.status, found.note = "absent", str(error)
    return found


def _tried(
    name: str, folder: Path, converter: converting.Converter, found: Found
) -> tuple[Status, str]:
    model = tiny(name, **SETTINGS.get(name, {}))
    path = folder / f"{name}.gguf"
    found.architecture = converter.convert(saved(model, name, folder), path)
    apart = _apart(model, path)
    if apart > ROUNDED:
        raise Absent(f"computes another model (logits are off by {apart:.2g})")
    wider = max(1.0, apart / EXACT)
    plain = Plain(model, MARGIN * wider)
    trial = Trial(path, plain, half_fired(plain), TOLERANCE * wider)
    checks = (trial.alone, trial.in_small_batches, trial.on_one_cache)
    try:
        for check in checks:
            check()
    except SteerbridgeError as error:
        status: Status = "wrong" if trial.told else "refused"
        return status, f"{check.__name__}: {short(error)}"
    except Exception as error:
        return "wrong", f"{check.__name__}: {short(error)}"
    return "right", "" if wider == 1 else f"logits agree within {apart:.0e}"


def isolated(name: str, converter: converting.Converter) -> Found:
    """The same in a process of its own, which llama.cpp may end."""
    fork = multiprocessing.get_context("fork")
    mine, its = fork.Pipe(duplex=False)

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers', of random models
            its.send(asdict(tried(name, Path(folder), converter)))

    process = fork.Process(target=work)
    process.start()
    its.close()
    try:
        return Found(**mine.recv())
    except EOFError:
        return Found(status="absent", note="ends the process")
    finally:
        process.join()


def saved(model: Any, name: str, folder: Path) -> Path:
    """The model as a folder that the converter reads."""
    place = folder / name
    model.save_pretrained(place)
    config = place / "config.json"
    known = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**known, **_OLDER.get(name, {})}), "utf-8")
    (place / "tokenizer.json").write_text(json.dumps(_TOKENIZER), "utf-8")
    return place


def _apart(model: Any, path: Path) -> float:
    """How far logits of the two are apart, see `EXACT`."""
    _errors.clear()
    try:
        llama = opened(path, logits_all=True)
    except ValueError as error:
        said = next((line for line in _errors if "error loading" in line), str(error))
        raise Absent(f"does not load it: {said.rpartition('error loading model: ')[2]}") from error
    worst = 0.0
    for ids in PROMPTS:
        with torch.no_grad():
            want = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
        llama.reset()
        llama.eval(ids)
        got = np.array(llama.scores[: len(ids)])
        difference = float(
            np.abs(got - want[:, : got.shape[1]]).max() / max(1.0, np.abs(want).max())
        )
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


# ---------------------------------------------------------------- results


def _write(found: Mapping[str, Found], architectures: Sequence[str]) -> None:
    content = {
        "title": programs.llama_cpp(),
        "types": {name: asdict(found[name]) for name in sorted(found)},
        "architectures": {name: refusal(name) for name in sorted(architectures)},
    }
    right = {one.architecture for one in found.values() if one.status == "right"}
    right = sorted({*right, *models_page.PICTURES})
    for path, part in ((models_page.LLAMA_CPP, content), (TRIED, right)):
        with replacing(path) as fresh:
            fresh.write_text(json.dumps(part, indent=1, ensure_ascii=False) + "\n", "utf-8")


def refusal(architecture: str) -> str:
    """Which sites of an architecture the adapter refuses: `blocks`, `head`; empty if none."""
    library = llama_cpp.llama_cpp._lib
    shape = Shape(architecture, helpers.FACTS.hidden_size, helpers.FACTS.num_layers, 8, 1)
    told = []
    acts = {"blocks": helpers.add_vector(2, alpha=1.0), "head": helpers.head()}
    for name, act in acts.items():
        rule = helpers.rule(None, [act["id"]])
        package = helpers.package(probes=[], interventions=[act], rules=[rule])
        try:
            NativeSession(package, shape, library)
        except UnsupportedFeature:
            told.append(name)
    return ", ".join(told)


def main() -> int:
    """Try the chosen types; 1 if one is wrong, or not as pinned."""
    options = chosen(__doc__)
    start = time.monotonic()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    known = models_page.read_llama().types if models_page.LLAMA_CPP.is_file() else {}
    run: dict[str, Found] = {}
    with converting.running(programs.converter()) as converter:
        for name in options.types:
            run[name] = found = isolated(name, converter)
            line = f"{name}: {found.architecture} {found.status} {found.note}"
            print(line.rstrip(), file=sys.stderr, flush=True)
        architectures = converter.architectures()
    pins = Pins("real", {name: known[name].result for name in run if name in known})
    differences = pins.differences({name: found.result for name, found in run.items()})
    for line in differences:
        print(line, file=sys.stderr)
    if options.update:
        _write({**{n: f for n, f in known.items() if n in TYPES}, **run}, architectures)
        models_page.write()
    counts = Pins("real", {name: found.result for name, found in run.items()}).counts()
    right = {found.architecture for found in run.values() if found.status == "right"}
    told = {**counts, "architectures": len(right), "as_pinned": not differences}
    print(json.dumps({**told, "seconds": round(time.monotonic() - start)}))
    return int(bool(counts["wrong"] or (differences and not options.update)))


if __name__ == "__main__":
    sys.exit(main())
