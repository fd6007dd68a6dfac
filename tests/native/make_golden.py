"""Golden values for the C tests, and seeds for the fuzzer, computed by the numpy oracle.

    PYTHONPATH=. python tests/native/make_golden.py OUT

Writes OUT/<name>.gguf (a package) with OUT/<name>.golden (inputs and expected outputs) and
OUT/seeds/*.gguf with OUT/json.dict. Layout of a golden file, little endian:

    "SHG1", i32 d, n_layer, n_depths, depths[n_depths], n_probes, n_rules, n_requests
    per request: i32 n_rows, n_prompt, first_image, last_image (exclusive)
        per depth: f32 input [n_rows, d], f32 expected [n_rows, d]
        per probe: f64 score, i32 fired;  per rule: i32 fired, f64 strength
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from steerbridge import _json, reference
from steerbridge.package import SteeringPackage, parse
from steerbridge.spec import SPEC_VERSION, sites
from steerbridge.tensors import Tensor

N_LAYER = 4
RNG = np.random.default_rng(7)


class Builder:
    """Collects tensors under the names that a spec uses for them."""

    def __init__(self, d: int, dtype: str = "F32") -> None:
        self.d, self.dtype = d, dtype
        self.tensors: dict[str, Tensor] = {}

    def new(self, *shape: int, scale: float = 1.0, positive: bool = False) -> str:
        name = f"t.{len(self.tensors)}"
        values = RNG.normal(0, scale, shape)
        self.tensors[name] = Tensor.of(np.abs(values) + 0.5 if positive else values, self.dtype)
        return name

    def unit(self) -> str:
        v = RNG.normal(size=self.d)
        self.tensors[name := f"t.{len(self.tensors)}"] = Tensor.of(
            v / np.linalg.norm(v), self.dtype
        )
        return name

    def mlp(self, id: str, readings: list[Any], sizes: list[int], output: Any, **more: Any) -> Any:
        width = self.d * len(readings)
        layers = []
        for size in [*sizes, len(output.get("classes", "1"))]:
            weight = self.new(size, width, scale=width**-0.5)
            layers.append({"weight": weight, "bias": self.new(size, scale=0.3)})
            width = size
        return {
            "id": id,
            "type": "mlp",
            "readings": readings,
            "layers": layers,
            "output": output,
            "comparator": ">",
            "threshold": 0.5,
            **more,
        }

    def package(
        self, probes: list[Any], interventions: list[Any], rules: list[Any], **more: Any
    ) -> SteeringPackage:
        spec = {
            "spec_version": SPEC_VERSION,
            "name": "golden é\U0001f600",
            "base_model": {
                "name": "m",
                "model_type": "llama",
                "hidden_size": self.d,
                "num_layers": N_LAYER,
                "vocab_size": 11,
                "future": [1, {"x": None}],
            },
            "probes": probes,
            "interventions": interventions,
            "rules": rules,
            **more,
        }
        return SteeringPackage(parse(spec), self.tensors)


def at(stream: str, layer: int | None = None, position: str = "prompt_end", **more: Any) -> Any:
    site = {"stream": stream} if layer is None else {"stream": stream, "layer": layer}
    return {"site": site, "position": {"type": position, **more}}


def target(stream: str, layer: int, vector: str) -> Any:
    return {"site": {"stream": stream, "layer": layer}, "vector": vector}


def rule(
    id: str, probes: list[str], interventions: list[str], strength: Any = None, how: str = "any"
) -> Any:
    return {
        "id": id,
        "condition": {"type": how, "probes": probes} if probes else None,
        "interventions": interventions,
        "strength": strength or {"type": "constant", "value": 1.0},
    }


SOFTMAX = {"type": "softmax", "classes": ["safe", "harm"], "harmful": "harm"}


def head_guard(d: int, dtype: str) -> SteeringPackage:
    """The paper's guard: an mlp at one layer, a low-rank head."""
    b = Builder(d, dtype)
    probe = b.mlp(
        "p",
        [at("layer_input", 2)],
        [9],
        SOFTMAX,
        activation="relu",
        input_mean=b.new(d),
        input_scale=b.new(d, positive=True),
    )
    head = {
        "id": "h",
        "type": "head_matrix",
        "position": "from_prompt_end",
        "eps": 0.1,
        "weight": {"form": "low_rank", "u": b.new(d, 3), "v": b.new(3, d)},
    }
    plain = {"runtime": "llama.cpp", "quantisation": "Q4_1", "thresholds": {"p": 0.25}}
    checkpoint = {
        **plain,
        "quantisation": "Q5_1",
        "weights": "00112233445566778899aabbccddeeff" * 2,
    }
    entries = [plain, checkpoint]
    return b.package([probe], [head], [rule("r", ["p"], ["h"])], calibrations=entries)


