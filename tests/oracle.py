"""Verdicts and greedy tokens of one prompt by the numpy reference, without cache or batch.

The model only multiplies: at every site the rows go through `reference.steer`.
"""

from __future__ import annotations

import numpy as np
import torch

from steerbridge import reference
from steerbridge.spec import parse_site
from steerbridge_hf.sites import locate


def states(model, ids, tensors, prompt, acting=()):
    """Hidden states [T, D] by depth of an unpadded prompt, and the logits of its last row.

    Rows from the prompt end (`prompt` tokens) on are steered by the actions.
    """
    sites = locate(model)
    head = len(sites.blocks) + 1
    found, handles = {}, []

    def hook(depth):
        def run(module, args, kwargs):
            h = args[0] if args else kwargs["hidden_states"]
            site = parse_site("head_input" if depth == head else f"layer_input[{depth}]")
            new = h.clone()
            rows = reference.steer(acting, tensors, site, h[0, prompt - 1 :])
            new[0, prompt - 1 :] = torch.from_numpy(np.asarray(rows, np.float32))
            found[depth] = h[0].numpy()
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return run

    for depth in range(head + 1):
        handle = sites.at_depth(depth).register_forward_pre_hook(hook(depth), with_kwargs=True)
        handles.append(handle)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return found, logits


def oracle(model, package, ids, new, eos=2):
    """(verdicts, tokens) of a prompt: at most `new` greedy tokens, `eos` included."""
    hidden, _ = states(model, ids, package.tensors, len(ids))
    depth = package.spec.depth
    inputs = {
        p.id: reference.probe_input(p, package.tensors, lambda s: hidden[depth(s)])
        for p in package.spec.probes
    }
    verdicts = reference.verdicts(package, inputs)
    acting = reference.actions(package.spec, verdicts)
    tokens = list(ids)
    for _ in range(new):
        _, logits = states(model, tokens, package.tensors, len(ids), acting)
        tokens.append(int(logits.argmax()))
        if tokens[-1] == eos:
            break
    return verdicts, tokens[len(ids) :]
