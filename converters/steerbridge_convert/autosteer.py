"""AutoSteer's official checkpoints: a steering matrix and a safety prober.

A directory as the authors' scripts leave it: `Epoch_{n}.pt` (`epoch_{n}.pth` for Chameleon), a
bare tensor S [d, d], and `layer{L}/epoch_{n}.pt`, the state dict of a prober whose class 0 is
toxic. Their logits are h (E + eps E S)^T = E (h + eps S h) if P(toxic) > 0.5, so W = S without a
transpose. The prober reads the input of block L at the last token of a template without a
generation prompt (llava_steer_test.py and rater.py of zjunlp/AutoSteer).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np

from steerbridge.errors import NotRepresentable, Unanswered
from steerbridge.formats import Ask, Format, Given, Holds, Loss, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.spec import LayerInput, LayerOutput, MlpProbe, PromptEnd, Reading
from steerbridge_convert import heads, pickles, probers
from steerbridge_convert.heads import Head

TOXIC: Final = 0
THRESHOLD: Final = 0.5
HIDDEN: Final = 64
_MATRIX: Final = re.compile(r"^[Ee]poch_(\d{1,6})\.pth?$")
_LAYER: Final = re.compile(r"^layer(\d{1,5})$")

EPS: Final = Ask("eps", float, "strength of the matrix (the authors train and run with 0.1)")
OFFSET: Final = Ask(
    "offset",
    int,
    "minus the number of tokens of the generation prompt, which the prober has not seen (-3 for "
    "Qwen2: `<|im_start|>assistant` and a line feed)",
)
EPOCH: Final = Ask("epoch", int, "which of several matrices", -1)
LAYER: Final = Ask("layer", int, "which of several probers", -1)
PROBER_EPOCH: Final = Ask("prober_epoch", int, "which of several epochs of the prober", -1)


class AutoSteer(Format):
    """The authors' two files; threshold 0.5 and class order are fixed in their code."""

    name = "autosteer"
    title = "AutoSteer checkpoints (directory)"
    holds = Holds(
        probes=frozenset({"mlp"}),
        interventions=frozenset({"head_matrix"}),
        gates=True,
        from_prompt_end=True,
        sites="probe: input of one block; head input",
        strength="eps is given in their configuration",
    )
    asks = (EPS, OFFSET, EPOCH, LAYER, PROBER_EPOCH)
    write_asks = (EPS, OFFSET)
    exact = False  # normalisation and thresholds are folded into the prober

    def recognises(self, path: Path) -> bool:
        return path.is_dir() and bool(_probers(path) or _matrices(path))

    def contents(self, path: Path) -> dict[str, Any]:
        return {
            "matrices": {p.name: _shape(p) for p in _matrices(path).values()},
            "probers": {
                f"{p.parent.name}/{p.name}": _state(p)[KEY_IN].shape
                for epochs in _probers(path).values()
                for p in epochs.values()
            },
        }

    def read(self, path: Path, given: Given) -> SteeringPackage:
        base = given.base_model()
        matrices, found = _matrices(path), _probers(path)
        head = None
        if matrices:
            file = _one(matrices, EPOCH, given)
            matrix = pickles.tensor(pickles.load(file), "matrix", file, 2)
            _square(matrix.shape, base.hidden_size, self.name)
            head = Head(given(EPS), matrix)
        if not found:
            raise unreadable(path, "prober", "layer{L}/epoch_{n}.pt", "none")
        layer = _one({k: k for k in found}, LAYER, given)
        probe, tensors = self._prober(_one(found[layer], PROBER_EPOCH, given), layer, given)
        return heads.package(path.name, base, head, (probe,), tensors)

    def _prober(self, file: Path, layer: int, given: Given) -> tuple[MlpProbe, Any]:
        state = _state(file)
        reading = Reading(
            site=LayerInput(stream="layer_input", layer=layer),
            position=PromptEnd(type="prompt_end", offset=given(OFFSET)),
        )
        mlp = probers.Mlp(
            (state[KEY_IN].float32(), state["layers.2.weight"].float32()),
            (state["layers.0.bias"].float32(), state["layers.2.bias"].float32()),
        )
        return probers.two_class("toxic", mlp, TOXIC, reading, ">", THRESHOLD)

    def losses(self, package: SteeringPackage, given: Given) -> list[Loss]:
        probe, _ = self._probe(package)
        lost = [*super().losses(package, given), *other_probes(package, probe)]
        if probe.comparator == ">=":
            lost.append(Loss(f"probe {probe.id}", "a score equal to the threshold no longer fires"))
        offset, position = given(OFFSET), probe.readings[0].position
        if not isinstance(position, PromptEnd) or position.offset != offset:
            lost.append(
                Loss(
                    f"probe {probe.id}",
                    f"reads the last token without a generation prompt (offset {offset}), "
                    f"not {position}",
                )
            )
        return lost

    def _probe(self, package: SteeringPackage) -> tuple[MlpProbe, int]:
        """The probe and the block whose input it reads."""
        probe = only_probe(package, self.name)
        site = probe.readings[0].site
        if not isinstance(site, LayerInput | LayerOutput):
            raise NotRepresentable(self.name, f"probe {probe.id} at {site}: inputs of blocks only")
        return probe, package.spec.depth(site)

    def write(self, package: SteeringPackage, path: Path, given: Given) -> None:
        probe, layer = self._probe(package)
        _, head = heads.only(package, self.name)
        mlp = probers.as_two_class(package, probe, TOXIC, THRESHOLD, self.name)
        if len(mlp.weights) != 2 or len(mlp.weights[0]) != HIDDEN:
            raise NotRepresentable(self.name, f"a prober other than one hidden layer of {HIDDEN}")
        folder = path / f"layer{layer}"
        folder.mkdir(parents=True)
        pickles.save(pickles.torch_tensor(_scaled(head, given(EPS))), path / "Epoch_0.pt")
        values = (mlp.weights[0], mlp.biases[0], mlp.weights[1], mlp.biases[1])
        state = {k: pickles.torch_tensor(v) for k, v in zip(probers.KEYS, values, strict=True)}
        pickles.save(state, folder / "epoch_0.pt")