def layer_guard(d: int, dtype: str) -> SteeringPackage:
    """Offsets and a mean; strength from the score; adds and projections, some in the last block."""
    b = Builder(d, dtype)
    readings = [
        at("layer_output", 0, offset=-2),
        at("layer_input", 1, "prompt_mean"),
        at("layer_input", 2),
    ]
    probe = b.mlp(
        "p",
        readings,
        [7, 5],
        {"type": "sigmoid", "harmful_when": "low"},
        activation="gelu",
        comparator=">=",
        threshold=0.5,
    )
    add = {
        "id": "a",
        "type": "add_vector",
        "position": "from_prompt_end",
        "alpha": 2.0,
        "targets": [
            target("layer_output", 1, b.unit()),
            target("layer_output", 3, b.unit()),
            target("layer_input", 2, b.unit()),
        ],
    }
    project = {
        "id": "o",
        "type": "project_out",
        "position": "from_prompt_end",
        "alpha": 0.9,
        "targets": [target("layer_input", 2, b.unit()), target("layer_input", 4, b.unit())],
    }
    score = {"type": "score", "probe": "p", "scale": 1.5}
    return b.package([probe], [add, project], [rule("r", ["p"], ["o", "a"], score)])


def image_guard(d: int, dtype: str) -> SteeringPackage:
    """An image probe and a cosine probe at the head under `all`; a dense head."""
    b = Builder(d, dtype)
    linear = {
        "id": "image",
        "type": "linear",
        "readings": [at("layer_input", 1, "image_mean")],
        "weight": b.unit(),
        "bias": 0.25,
        "link": "identity",
        "comparator": "<",
        "threshold": 0.4,
        "input_mean": b.new(d),
        "input_scale": b.new(d, positive=True),
    }
    cosine = {
        "id": "cos",
        "type": "cosine",
        "readings": [at("head_input")],
        "direction": b.new(d),
        "squash": "tanh",
        "comparator": "<=",
        "threshold": 0.9,
    }
    plain = {
        "id": "none",
        "type": "cosine",
        "readings": [at("layer_input", 4)],
        "direction": b.new(d),
        "squash": "none",
        "comparator": ">",
        "threshold": 2.0,
    }
    head = {
        "id": "h",
        "type": "head_matrix",
        "position": "from_prompt_end",
        "eps": -0.2,
        "weight": {"form": "dense", "matrix": b.new(d, d)},
    }
    rules = [rule("both", ["image", "cos"], ["h"], how="all"), rule("never", ["none"], ["h"])]
    return b.package([linear, cosine, plain], [head], rules)


def always(d: int, dtype: str) -> SteeringPackage:
    """No condition: every row is rewritten, in rule order."""
    b = Builder(d, dtype)
    add = {
        "id": "a",
        "type": "add_vector",
        "position": "all_positions",
        "alpha": -1.0,
        "targets": [target("layer_output", 0, b.unit()), target("layer_output", 2, b.unit())],
    }
    project = {
        "id": "o",
        "type": "project_out",
        "position": "all_positions",
        "alpha": 1.0,
        "targets": [target("layer_input", 3, b.unit())],
    }
    rules = [rule("r1", [], ["o", "a"], {"type": "constant", "value": 0.5}), rule("r2", [], ["o"])]
    return b.package([], [add, project], rules)


def scored(d: int, dtype: str) -> SteeringPackage:
    """A rule without condition whose strength is a score; tanh and sigmoid links."""
    b = Builder(d, dtype)
    linear = {
        "id": "lin",
        "type": "linear",
        "readings": [at("layer_input", 3)],
        "weight": b.unit(),
        "bias": -0.1,
        "link": "sigmoid",
        "comparator": ">",
        "threshold": 0.5,
    }
    deep = b.mlp(
        "deep",
        [at("layer_input", 1, offset=-1)],
        [4, 6, 5],
        {"type": "sigmoid", "harmful_when": "high"},
        activation="tanh",
    )
    add = {
        "id": "a",
        "type": "add_vector",
        "position": "from_prompt_end",
        "alpha": 1.0,
        "targets": [target("layer_input", 3, b.unit())],
    }
    score = {"type": "score", "probe": "lin", "scale": -2.0}
    return b.package(
        [linear, deep],
        [add],
        [rule("s", [], ["a"], score), rule("d", ["deep", "lin"], ["a"], how="any")],
    )


