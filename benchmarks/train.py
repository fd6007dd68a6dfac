"""`make bench-train`: what training costs.

First a probe that reads rows, on 8,000 prompts in all their forms: `token_ratio` is the time of the
capture and one fit over that of the capture alone; the search, which fits some ten such probes on a
part of the prompts, is timed apart.

Then head training on cached states against running the model in each step.

Both train on the same refusals of the same prompts, in the same batches, with the same
optimiser. The plain loop is what the authors do: the whole model in every step, logits of every
token by h (E + eps E W)^T. It runs `--sampled-steps` steps, its time is scaled to all of them
(the steps are alike), and the losses of both methods after these steps are compared; with
`--whole` it runs to the end.

In each round the plain loop runs twice and training on cached states once, its capture included.
`speedup` is plain over cached time; the keys beside it are those of `ratios.py`.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import ratios
from common import CACHE, arguments, finish, open_smollm2, progress, say, splits
from steerbridge import corpus_examples
from steerbridge.training import head as heads
from steerbridge.training import parts, search
from steerbridge.training.settings import DEFAULT_REFUSAL, HeadSettings, TrainSettings
from steerbridge.training.states import all_readings, capture
from steerbridge.training.tokens import TokenDesign


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sampled-steps", type=int, default=6)
    parser.add_argument("--whole", action="store_true", help="run every step of the plain loop")
    parser.add_argument("--token-prompts", type=int, default=8000, help="0: leave this part out")
    options = parser.parse_args()
    tokens = of_tokens(options.data, options.token_prompts) if options.token_prompts else {}
    prompts = [e for e in corpus_examples("train") if e.harmful][: options.prompts]
    race = Race(open_smollm2(), prompts, options.sampled_steps, options.whole)
    runs = {"plain": race.plain, "control": race.plain, "cached": race.cached}
    rounds = []
    for i in range(options.rounds):
        rounds.append({name: runs[name]() for name in ratios.order(i, list(runs))})
        say(f"round {i + 1} of {options.rounds}, seconds: {rounds[-1]}")
    finish(
        {
            **ratios.report({"speedup": ratios.of_rounds(rounds, "cached")}),
            "cached_seconds": middle(rounds, "cached"),
            "plain_seconds": middle(rounds, "plain"),
            "rounds": options.rounds,
            **race.losses(),
            **tokens,
        }
    )


def of_tokens(folder: Path, count: int) -> dict[str, Any]:
    """Seconds and memory of capture, of one fit, and of the search."""
    train, _, _ = splits(folder)
    examples = train[:: max(1, len(train) // count)][:count]
    settings, model = TrainSettings(), open_smollm2()
    divided = parts.divide(model, examples, settings.forms, settings.seed)
    layers = model.facts.num_layers
    goal = next(goal for goal in settings.goals if goal.reads == "rows")
    seconds = {}
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        start = time.monotonic()
        made = divided.examples, all_readings(layers), search.row_sites(layers)
        states = capture(model, *made, Path(scratch), progress())
        seconds["capture"] = time.monotonic() - start
        task = search.Task(states, divided, goal, settings)
        start = time.monotonic()
        task.fit(TokenDesign(states.rows.sites[-2:]))
        seconds["fit"] = time.monotonic() - start
        start = time.monotonic()
        search.search(task, search.Awareness({}, {}), lambda: None)
        seconds["search"] = time.monotonic() - start - seconds["fit"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "token_ratio": round((seconds["capture"] + seconds["fit"]) / seconds["capture"], 3),
        "token_seconds": {name: round(value) for name, value in seconds.items()},
        "token_prompts": len(examples),
        "token_rows": int(states.rows.starts[-1]),
        "token_peak_mib": peak >> 10,
    }


def middle(rounds: Sequence[ratios.Times], side: str) -> float:
    return round(statistics.median(times[side] for times in rounds), 2)


class Race:
    """Both methods on the same prompts: each trains and returns the seconds that it took."""

    def __init__(self, model: Any, prompts: Any, steps: int, whole: bool) -> None:
        self._model, self._prompts, self._settings = model, prompts, HeadSettings()
        self._steps = self._settings.steps if whole else steps
        _, target = model.answer_states(prompts[:2], DEFAULT_REFUSAL)
        self._loop = PlainLoop(model, prompts, target, self._settings)
        self._plain: list[float] = []
        self._cached: heads.TrainedHead | None = None

    def plain(self) -> float:
        """Seconds of all steps, scaled from those that were run."""
        start = time.monotonic()
        width = self._model.facts.hidden_size
        _, self._plain = heads.descend(
            self._loop.loss, len(self._prompts), width, self._settings, self._steps
        )
        return (time.monotonic() - start) * self._settings.steps / self._steps

    def cached(self) -> float:
        start = time.monotonic()
        states, target = self._model.answer_states(self._prompts, DEFAULT_REFUSAL)
        captured = time.monotonic() - start
        self._cached = heads.train_head(states, target, self._model.output_head(), self._settings)
        say(f"cached: {captured:.1f} s of capture, loss {self._cached.loss_after:.6f}")
        return time.monotonic() - start

    def losses(self) -> dict[str, Any]:
        """The losses of both methods after the last step of the plain loop."""
        assert self._cached is not None
        plain, cached = self._plain[-1], self._cached.losses[self._steps - 1]
        return {
            "plain_steps_run": self._steps,
            "steps": self._settings.steps,
            "loss_cached": round(cached, 6),
            "loss_plain": round(plain, 6),
            "loss_difference": round(abs(plain / cached - 1), 6),
            "final_loss_cached": self._cached.loss_after,
        }


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
