"""Verdicts and greedy tokens of one prompt by the numpy reference, without cache or batch.

The model only multiplies: at every site the rows go through `reference.steer`.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from steerbridge import reference
from steerbridge.spec import parse_site
from steerbridge_hf.sites import image_rows, locate


def states(model, ids, tensors, prompt, acting=(), images=None):
    """Hidden states [T, D] by depth of an unpadded prompt, and the logits of its last row.

    Rows from the prompt end (`prompt` tokens) on are steered by the actions. `images(ids)` gives
    further inputs of the model.
    """
    sites = locate(model)
    head = len(sites.blocks) + 1
    hidden, handles = {}, []

    def visit(depth, module, h):
        site = parse_site("head_input" if depth == head else f"layer_input[{depth}]")
        new = h.clone()
        rows = reference.steer(acting, tensors, site, h[0, prompt - 1 :])
        new[0, prompt - 1 :] = torch.from_numpy(np.asarray(rows, np.float32))
        hidden[depth] = h[0].numpy()
        return new

    for depth in range(head + 1):
        handles.append(sites.watch(depth, functools.partial(visit, depth)))
    with torch.no_grad():
        ids = torch.tensor([ids])
        more = images(ids) if images else {}
        logits = model(input_ids=ids, use_cache=False, **more).logits[0, -1]
    for handle in handles:
        handle.remove()
    return hidden, logits


def oracle(model, package, ids, new, eos=2, images=None):
    """(verdicts, tokens) of a prompt: at most `new` greedy tokens, `eos` included."""
    hidden, _ = states(model, ids, package.tensors, len(ids), images=images)
    depth = package.spec.depth
    rows = image_rows(model, torch.tensor(ids)).numpy()
    inputs = {
        p.id: reference.probe_input(p, package.tensors, lambda s: hidden[depth(s)], rows)
        for p in package.spec.probes
    }
    verdicts = reference.verdicts(package, inputs)
    acting = reference.actions(package.spec, verdicts)
    tokens = list(ids)
    for _ in range(new):
        _, logits = states(model, tokens, package.tensors, len(ids), acting, images)
        tokens.append(int(logits.argmax()))
        if tokens[-1] == eos:
            break
    return verdicts, tokens[len(ids) :]
