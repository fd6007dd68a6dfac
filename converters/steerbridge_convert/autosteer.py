"""AutoSteer's official checkpoints: a steering matrix and a safety prober.

A directory as the authors' scripts write it: `Epoch_{n}.pt` (`epoch_{n}.pth` for Chameleon), a
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

from steerbridge.errors import InvalidOption, MissingOption, NotRepresentable
from steerbridge.format import Answers, Format, Holds, Loss, Option, finite, unreadable
from steerbridge.package import SteeringPackage
from steerbridge.spec import LayerInput, LayerOutput, MlpProbe, PromptEnd, Reading
from steerbridge_convert import heads, pickles, probers
from steerbridge_convert.heads import Head

TOXIC: Final = 0
THRESHOLD: Final = 0.5
HIDDEN: Final = 64
_MATRIX: Final = re.compile(r"^[Ee]poch_(\d{1,6})\.pth?$")
_LAYER: Final = re.compile(r"^layer(\d{1,5})$")

EPS: Final = Option("eps", finite, "strength of the matrix (the authors train and run with 0.1)")
OFFSET: Final = Option(
    "offset",
    int,
    "minus the number of tokens in the generation prompt, which the prober does not see (-3 for "
    "Qwen2: `<|im_start|>assistant` and a newline)",
)
EPOCH: Final = Option("epoch", int, "epoch of the matrix, if there are several", -1)
LAYER: Final = Option("layer", int, "layer of the prober, if there are several", -1)
PROBER_EPOCH: Final = Option("prober_epoch", int, "epoch of the prober, if there are several", -1)


class AutoSteer(Format):
    """Both files of the authors; their code fixes threshold 0.5 and the class order."""

    name = "autosteer"
    title = "AutoSteer checkpoints (directory)"
    holds = Holds(
        probes=frozenset({"mlp"}),
        interventions=frozenset({"head_matrix"}),
        gates=True,
        from_prompt_end=True,
        sites="probe: input of one block; head input",
        strength="eps, from the tool's configuration",
    )
    options = (EPS, OFFSET, EPOCH, LAYER, PROBER_EPOCH)
    write_options = (EPS, OFFSET)
    exact = False  # normalisation and threshold are folded into the prober

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

    def read(self, path: Path, answers: Answers) -> SteeringPackage:
        base = answers.base_model()
        matrices, by_layer = _matrices(path), _probers(path)
        head = None
        if matrices:
            file = _one(matrices, EPOCH, answers)
            matrix = pickles.tensor(pickles.load(file), "matrix", file, 2)
            _square(matrix.shape, base.hidden_size, self.name)
            head = Head(answers.get(EPS), matrix)
        if not by_layer:
            raise unreadable(path, "prober", "layer{L}/epoch_{n}.pt", "none")
        layer = _one({k: k for k in by_layer}, LAYER, answers)
        probe, tensors = self._prober(_one(by_layer[layer], PROBER_EPOCH, answers), layer, answers)
        return heads.package(path.name, base, head, (probe,), tensors)

    def _prober(self, file: Path, layer: int, answers: Answers) -> tuple[MlpProbe, Any]:
        state = _state(file)
        reading = Reading(
            site=LayerInput(stream="layer_input", layer=layer),
            position=PromptEnd(type="prompt_end", offset=answers.get(OFFSET)),
        )
        mlp = probers.Mlp(
            (state[KEY_IN].float32(), state["layers.2.weight"].float32()),
            (state["layers.0.bias"].float32(), state["layers.2.bias"].float32()),
        )
        return probers.two_class("toxic", mlp, TOXIC, reading, ">", THRESHOLD)

    def losses(self, package: SteeringPackage, answers: Answers) -> list[Loss]:
        probe, _ = self._probe(package)
        losses = [*super().losses(package, answers), *other_probes(package, probe)]
        if probe.comparator == ">=":
            losses.append(
                Loss(f"probe {probe.id}", "a score equal to the threshold no longer fires")
            )
        offset, position = answers.get(OFFSET), probe.readings[0].position
        if not isinstance(position, PromptEnd) or position.offset != offset:
            losses.append(
                Loss(
                    f"probe {probe.id}",
                    f"reads the last token without a generation prompt (offset {offset}), "
                    f"not {position}",
                )
            )
        return losses

    def _probe(self, package: SteeringPackage) -> tuple[MlpProbe, int]:
        """The probe and the block whose input it reads."""
        probe = only_probe(package, self.name)
        site = probe.readings[0].site
        if not isinstance(site, LayerInput | LayerOutput):
            raise NotRepresentable(
                self.name, f"probe {probe.id} at {site}, not at the input of a block"
            )
        return probe, package.spec.depth(site)

    def write(self, package: SteeringPackage, path: Path, answers: Answers) -> None:
        probe, layer = self._probe(package)
        _, head = heads.only(package, self.name)
        mlp = probers.as_two_class(package, probe, TOXIC, THRESHOLD, self.name)
        if len(mlp.weights) != 2 or len(mlp.weights[0]) != HIDDEN:
            raise NotRepresentable(
                self.name, f"a prober without exactly one hidden layer of size {HIDDEN}"
            )
        folder = path / f"layer{layer}"
        folder.mkdir(parents=True)
        pickles.save(pickles.torch_tensor(_scaled(head, answers.get(EPS))), path / "Epoch_0.pt")
        values = (mlp.weights[0], mlp.biases[0], mlp.weights[1], mlp.biases[1])
        state = {k: pickles.torch_tensor(v) for k, v in zip(probers.KEYS, values, strict=True)}
        pickles.save(state, folder / "epoch_0.pt")


KEY_IN: Final = "layers.0.weight"


def _scaled(head: Head, eps: float) -> Any:
    """S for the eps that the tool will run with; the file does not contain eps."""
    matrix = heads.dense(head)
    return matrix if eps == head.eps else np.float32(head.eps / eps) * matrix.float32()


def only_probe(package: SteeringPackage, format: str) -> MlpProbe:
    """The probe of the rule that applies the head.

    Raises:
        NotRepresentable: there is not exactly one, it has several readings, or it fires below
            its threshold.
    """
    rule, _ = heads.only(package, format)
    names = rule.condition.probes if rule.condition else ()
    if len(names) != 1:
        raise NotRepresentable(format, f"a rule with {len(names)} probes; it supports one")
    probe = package.spec.probe(names[0])
    if not isinstance(probe, MlpProbe) or len(probe.readings) != 1:
        raise NotRepresentable(
            format,
            f"probe {probe.id} ({probe.type}) with {len(probe.readings)} readings; it supports one",
        )
    if probe.comparator not in (">", ">="):
        raise NotRepresentable(format, f"probe {probe.id} fires below its threshold")
    return probe


def other_probes(package: SteeringPackage, kept: MlpProbe) -> list[Loss]:
    """The losses in a format that supports only one prober."""
    return [
        Loss(f"probe {p.id} (mlp)", "is dropped: only one prober is supported")
        for p in package.spec.probes
        if isinstance(p, MlpProbe) and p.id != kept.id
    ]


def _state(file: Path) -> dict[str, Any]:
    stored = pickles.load(file)
    if not isinstance(stored, dict) or set(stored) != set(probers.KEYS):
        keys = sorted(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__
        raise unreadable(file, "state dict", f"the keys {', '.join(probers.KEYS)}", keys)
    state = {
        key: pickles.tensor(stored[key], key, file, 2 if key.endswith("weight") else 1)
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
        raise NotRepresentable(format, f"a matrix of shape {shape} for a model of width {width}")


def _matrices(path: Path) -> dict[int, Path]:
    return {int(m[1]): p for p in sorted(path.iterdir()) if (m := _MATRIX.match(p.name))}


def _probers(path: Path) -> dict[int, dict[int, Path]]:
    folders = {int(m[1]): p for p in sorted(path.iterdir()) if (m := _LAYER.match(p.name))}
    return {layer: epochs for layer, p in folders.items() if (epochs := _matrices(p))}


def _shape(path: Path) -> list[int]:
    return list(pickles.tensor(pickles.load(path), "matrix", path, 2).shape)


def _one(entries: dict[int, Any], option: Option, answers: Answers) -> Any:
    """The only entry, or the one that the option names."""
    wanted = answers.get(option)
    if wanted < 0 and len(entries) == 1:
        return next(iter(entries.values()))
    if wanted not in entries:
        error = MissingOption if wanted < 0 else InvalidOption
        choices = ", ".join(map(str, entries))
        raise error(answers.format, option.name, f"{option.help}: one of {choices}")
    return entries[wanted]
