"""Norms, rotary embedding and attention over whole prompts."""

import torch


def _added(residual, x, add_back):
    if residual is None:
        return x
    total = x + residual
    if add_back:  # TGI goes on with this very tensor
        residual.copy_(total)
    return total


def add_rms_norm(residual, x, weight, bias, eps, add_back):
    h = _added(residual, x, add_back).float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    out = h.to(weight.dtype) * weight
    return out if bias is None else out + bias


def add_layer_norm(residual, x, weight, bias, eps, add_back):
    h = _added(residual, x, add_back)
    return torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, eps)


def rotary_embedding(query, key, sin, cos, dim, neox):
    width = cos.shape[-1]
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    for x in (query, key):
        a, b = x[..., :width].clone(), x[..., width : 2 * width].clone()
        x[..., :width] = a * cos - b * sin
        x[..., width : 2 * width] = b * cos + a * sin


def attend(q, k, v, scale, causal, window, softcap):
    """q [Tq, H, D] over k and v [Tk, Hk, D], whose last rows are the same ones."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    of = torch.arange(len(k))[None]
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if causal:
        seen &= of <= at
    if window >= 0:
        seen &= of >= at - window
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.float()).to(q.dtype)


def varlen_attention(q, k, v, out, cu_q, cu_k, max_q, max_k, p, scale, zero, causal, *_, **__):
    del max_q, max_k, p, zero
    for i in range(len(cu_q) - 1):
        a, b, c, d = int(cu_q[i]), int(cu_q[i + 1]), int(cu_k[i]), int(cu_k[i + 1])
        if b > a:
            out[a:b] = attend(q[a:b], k[c:d], v[c:d], scale, causal, -1, 0.0)