KEY_IN: Final = "layers.0.weight"


def _scaled(head: Head, eps: float) -> Any:
    """S for the eps that the tool will run with, which is no part of the file."""
    matrix = heads.dense(head)
    return matrix if eps == head.eps else np.float32(head.eps / eps) * matrix.float32()


def only_probe(package: SteeringPackage, format: str) -> MlpProbe:
    """The probe of the rule that applies the head.

    Raises:
        NotRepresentable: there is not exactly one, it reads several places, or it fires below
            its threshold.
    """
    rule, _ = heads.only(package, format)
    names = rule.condition.probes if rule.condition else ()
    if len(names) != 1:
        raise NotRepresentable(format, f"a rule of {len(names)} probes; it holds one")
    probe = package.spec.probe(names[0])
    if not isinstance(probe, MlpProbe) or len(probe.readings) != 1:
        raise NotRepresentable(
            format,
            f"probe {probe.id} ({probe.type}) on {len(probe.readings)} readings; it reads one",
        )
    if probe.comparator not in (">", ">="):
        raise NotRepresentable(format, f"probe {probe.id} fires below its threshold")
    return probe


def other_probes(package: SteeringPackage, kept: MlpProbe) -> list[Loss]:
    """The losses of a format that holds one prober."""
    return [
        Loss(f"probe {p.id} (mlp)", "is dropped: one prober is held")
        for p in package.spec.probes
        if isinstance(p, MlpProbe) and p.id != kept.id
    ]


def _state(file: Path) -> dict[str, Any]:
    found = pickles.load(file)
    if not isinstance(found, dict) or set(found) != set(probers.KEYS):
        keys = sorted(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise unreadable(file, "state dict", f"the keys {', '.join(probers.KEYS)}", keys)
    state = {
        key: pickles.tensor(found[key], key, file, 2 if key.endswith("weight") else 1)
        for key in probers.KEYS
    }
    hidden, _ = state[KEY_IN].shape
    wanted = {"layers.0.bias": (hidden,), "layers.2.weight": (2, hidden), "layers.2.bias": (2,)}
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise unreadable(file, key, f"shape {shape}", state[key].shape)
    return state


def _square(shape: tuple[int, ...], width: int, format: str) -> None:
    if shape != (width, width):
        raise NotRepresentable(format, f"a matrix {shape} on a model of width {width}")


def _matrices(path: Path) -> dict[int, Path]:
    return {int(m[1]): p for p in sorted(path.iterdir()) if (m := _MATRIX.match(p.name))}


def _probers(path: Path) -> dict[int, dict[int, Path]]:
    folders = {int(m[1]): p for p in sorted(path.iterdir()) if (m := _LAYER.match(p.name))}
    return {layer: found for layer, p in folders.items() if (found := _matrices(p))}


def _shape(path: Path) -> list[int]:
    return list(pickles.tensor(pickles.load(path), "matrix", path, 2).shape)


def _one(found: dict[int, Any], ask: Ask, given: Given) -> Any:
    """The only entry, or the one that was asked for."""
    wanted = given(ask)
    if wanted < 0 and len(found) == 1:
        return next(iter(found.values()))
    if wanted not in found:
        raise Unanswered(given.format, ask.name, f"{ask.help}: {', '.join(map(str, found))}")
    return found[wanted]
