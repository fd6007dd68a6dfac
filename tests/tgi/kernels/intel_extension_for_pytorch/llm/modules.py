"""Attention over pages of the cache: [blocks, heads, rows of a block, head size]."""

import torch

from .functional import attend


def _rows(cache, table, count):
    size = cache.shape[2]
    blocks = table[: (count + size - 1) // size].long()
    return cache[blocks].transpose(1, 2).reshape(-1, cache.shape[1], cache.shape[3])[:count]


class PagedAttention:
    @staticmethod
    def reshape_and_cache(key, value, key_cache, value_cache, slots, *_, **__):
        size, at = key_cache.shape[2], slots.long()
        key_cache[at // size, :, at % size] = key.to(key_cache.dtype)
        value_cache[at // size, :, at % size] = value.to(value_cache.dtype)

    @staticmethod
    def flash_attn_varlen_func(
        out, q, keys, values, cu_q, cu_k, max_q, max_k, scale, causal, tables, alibi,
        window_size_left=-1, window_size_right=-1, kv_cache_dtype="auto", k_scale=1.0,
        v_scale=1.0, softcap=-1.0,
    ):  # fmt: skip
        del max_q, max_k, alibi, window_size_right, kv_cache_dtype, k_scale, v_scale
        for i in range(len(cu_q) - 1):
            a, b, n = int(cu_q[i]), int(cu_q[i + 1]), int(cu_k[i + 1] - cu_k[i])
            if b > a and n > 0:
                k, v = _rows(keys, tables[i], n), _rows(values, tables[i], n)
                cap = -1.0 if softcap is None else float(softcap)
                out[a:b] = attend(q[a:b], k, v, scale, causal, window_size_left, cap)

    @classmethod
    def single_query_cached_kv_attention(
        cls, out, q, keys, values, mapping, scale, tables, lengths, size, longest, alibi, *_, **__
    ):
        del mapping, size, alibi
        one = torch.arange(len(q) + 1, dtype=torch.int32)
        cu_k = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        cls.flash_attn_varlen_func(
            out, q, keys, values, one, cu_k, 1, longest, scale, True, tables, None
        )


def __getattr__(name):
    """Kernels of mixtures of experts: their names are imported, dense models never call them."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
