"""One rank of a sharded model on the simulator: prints which requests fire.

    python ranks.py RANK FOLDER    FOLDER holds guard.gguf and prompts.json

Rank 1 rounds differently: its embeddings are off by a little.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.distributed as dist

import flash
import helpers
from steerbridge_tgi.attach import attach


def perturbed(llama):
    """What another order of sums may do, made larger."""
    generator = torch.Generator().manual_seed(1)
    weight = llama.model.embed_tokens.weight.data
    weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return llama


def request(id: int, prompt: list[int]) -> flash.Request:
    slots = list(range(1 + 64 * id, 64 * (id + 1)))
    return flash.Request(id, prompt, slots, most=2)


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sys.modules.update(flash.server_modules())
    llama = helpers.tiny("llama")
    model = flash.FlashCausalLM(perturbed(llama) if rank else llama)
    model.world_size, model.rank, model.process_group = 2, rank, dist.group.WORLD
    gates = attach(flash.service(model), str(folder / "guard.gguf"))
    prompts = json.loads((folder / "prompts.json").read_text())
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    flash.step(model, [flash.Work(r, len(r.prompt)) for r in requests])
    flash.step(model, [flash.Work(r, 1) for r in requests])
    # The router sends what ended for length again, as new requests.
    again = [request(len(prompts) + r.id, r.prompt + r.answer) for r in requests]
    flash.step(model, [flash.Work(r, len(r.prompt)) for r in again])
    outcomes = [gates._requests[r.id].outcome for r in (*requests, *again)]
    print(
        json.dumps([[v.score for o in outcomes for v in o.verdicts], [o.fired for o in outcomes]])
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
