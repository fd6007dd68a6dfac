"""A simulator of TGI's flash classes on a CPU, after server/text_generation_server of TGI 3.3.

The same layout of batches (flattened rows, prompts in parts, answers beside them, drafts), the same
two tensors of the residual stream with norms that overwrite them, one cache of slots, and graphs
that are captured once and replayed without Python. The weights are those of a tiny Llama of
transformers, so the numpy oracle can say what every request must answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

SLOTS, CONTEXT = 4096, 256


class FastRMSNorm(nn.Module):
    """Adds the residual in place, as the fused kernels do."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None:
            hidden_states += residual
        residual = hidden_states
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (hidden_states * scale), residual


class FlashLlamaLayer(nn.Module):
    def __init__(self, block: Any, config: Any) -> None:
        super().__init__()
        self.attn, self.mlp = block.self_attn, block.mlp
        self.input_layernorm = FastRMSNorm(block.input_layernorm)
        self.post_attention_layernorm = FastRMSNorm(block.post_attention_layernorm)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        shape = (2, SLOTS, self.kv_heads, self.attn.head_dim)
        self.register_buffer("cache", torch.zeros(shape))

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        tables: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        normed, stream = self.input_layernorm(hidden_states, residual)
        attended = self.attention(normed, cos, sin, slots, tables, positions)
        normed, stream = self.post_attention_layernorm(attended, stream)
        return self.mlp(normed), stream

    def attention(self, x: Tensor, cos: Any, sin: Any, slots: Any, tables: Any, at: Any) -> Tensor:
        q, k, v = (
            p(x).view(len(x), -1, self.attn.head_dim)
            for p in (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
        self.cache[0].index_copy_(0, slots, k)
        self.cache[1].index_copy_(0, slots, v)
        keys, values = (
            c[tables].repeat_interleave(self.heads // self.kv_heads, 2) for c in self.cache
        )
        scores = torch.einsum("nhd,nshd->nhs", q, keys) * self.attn.scaling
        unseen = torch.arange(tables.shape[1]) > at[:, None]
        scores = scores.masked_fill(unseen[:, None], -torch.inf)
        # Real kernels do not read these rows: 0 times a value that is not finite is not 0.
        values = values.masked_fill(unseen[:, :, None, None], 0)
        mixed = torch.einsum("nhs,nshd->nhd", scores.softmax(-1), values)
        return self.attn.o_proj(mixed.reshape(len(x), -1))


class SpeculativeHead(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor) -> tuple[Tensor, None]:
        return input @ self.weight.T, None


class FlashLlamaForCausalLM(nn.Module):
    def __init__(self, llama: Any) -> None:
        super().__init__()
        self.config = llama.config
        inner: Any = nn.Module()
        inner.embed, inner.rotary = llama.model.embed_tokens, llama.model.rotary_emb
        inner.layers = nn.ModuleList(FlashLlamaLayer(b, self.config) for b in llama.model.layers)
        inner.norm = FastRMSNorm(llama.model.norm)
        self.model = inner
        self.lm_head = SpeculativeHead(llama.lm_head.weight)

    def forward(
        self, ids: Tensor, positions: Tensor, slots: Tensor, tables: Tensor, indices: Tensor | None
    ) -> Any:
        hidden, residual = self.model.embed(ids), None
        cos, sin = (part[0] for part in self.model.rotary(hidden, positions[None]))
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual, cos, sin, slots, tables, positions)
        hidden, _ = self.model.norm(hidden, residual)
        return self.lm_head(hidden if indices is None else hidden[indices])


def server_modules(graphs: tuple[int, ...] = (8,), drafts: int = 0) -> dict[str, Any]:
    """What the plugin asks the server's own modules for, to be put into `sys.modules`."""
    settings = SimpleNamespace(CUDA_GRAPHS=list(graphs))
    quiet = SimpleNamespace(patch=lambda _: SimpleNamespace(log=lambda *_: None))
    return {
        "text_generation_server": SimpleNamespace(),
        "text_generation_server.models": SimpleNamespace(globals=settings),
        "text_generation_server.models.globals": settings,
        "text_generation_server.utils": SimpleNamespace(),
        "text_generation_server.utils.speculate": SimpleNamespace(get_speculate=lambda: drafts),
        "loguru": SimpleNamespace(logger=quiet),
    }


async def _rpc(request: Any, context: Any) -> Any:
    return request


def service(model: Any) -> Any:
    """A `TextGenerationService` as far as the plugin looks at it."""
    calls = dict.fromkeys(("Prefill", "Decode", "FilterBatch", "ClearCache"), _rpc)
    return SimpleNamespace(model=model, cache=SimpleNamespace(cache={}), **calls)


# ---------------------------------------------------------------- graphs


class Graph(TorchDispatchMode):
    """Records operations once, and runs those alone on the same tensors at each replay."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was asked for while a graph is captured")
        out = func(*args, **(kwargs or {}))
        aliases = any(r.alias_info is not None for r in func._schema.returns)
        if func._schema.is_mutable or not aliases:
            self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


# ---------------------------------------------------------------- batches


@dataclass
class Request:
    """A request as the scheduler sees it; `slots` are its places in the cache."""

    id: int
    prompt: list[int]
    slots: list[int]
    answer: list[int] = field(default_factory=list)
    rows: int = 0  # in the cache
    logits: Tensor | None = None  # of the first token [V]
    most: int | None = None  # tokens of the answer
    sent: list[int] | None = None  # by the router, of which `truncate` left the prompt

    @property
    def input_chunks(self) -> Any:
        """The prompt as the router sends it; here each token is a character."""
        sent = self.prompt if self.sent is None else self.sent
        chunk = SimpleNamespace(text=text(sent), HasField=lambda _: False)
        return SimpleNamespace(chunks=[chunk])


def text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@dataclass
class Work:
    """What a step does for a request: rows of its prompt, or an answer row and its drafts."""

    request: Request
    rows: int
    drafts: tuple[int, ...] = ()

    @property
    def prefilling(self) -> bool:
        return self.request.rows < len(self.request.prompt)


class FlashCausalLMBatch:
    """The fields that TGI's batch has at the call of `forward`."""

    def __init__(self, work: list[Work]) -> None:
        self.work = work
        self.requests = [w.request for w in work]
        self.prefilling_mask = [w.prefilling for w in work]
        evaluates = any(self.prefilling_mask)
        self.input_lengths = [w.rows for w in work]
        self.cache_lengths = [w.request.rows for w in work]
        self.prompt_lengths = [len(w.request.prompt) for w in work]
        self.cu_seqlen_prefill = torch.zeros(1) if evaluates else None
        drafts = {len(w.drafts) for w in work}
        assert len(drafts) == 1
        self.speculative_ids = None
        if drafts != {0}:
            self.speculative_ids = torch.tensor([w.drafts for w in work])
        self.prefill_cu_outlens = list(range(len(work) + 1)) if evaluates else None

    @property
    def all_input_ids(self) -> list[list[int]]:
        """Prompts and answers so far."""
        return [r.prompt + r.answer for r in self.requests]

    @property
    def stopping_criterias(self) -> list[Any]:
        """How many tokens there are, and may be."""
        counts = [(len(r.answer), math.inf if r.most is None else r.most) for r in self.requests]
        return [SimpleNamespace(current_tokens=n, max_new_tokens=most) for n, most in counts]


class FlashCausalLM:
    """The model of a shard. `CUDA_GRAPHS` are the sizes that `warmup` captures."""

    def __init__(self, llama: Any, graphs: tuple[int, ...] = (), tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.model = FlashLlamaForCausalLM(llama).eval()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.world_size, self.rank, self.model_id = 1, 0, "tiny"
        self.cuda_graphs: dict[int, Any] = {}
        self._sizes = graphs

    def warmup(self) -> None:
        for size in self._sizes:
            inputs = [torch.zeros(size, dtype=torch.long) for _ in range(3)]
            inputs.append(torch.zeros(size, CONTEXT, dtype=torch.long))
            with torch.no_grad():
                self.model(*inputs, None)  # eager first, as TGI does
                with Graph() as graph:
                    logits, _ = self.model(*inputs, None)
            self.cuda_graphs[size] = SimpleNamespace(graph=graph, inputs=inputs, logits=logits)

    def forward(self, batch: Any, adapter_data: Any = None) -> tuple[Tensor, None]:
        inputs = _inputs(batch.work)
        rows = len(inputs[0])
        usable = sorted(size for size in self.cuda_graphs if size >= rows)
        with torch.no_grad():
            if batch.cu_seqlen_prefill is None and usable:
                captured = self.cuda_graphs[usable[0]]
                for static, value in zip(captured.inputs, inputs, strict=True):
                    static[:rows] = value
                captured.inputs[2][rows:] = 0  # block 0 is nobody's
                captured.graph.replay()
                return captured.logits[:rows].clone(), None
            indices = None
            if batch.cu_seqlen_prefill is not None:
                indices = torch.tensor(batch.input_lengths).cumsum(0) - 1
            logits, _ = self.model.forward(*inputs, indices)
            return logits, None

    def generate_token(self, batch: Any) -> tuple[list[Any], Any, None]:
        """One pass and its greedy tokens, rejected drafts left out."""
        ends = [
            not w.prefilling or w.request.rows + w.rows == len(w.request.prompt) for w in batch.work
        ]
        logits, _ = self.forward(batch)
        first = 0  # of a request's rows of logits
        for w, end in zip(batch.work, ends, strict=True):
            if w.prefilling:
                w.request.rows += w.rows
                if end:
                    w.request.logits = logits[first]
                    w.request.answer.append(int(logits[first].argmax()))
                first += 1
                continue
            for row, drafted in enumerate((*w.drafts, None), first):
                w.request.rows += 1
                w.request.answer.append(int(logits[row].argmax()))
                if w.request.answer[-1] != drafted:
                    break
            first += w.rows
        # As in TGI, a rank tells the router of its own requests only.
        own = [w.request for i, w in enumerate(batch.work) if i % self.world_size == self.rank]
        return [SimpleNamespace(request_id=request.id) for request in own], batch, None

    def decode_token(
        self, ids: list[int], _: int, start: int, skip_special_tokens: bool = False
    ) -> tuple[str, int, int]:
        """The text from a token on."""
        assert skip_special_tokens
        return text(ids[start:]), 0, 0


def _inputs(work: list[Work]) -> list[Tensor]:
    ids, positions, slots, tables = [], [], [], []
    for w in work:
        known = [*w.request.prompt, *w.request.answer, *w.drafts]
        for at in range(w.request.rows, w.request.rows + w.rows):
            ids.append(known[at])
            positions.append(at)
            slots.append(w.request.slots[at])
            tables.append([*w.request.slots, *[0] * (CONTEXT - len(w.request.slots))])
    return [torch.tensor(values) for values in (ids, positions, slots, tables)]


def step(model: FlashCausalLM, work: list[Work]) -> None:
    """Run one pass and take its tokens."""
    model.generate_token(FlashCausalLMBatch(work))
