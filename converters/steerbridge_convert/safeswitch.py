"""SafeSwitch: a prober directory and a refusal head that replaces the output embedding.

`args.json` ({"hidden_sizes": ["64"]}) and `model_weights.pth` of the prompt's prober: the same
key names as AutoSteer's, but class 1 is unsafe and P >= 0.5 fires (utils.py of HakHan/SafeSwitch).
It reads the hidden state after the final norm at the end of the prompt. The optional
`refusal_head.pth` is a complete embedding E' [V, d]; W solves E W = E' - E by least squares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import NotRepresentable
from steerbridge.format import Answers, Format, Holds, Loss, Option, finite, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.spec import HeadInput, MlpProbe, PromptEnd, Reading
from steerbridge.tensors import Tensor
from steerbridge_convert import files, heads, pickles, probers
from steerbridge_convert.autosteer import only_probe, other_probes
from steerbridge_convert.heads import Head

UNSAFE: Final = 1
HEAD: Final = "refusal_head.pth"
_THRESHOLD: Final = Option("threshold", finite, "P(unsafe) at which the prober fires", 0.5)
_READING: Final = Reading(
    site=HeadInput(stream="head_input"), position=PromptEnd(type="prompt_end")
)


class SafeSwitch(Format):
    """The prober for prompts, with or without `refusal_head.pth`."""

    name = "safeswitch"
    title = "SafeSwitch prober and head (directory)"
    holds = Holds(
        probes=frozenset({"mlp"}),
        interventions=frozenset({"head_matrix"}),
        gates=True,
        from_prompt_end=True,
        sites="head input",
        strength="folded into the head",
    )
    options = (_THRESHOLD,)
    write_options = (_THRESHOLD,)
    exact = False  # the head is written as E + eps E W
    needs_model = True

    def recognises(self, path: Path) -> bool:
        return (path / "args.json").is_file() and (path / "model_weights.pth").is_file()

    def contents(self, path: Path) -> dict[str, Any]:
        sizes, state = _prober(path)
        shapes = {k: list(v.shape) for k, v in state.items()}
        return {"hidden_sizes": sizes, "prober": shapes, "head": (path / HEAD).is_file()}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        base = answers.base_model()
        _, state = _prober(path)
        last = [k.removesuffix(".weight") for k in state if k.endswith(".weight")]
        mlp = probers.Mlp(
            tuple(state[f"{k}.weight"].float32() for k in last),
            tuple(state[f"{k}.bias"].float32() for k in last),
        )
        probe, tensors = probers.two_class(
            "unsafe", mlp, UNSAFE, _READING, ">=", answers.get(_THRESHOLD)
        )
        head = self._head(path / HEAD, answers) if (path / HEAD).is_file() else None
        return heads.package(path.name, base, head, (probe,), tensors)

    def _head(self, file: Path, answers: Answers) -> Head:
        new = pickles.tensor(pickles.load(file), HEAD, file, 2)
        old = heads.output_embedding(answers)
        if new.shape != old.shape:
            raise NotRepresentable(
                self.name, f"a head of shape {new.shape} for an embedding of shape {old.shape}"
            )

        def change(part: slice) -> Any:
            return Tensor(new.dtype, new.array[part]).float32() - old.stored(part)

        matrix, residual = heads.fitted(old, change)
        if residual > 1e-3:
            answers.losses.append(
                Loss(
                    HEAD,
                    f"a share of {residual:.3f} of its change (Frobenius norm) is not E W: lost",
                )
            )
        return Head(1.0, Tensor.of(matrix))

    def losses(self, package: SteeringPackage, answers: Answers) -> list[Loss]:
        probe = self._probe(package)
        losses = [*super().losses(package, answers), *other_probes(package, probe)]
        if probe.comparator == ">":
            losses.append(
                Loss(f"probe {probe.id}", "a score equal to the threshold will also fire")
            )
        return losses

    def _probe(self, package: SteeringPackage) -> MlpProbe:
        probe = only_probe(package, self.name)
        if probe.readings[0] != _READING:
            raise NotRepresentable(self.name, f"probe {probe.id} on {probe.readings[0]}")
        return probe

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        probe = self._probe(package)
        _, head = heads.only(package, self.name)
        mlp = probers.as_two_class(package, probe, UNSAFE, answers.get(_THRESHOLD), self.name)
        old, matrix = heads.output_embedding(answers), heads.dense(head).float32() * head.eps
        new = np.empty(old.shape, np.float32)
        for part, rows in old.rows():
            new[part] = rows + rows @ matrix
        path.mkdir()
        sizes = [str(len(b)) for b in mlp.biases[:-1]]
        (path / "args.json").write_text(json.dumps({"hidden_sizes": sizes}))
        state = {}
        for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
            state[f"layers.{2 * i}.weight"] = pickles.torch_tensor(weight)
            state[f"layers.{2 * i}.bias"] = pickles.torch_tensor(bias)
        pickles.save(state, path / "model_weights.pth")
        pickles.save(pickles.torch_tensor(new), path / HEAD)


def _prober(path: Path) -> tuple[list[int], dict[str, Tensor]]:
    """Hidden sizes and state dict, checked for consistency."""
    try:
        sizes = [int(n) for n in files.json_object(path / "args.json")["hidden_sizes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(path / "args.json", "hidden_sizes", "a list of sizes", error) from error
    file = path / "model_weights.pth"
    stored = pickles.load(file)
    keys = [f"layers.{2 * i}.{part}" for i in range(len(sizes) + 1) for part in ("weight", "bias")]
    if not isinstance(stored, dict) or set(stored) != set(keys):
        raise unreadable(file, "state dict", f"the keys {', '.join(keys)}", "other keys")
    state = {k: pickles.tensor(stored[k], k, file, 2 if "weight" in k else 1) for k in keys}
    outputs = [*sizes, 2]
    for i, size in enumerate(outputs):
        weight, bias = state[f"layers.{2 * i}.weight"], state[f"layers.{2 * i}.bias"]
        inner = outputs[i - 1] if i else weight.shape[1]
        if weight.shape != (size, inner) or bias.shape != (size,):
            raise unreadable(file, f"layers.{2 * i}", f"sizes {size} and {inner}", weight.shape)
    return sizes, state