def rows_of(scope: str, *layers: int, window: int, skip: int = 0, rows: str = "all") -> Any:
    sites_read = [{"stream": "layer_input", "layer": layer} for layer in layers]
    reading = {"scope": scope, "window": window, "skip": skip, "rows": rows}
    return {"token_reading": {"sites": sites_read, **reading}}


def token_guard(d: int, dtype: str) -> SteeringPackage:
    """Readings over tokens in every scope, of every kind of rows; rules that begin in answers."""
    b = Builder(d, dtype)
    deep = b.mlp(
        "both",
        [None, None],
        [21, 6],
        SOFTMAX,
        activation="relu",
        input_mean=b.new(2 * d),
        input_scale=b.new(2 * d, positive=True),
        threshold=0.62,
        **rows_of("both", 3, 1, window=5, skip=2),
    )
    del deep["readings"]
    linear = {
        "type": "linear",
        "bias": 0.05,
        "link": "sigmoid",
        "comparator": ">=",
    }
    answer = linear | {"id": "answer", "weight": b.unit(), "threshold": 0.6}
    answer |= rows_of("answer", 2, window=2)
    image = linear | {"id": "image", "weight": b.unit(), "threshold": 0.5}
    image |= rows_of("prompt", 1, window=3, rows="image")
    text = linear | {"id": "text", "weight": b.unit(), "threshold": 0.7}
    text |= rows_of("prompt", 1, window=40, skip=1, rows="text")
    add = {
        "id": "a",
        "type": "add_vector",
        "position": "from_prompt_end",
        "alpha": 2.0,
        "targets": [target("layer_output", 2, b.unit()), target("layer_output", 3, b.unit())],
    }
    head = {
        "id": "h",
        "type": "head_matrix",
        "position": "from_prompt_end",
        "eps": 0.1,
        "weight": {"form": "low_rank", "u": b.new(d, 3), "v": b.new(3, d)},
    }
    rules = [
        rule("any", ["both", "answer"], ["a"]),
        rule("all", ["answer", "text"], ["h"], how="all"),
        rule("image", ["image"], ["h"]),
    ]
    return b.package([deep, answer, image, text], [add, head], rules)


def say_guard(d: int, dtype: str) -> SteeringPackage:
    """A forced answer; for the fuzzer of packages alone."""
    b = Builder(d, dtype)
    probe = {"id": "p", "type": "linear", "weight": b.unit(), "bias": 0.0, "link": "sigmoid"}
    probe |= {"comparator": ">", "threshold": 0.5, **rows_of("both", 1, window=4)}
    marks = {"open": [4, 5], "close": [6]}
    say = {"id": "s", "type": "say", "text": "no", "tokens": [1, 2, 3], "header": [7]}
    return b.package([probe], [say | {"reasoning": marks}], [rule("r", ["p"], ["s"])])


# ---------------------------------------------------------------- golden files


def hidden(d: int, rows: int, poison: bool) -> dict[int, np.ndarray[Any, Any]]:
    states = {
        depth: RNG.normal(0, 1.5, (rows, d)).astype(np.float32) for depth in range(1, N_LAYER + 2)
    }
    for h in states.values():
        if poison:
            h[:, 1] = np.nan
    return states


def expected(package: SteeringPackage, states: Any, prompt: int, images: slice) -> Any:
    spec = package.spec
    mask = np.zeros(prompt, bool)
    mask[images] = True
    verdicts = tuple(judged(package, p, states, prompt, mask) for p in spec.probes)
    by_id = {v.probe: v for v in verdicts}
    out = {depth: h.astype(np.float64) for depth, h in states.items()}
    named = {spec.depth(s): s for x in spec.interventions for s in sites(x)}
    for act in reference.actions(spec, verdicts):
        [owner] = [r for r in spec.rules if r.id == act.rule]
        begin = reference.begins(owner, by_id, prompt - 1)
        first = 0 if act.intervention.position == "all_positions" else begin
        for depth, site in named.items():
            rows = out[depth][first:]
            out[depth][first:] = reference.steer([act], package.tensors, site, rows)
    return verdicts, out


