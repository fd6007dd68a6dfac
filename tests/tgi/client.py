"""A client of TGI's Python server, as its router speaks to it. Runs in the server's own Python.

    python client.py SOCKET < JSON    {"prompts": [...], "new": 8, "scenarios": ["alone", ...]}

Prints one JSON object: for each scenario the greedy tokens by prompt, in order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from text_generation_server.pb import generate_pb2 as pb
from text_generation_server.pb import generate_pb2_grpc as rpc
from transformers import AutoTokenizer

MAX_PREFILL = 4096


class Client:
    """Requests with ids of their own, and the tokens that came back."""

    def __init__(self, socket: str, model: str, prompts: Sequence[str], new: int) -> None:
        options = [("grpc.max_receive_message_length", -1)]
        channel = grpc.insecure_channel(f"unix://{socket}", options)
        self.stub = rpc.TextGenerationServiceStub(channel)
        self.prompts, self.new = prompts, new
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.info = self.stub.Info(pb.InfoRequest())
        self.block = self.info.block_size or 1
        self.tokens: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.blocks: dict[int, list[int]] = {}
        self._ids = iter(range(10**9))
        self._batches = iter(range(1, 10**9))
        self._free = iter(range(1, 10**9))

    def warm_up(self, prefill: int = MAX_PREFILL) -> None:
        self.stub.ClearCache(pb.ClearCacheRequest())
        request = self._request(0, "_test " * 64, 16)
        request.truncate = 64
        request.prefill_logprobs = True
        self.stub.Warmup(
            pb.WarmupRequest(
                batch=self._batch(0, [request]),
                max_input_tokens=64,
                max_prefill_tokens=prefill,
                max_total_tokens=512,
            )
        )

    def _request(self, id: int, text: str, new: int) -> Any:
        return pb.Request(
            id=id,
            inputs=text,
            input_chunks=pb.Input(chunks=[pb.InputChunk(text=text)]),
            truncate=1024,
            add_special_tokens=False,
            parameters=pb.NextTokenChooserParameters(
                temperature=1.0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0
            ),
            stopping_parameters=pb.StoppingCriteriaParameters(
                max_new_tokens=new, ignore_eos_token=True
            ),
        )

    def request(self, prompt: int, shares: int | None = None, chunk: int | None = None) -> Any:
        """A request on a prompt; `shares`: a request of the same prompt, whose whole blocks of
        cached rows are used; `chunk`: rows of its first pass."""
        made = self._request(next(self._ids), self.prompts[prompt], self.new)
        length = len(self.tokenizer(made.inputs, add_special_tokens=False)["input_ids"])
        total = length + self.new - 1 + self.info.speculate
        blocks = []
        if shares is not None:
            blocks = self.blocks[shares][: (length - 1) // self.block]
            made.cache_len = len(blocks) * self.block
        blocks += [next(self._free) for _ in range(-(-total // self.block) - len(blocks))]
        self.blocks[made.id] = blocks
        made.blocks.extend(blocks)
        slots = [s for b in blocks for s in range(b * self.block, (b + 1) * self.block)]
        made.slots.extend(slots[:total])
        if chunk is not None:
            made.chunk_len = chunk
        return made

    def _batch(self, id: int, requests: Sequence[Any]) -> Any:
        return pb.Batch(id=id, requests=requests, size=len(requests), max_tokens=100_000)

    def _take(self, answer: Any) -> Any:
        """Note tokens; the batch that goes on, without what has ended, or None."""
        for one in answer.generations:
            self.tokens.setdefault(one.request_id, []).extend(one.tokens.ids)
            if one.HasField("generated_text"):
                self.ended.add(one.request_id)
        if not answer.HasField("batch"):
            return None
        return self.filter(
            answer.batch, [i for i in answer.batch.request_ids if i not in self.ended]
        )

    def filter(self, batch: Any, keep: Sequence[int]) -> Any:
        if not keep:
            self.stub.ClearCache(pb.ClearCacheRequest(id=batch.id))
            return None
        if list(keep) == list(batch.request_ids):
            return batch
        asked = pb.FilterBatchRequest(batch_id=batch.id, request_ids=keep)
        return self.stub.FilterBatch(asked).batch

    def prefill(self, requests: Sequence[Any], beside: Any = None) -> Any:
        message = pb.PrefillRequest(batch=self._batch(next(self._batches), requests))
        if beside is not None:
            message.cached_batch.CopyFrom(beside)
        return self._take(self.stub.Prefill(message))

    def decode(self, *batches: Any) -> Any:
        going = [b for b in batches if b is not None]
        return self._take(self.stub.Decode(pb.DecodeRequest(batches=going))) if going else None

    def finish(self, batch: Any) -> None:
        while batch is not None:
            batch = self.decode(batch)

    def answers(self, ids: Sequence[int]) -> list[list[int]]:
        return [self.tokens[i][: self.new] for i in ids]


def alone(c: Client) -> list[int]:
    ids = []
    for i in range(len(c.prompts)):
        request = c.request(i)
        c.finish(c.prefill([request]))
        ids.append(request.id)
    return ids


def batched(c: Client) -> list[int]:
    requests = [c.request(i) for i in range(len(c.prompts))]
    c.finish(c.prefill(requests))
    return [r.id for r in requests]


def filtered(c: Client) -> list[int]:
    """Every request is a neighbour of others that are cancelled after the first token."""
    requests = [c.request(i) for i in range(len(c.prompts))]
    batch = c.prefill(requests)
    batch = c.decode(c.filter(batch, [r.id for r in requests if r.id % 3 != 1]))
    c.finish(batch)
    again = [c.request(i) for i, r in enumerate(requests) if r.id % 3 == 1]
    c.finish(c.prefill(again))
    left = iter(r.id for r in again)
    return [r.id if r.id % 3 != 1 else next(left) for r in requests]


def concatenated(c: Client) -> list[int]:
    """Batches that are begun at different times and then run as one."""
    ids, going = [], []
    for i in range(len(c.prompts)):
        request = c.request(i)
        ids.append(request.id)
        going.append(c.prefill([request]))
        going = [c.decode(*reversed(going))]
    c.finish(going[0])
    return ids


def chunked(c: Client) -> list[int]:
    """Prompts in parts, beside answers under way."""
    c.warm_up(prefill=16)
    ids: list[int] = []
    batch = None
    for i in range(len(c.prompts)):
        request = c.request(i, chunk=7)
        ids.append(request.id)
        batch = c.decode(c.prefill([request], batch))
    c.finish(batch)
    c.warm_up()
    return ids


def cached(c: Client) -> list[int]:
    """Every prompt again, all but its last rows from the cache."""
    ids = []
    for i in range(len(c.prompts)):
        first = c.request(i)
        c.finish(c.prefill([first]))
        again = c.request(i, shares=first.id)
        assert again.cache_len > 0, "prompts must be longer than a block"
        c.finish(c.prefill([again]))
        ids.append(again.id)
    return ids


SCENARIOS: dict[str, Callable[[Client], list[int]]] = {
    f.__name__: f for f in (alone, batched, filtered, concatenated, chunked, cached)
}


def main() -> None:
    asked = json.load(sys.stdin)
    client = Client(sys.argv[1], asked["model"], asked["prompts"], asked["new"])
    client.warm_up()
    answers: dict[str, Any] = {}
    for name in asked["scenarios"]:
        ids = SCENARIOS[name](client)
        answers[name] = {"requests": ids, "tokens": client.answers(ids)}
    health = client._request(2**64 - 1, "liveness", 1)
    health.blocks.append(0)
    health.slots.extend(range(4))
    client.stub.Prefill(pb.PrefillRequest(batch=client._batch(2**64 - 1, [health])))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
