"""`make bench-train`: head training on cached states against running the model in each step.

Both train on the same refusals of the same prompts, in the same batches, with the same
optimiser. The plain loop is what the authors do: the whole model in every step, logits of every
token by h (E + eps E W)^T. It runs `--sampled-steps` steps, its time is scaled to all of them
(the steps are alike), and the losses of both roads after these steps are compared; with
`--whole` it runs to the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import arguments, finish, open_smollm2, say
from steerbridge import data
from steerbridge.training import head as heads
from steerbridge.training.head import HeadSettings
from steerbridge.training.recipe import DEFAULT_REFUSAL


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--sampled-steps", type=int, default=6)
    parser.add_argument("--whole", action="store_true", help="run every step of the plain loop")
    options = parser.parse_args()
    model = open_smollm2()
    prompts = [e for e in data.from_corpus("train") if e.harmful][: options.prompts]
    settings = HeadSettings()

    start = time.monotonic()
    states, target = model.answer_states(prompts, DEFAULT_REFUSAL)
    captured = time.monotonic() - start
    head = model.output_head()
    cached = heads.train_head(states, target, head, settings)
    ours = time.monotonic() - start
    say(f"cached: {ours:.1f} s, {captured:.1f} s of them capture, loss {cached.loss_after:.6f}")

    steps = settings.steps if options.whole else options.sampled_steps
    seen: dict[str, list[float]] = {"plain": [], "cached": []}
    loop = PlainLoop(model, prompts, target, settings)
    start = time.monotonic()
    heads.descend(loop.loss, len(prompts), states.shape[2], settings, steps, keep(seen["plain"]))
    theirs = (time.monotonic() - start) * settings.steps / steps
    heads.train_head(states, target, head, settings, keep(seen["cached"]))
    pairs = list(zip(seen["plain"], seen["cached"], strict=False))
    finish(
        {
            "speedup": round(theirs / ours, 2),
            "cached_seconds": round(ours, 2),
            "plain_seconds": round(theirs, 2),
            "plain_steps_run": steps,
            "steps": settings.steps,
            "loss_cached": round(pairs[-1][1], 6),
            "loss_plain": round(pairs[-1][0], 6),
            "loss_difference": round(abs(pairs[-1][0] / pairs[-1][1] - 1), 6),
            "final_loss_cached": cached.loss_after,
        }
    )


def keep(losses: list[float]) -> Callable[[int, float], None]:
    return lambda _, loss: losses.append(loss)


class PlainLoop:
    """The whole model in each step; logits = h (E + eps E W)^T for every token."""

    def __init__(self, model: Any, prompts: Any, target: Any, settings: HeadSettings) -> None:
        self.model, self.settings = model, settings
        self.target = torch.from_numpy(np.asarray(target))
        self.rows = [model.render(p) + list(target[:-1]) for p in prompts]
        self.embedding = torch.from_numpy(np.asarray(model.output_head().weight))

    def loss(self, w: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        inputs = self.model._pad([self.rows[i] for i in prompts.tolist()])
        with torch.no_grad():
            h = self.model.model.model(**inputs, use_cache=False).last_hidden_state
        logits = h @ (self.embedding + self.settings.eps * self.embedding @ w).T
        wanted = torch.full(logits.shape[:2], -100)
        wanted[:, -len(self.target) :] = self.target
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


if __name__ == "__main__":
    main()