def judged(package: SteeringPackage, probe: Any, states: Any, prompt: int, mask: Any) -> Any:
    depth, reading = package.spec.depth, probe.token_reading
    if reading is None:
        x = reference.probe_input(probe, package.tensors, lambda s: states[depth(s)][:prompt], mask)
        return reference.verdict_of(probe, package.tensors, x)
    x = reference.row_inputs(reading, lambda s: states[depth(s)])
    logits = reference.row_logits(probe, package.tensors, x)
    sound = np.isfinite(x).all(axis=1) & np.isfinite(logits)
    images = np.concatenate([mask, np.zeros(len(x) - prompt, bool)])
    counted = reference.counted(reading, len(x), images)
    return reference.judge_rows(probe, logits, sound, counted, prompt - 1)


def write_golden(path: Path, package: SteeringPackage, requests: int = 6) -> None:
    spec, d = package.spec, package.spec.base_model.hidden_size
    depths = list(range(1, N_LAYER + 2))
    data = b"SHG1" + struct.pack(
        f"<{6 + len(depths)}i",
        d,
        N_LAYER,
        len(depths),
        *depths,
        len(spec.probes),
        len(spec.rules),
        requests,
    )
    fired = 0
    for i in range(requests):
        prompt, generated = int(RNG.integers(3, 70)), int(RNG.integers(0, 6))
        if i == 1:
            prompt, generated = 3, 1
        first = int(RNG.integers(0, prompt))
        images = slice(first, first if i == 2 else int(RNG.integers(first, prompt)))
        states = hidden(d, prompt + generated, poison=i == 3)
        verdicts, out = expected(package, states, prompt, images)
        by_id = {v.probe: v for v in verdicts}
        data += struct.pack("<4i", prompt + generated, prompt, images.start, images.stop)
        for depth in depths:
            data += states[depth].tobytes() + out[depth].astype(np.float32).tobytes()
        for v in verdicts:
            data += struct.pack("<di", v.score, v.fired)
        for r in spec.rules:
            holds = reference.holds(r, by_id)
            fired += holds
            data += struct.pack("<id", holds, reference.strength(r, by_id) if holds else 0.0)
    path.write_bytes(data)
    print(f"{path.stem}: d={d}, {requests} requests, {fired} rules fired")


# ---------------------------------------------------------------- fuzzing seeds


def write_seed(path: Path, package: SteeringPackage) -> None:
    """As the package is saved, with room at the end of the JSON for the mutator to grow into."""
    raw = package.spec.model_dump(mode="json", exclude_unset=True)
    writer = GGUFWriter(path, "steering")
    writer.add_type("adapter")
    writer.add_string("steering.spec", _json.dumps(raw).decode() + " " * 400)
    for name, tensor in package.tensors.items():
        writer.add_tensor(name, tensor.array, raw_dtype=GGMLQuantizationType[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def words(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(words, value.values())) if value else set()
    if isinstance(value, list):
        return set().union(*map(words, value)) if value else set()
    return {value} if isinstance(value, str) else set()


PACKAGES = [head_guard, layer_guard, image_guard, always, scored, token_guard]


def main(out: Path) -> None:
    (out / "seeds").mkdir(parents=True, exist_ok=True)
    known: set[str] = set()
    for make in PACKAGES:
        for d, dtype in ((37, "F32"), (64, "F16"), (5, "BF16")):
            package = make(d, dtype)
            name = f"{make.__name__}-{dtype.lower()}"
            package.save(out / f"{name}.gguf")
            write_golden(out / f"{name}.golden", package)
    for make in [*PACKAGES, say_guard]:
        seed = make(2, "F32")
        write_seed(out / "seeds" / f"{make.__name__}.gguf", seed)
        known |= words(seed.spec.model_dump(mode="json", exclude_unset=True))
    tokens = {f'"{w}"' for w in known if w.isascii()} | {"null", "true", "1e999", "-0", "\\u0000"}
    escaped = (t.replace("\\", "\\\\").replace('"', '\\"') for t in sorted(tokens))
    (out / "json.dict").write_text("".join(f'"{t}"\n' for t in escaped))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
