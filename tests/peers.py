"""Runs in .venv-peers: the tools themselves apply our artifacts and write some of their own.

`python peers.py JOB`: JOB is a JSON object with the model directory, artifacts by format, the
directory of a deeper model, token ids and an output directory. Writes `logits.npz`, `theirs.gguf`
(repeng) and `theirs.pt` (the pickled dataclass of steering-vectors), and with the deeper model and
as in the READMEs of both tools `quick.gguf` and `quick.pt`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from hotwire._state import SteerState
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> None:
    job = json.loads(sys.argv[1])
    ids, out = torch.tensor(job["ids"]), Path(job["out"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], torch_dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    width = model.config.hidden_size
    directions = {k: rng.normal(size=width).astype(np.float32) for k in (0, 2)}
    logits = {"plain": model(ids).logits[0].numpy()}
    for name in ("repeng", "control-vector"):
        vector = ControlVector.import_gguf(job["artifacts"][name])
        logits[name] = controlled(model, vector, ids)
    mine = ControlVector(model.config.model_type, directions)
    mine.export_gguf(out / "theirs.gguf")
    logits["repeng theirs"] = controlled(model, mine, ids)
    fields = torch.load(job["artifacts"]["steering-vectors"])
    logits["steering-vectors"] = steered(model, SteeringVector(**fields), ids)
    theirs = SteeringVector({k: torch.from_numpy(v) for k, v in directions.items()})
    torch.save(theirs, out / "theirs.pt")
    logits["steering-vectors theirs"] = steered(model, theirs, ids)
    logits["hotwire"] = hotwired(model, job["artifacts"]["hotwire"], ids)
    logits |= quickstarts(job["deep"], ids, out)
    np.savez(out / "logits.npz", **logits)


def quickstarts(folder: str, ids: torch.Tensor, out: Path) -> dict[str, np.ndarray]:
    """A vector for every layer, applied as the tool's README does it."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    rng = np.random.default_rng(1)
    directions = {k: rng.normal(size=width).astype(np.float32) for k in range(1, layers)}
    logits = {"plain quick": model(ids).logits[0].numpy()}
    added = SteeringVector({k: torch.from_numpy(v) for k, v in directions.items()})
    torch.save(added, out / "quick.pt")
    with added.apply(model):
        logits["steering-vectors quick"] = model(ids).logits[0].numpy()
    vector = ControlVector(model.config.model_type, directions)
    vector.export_gguf(out / "quick.gguf")
    wrapped = ControlModel(model, list(range(-5, -18, -1)))
    wrapped.set_control(vector, 1.0)
    logits["repeng quick"] = wrapped(ids).logits[0].numpy()
    return logits


def controlled(model: torch.nn.Module, vector: ControlVector, ids: torch.Tensor) -> np.ndarray:
    wrapped = ControlModel(model, list(vector.directions))
    wrapped.set_control(vector, 1.0)
    try:
        return wrapped(ids).logits[0].numpy()
    finally:
        wrapped.unwrap()


def steered(model: torch.nn.Module, vector: SteeringVector, ids: torch.Tensor) -> np.ndarray:
    with vector.apply(model, multiplier=1.0):
        return model(ids).logits[0].numpy()


def hotwired(model: torch.nn.Module, path: str, ids: torch.Tensor) -> np.ndarray:
    """Its store and vector bank; the addition to a block's output, done by vLLM, is done here."""
    layers = len(model.model.layers)
    state = SteerState(layers, model.config.hidden_size, 64, torch.device("cpu"), torch.float32, 8)
    state.load_store(path)
    (name,) = state.store
    handles = []
    for layer in (1, 2):
        row = state.bank.bank[state.slot_for(name, layer, 1.0)]
        handles.append(
            model.model.layers[layer].register_forward_hook(
                lambda m, a, out, v=row: (
                    (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
                )
            )
        )
    try:
        return model(ids).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


main()
