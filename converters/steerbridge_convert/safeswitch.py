"""SafeSwitch: a prober directory and a refusal head that replaces the output embedding.

`args.json` (the options of its src/prober/train_classifier.py) and `model_weights.pth` of a prober:
the same key names as AutoSteer's, but class 1 is unsafe and P >= 0.5 fires. `layer_id` numbers the
model's `hidden_states`: -1 is the one behind the final norm. A prober of the prompt has
`token_rule` `last`. The head (`lm_head.pth`, in the published checkpoints `refusal_head.pth`) is a
complete embedding E' [V, d]; W solves E W = E' - E by least squares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import NotRepresentable
from steerbridge.format import (
    Answers,
    Format,
    Holds,
    Loss,
    Option,
    finite,
    require_known,
    shown,
    unreadable,
)
from steerbridge.package import SteeringPackage
from steerbridge.spec import HeadInput, LayerInput, MlpProbe, PromptEnd, Reading
from steerbridge.tensors import Tensor
from steerbridge_convert import files, heads, pickles, probers
from steerbridge_convert.autosteer import only_probe, other_probes
from steerbridge_convert.heads import Head

UNSAFE: Final = 1
HEADS: Final = ("lm_head.pth", "refusal_head.pth")
_THRESHOLD: Final = Option("threshold", finite, "P(unsafe) at which the prober fires", 0.5)
_END: Final = PromptEnd(type="prompt_end")
_READING: Final = Reading(site=HeadInput(stream="head_input"), position=_END)
_ARGS: Final = frozenset(
    {
        *("epochs", "batch_size", "learning_rate", "base_dir", "data_dir", "job_name", "ckpt"),
        *("gpu", "wandb", "overwrite", "hidden_sizes", "random_seed", "token_rule", "label"),
        *("n_decode", "layer_id", "neg_weight", "llm"),
    }
)


class SafeSwitch(Format):
    """A prober for prompts, with or without a head."""

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
        args, state = _prober(path)
        shapes = {k: list(v.shape) for k, v in state.items()}
        return {"args": args, "prober": shapes, "heads": [p.name for p in _heads(path)]}

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        base = answers.base_model()
        args, state = _prober(path)
        reading = self._reading(args, base.num_layers, path, answers)
        last = [k.removesuffix(".weight") for k in state if k.endswith(".weight")]
        mlp = probers.Mlp(
            tuple(state[f"{k}.weight"].float32() for k in last),
            tuple(state[f"{k}.bias"].float32() for k in last),
        )
        probe, tensors = probers.two_class(
            "unsafe", mlp, UNSAFE, reading, ">=", answers.get(_THRESHOLD)
        )
        found = _heads(path)
        if len(found) > 1:
            raise unreadable(path, "head", f"one of {', '.join(HEADS)}", "both")
        head = self._head(found[0], answers) if found else None
        if head is None:
            answers.losses.append(
                Loss("head", f"is not there ({' or '.join(HEADS)}): the prober changes nothing")
            )
        return heads.package(path.name, base, head, (probe,), tensors)

    def _reading(
        self, args: dict[str, Any], num_layers: int, path: Path, answers: Answers
    ) -> Reading:
        """Where the prober reads.

        Raises:
            NotRepresentable: not at the end of the prompt, or not harm.
        """
        require_known(self.name, "args.json", args, _ARGS)
        rule, decoded, label = (
            args.get(key, default)
            for key, default in (("token_rule", "last"), ("n_decode", 0), ("label", "both"))
        )
        if rule != "last" or decoded != 0:
            raise NotRepresentable(
                self.name,
                f"token_rule = {shown(rule)}, n_decode = {shown(decoded)}: it reads the answer",
            )
        if label not in ("both", "safety"):
            raise NotRepresentable(self.name, f"label = {shown(label)}: it does not predict harm")
        if label == "safety":
            answers.losses.append(
                Loss("prober", "is the first of two stages: the second looks at the answer as well")
            )
        layer = args.get("layer_id", -1)
        if type(layer) is not int or not -1 <= layer <= num_layers:
            want = f"-1 or a number up to {num_layers}"
            raise unreadable(path / "args.json", "layer_id", want, shown(layer))
        if layer in (-1, num_layers):
            return _READING
        return Reading(site=LayerInput(stream="layer_input", layer=layer), position=_END)

    def _head(self, file: Path, answers: Answers) -> Head:
        new = pickles.tensor(pickles.load(file), file.name, file, 2)
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
                    file.name,
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
        site = probe.readings[0].site
        if probe.readings[0].position != _END or not isinstance(site, HeadInput | LayerInput):
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
        site = probe.readings[0].site
        args = {
            "hidden_sizes": [str(len(b)) for b in mlp.biases[:-1]],
            "layer_id": site.layer if isinstance(site, LayerInput) else -1,
            "token_rule": "last",
            "n_decode": 0,
            "label": "both",
        }
        (path / "args.json").write_text(json.dumps(args))
        state = {}
        for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
            state[f"layers.{2 * i}.weight"] = pickles.torch_tensor(weight)
            state[f"layers.{2 * i}.bias"] = pickles.torch_tensor(bias)
        pickles.save(state, path / "model_weights.pth")
        pickles.save(pickles.torch_tensor(new), path / HEADS[0])


def _heads(path: Path) -> list[Path]:
    """The files of a head that are there."""
    return [path / name for name in HEADS if (path / name).is_file()]


def _prober(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and state dict, checked for consistency."""
    args = files.json_object(path / "args.json")
    try:
        sizes = [int(n) for n in args["hidden_sizes"]]
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
    return args, state
