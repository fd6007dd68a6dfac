"""Ratios of times, each beside the ratio of the plain runs to plain runs of the same rounds.

In every round the plain side (A), the plain side again (B: the control) and the steered side (C)
take turns. `X_ratio` is the median over the rounds of A / C (1 means free), `X_control` that of
A / B, which would be 1 on a machine without noise. The half-widths are those of 95 % intervals of
the two medians. A bar is met if the ratio is no lower than the bar less the control's half-width.
`idle` is false if a control's half-width is above 0.01: run again on an idle machine. Fewer than
four rounds give no half-width (null).

This module needs numpy alone: `tgi_client.py` uses it in the Python of TGI's server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import numpy as np

IDLE = 0.01
FEWEST = 4  # rounds that say something about their noise
RESAMPLES = 4000
LEVEL = 0.95

Times = Mapping[str, float]  # seconds of each side in one round


@dataclass(frozen=True)
class Ratio:
    """A median ratio and its control, each with the half-width of its interval."""

    value: float
    half_width: float | None
    control: float
    control_half_width: float | None

    @property
    def idle(self) -> bool:
        """True if the control says that nothing else disturbed the run."""
        return self.control_half_width is not None and self.control_half_width <= IDLE

    def to_json(self, name: str) -> dict[str, float | None]:
        """The four figures, the first under the ratio's name."""
        stem = name.removesuffix("_ratio")
        figures = {
            name: self.value,
            f"{stem}_half_width": self.half_width,
            f"{stem}_control": self.control,
            f"{stem}_control_half_width": self.control_half_width,
        }
        return {k: None if value is None else round(value, 4) for k, value in figures.items()}


def of_times(plain: Sequence[float], control: Sequence[float], steered: Sequence[float]) -> Ratio:
    """The ratio of plain to steered times, one of each per round, with its control."""
    a, b, c = (np.asarray(times, float) for times in (plain, control, steered))
    return Ratio(*median(a / c), *median(a / b))


def of_rounds(
    rounds: Sequence[Times],
    steered: str = "steered",
    *,
    plain: str = "plain",
    control: str = "control",
) -> Ratio:
    """The same from rounds that map the name of each side to its seconds."""
    return of_times(*([times[side] for times in rounds] for side in (plain, control, steered)))


def median(values: Any) -> tuple[float, float | None]:
    """The median, and half the width of its 95 % interval (bootstrap, always the same draws)."""
    values = np.asarray(values, float)
    if len(values) < FEWEST:
        return float(np.median(values)), None
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    medians = np.median(values[draws], axis=1)
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(np.median(values)), float(high - low) / 2


def report(ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    """The figures of some ratios by their names, and whether the machine was idle in all."""
    figures = [ratio.to_json(name) for name, ratio in ratios.items()]
    merged: dict[str, Any] = {key: value for each in figures for key, value in each.items()}
    return {**merged, "idle": all(ratio.idle for ratio in ratios.values())}


def order(round: int, names: Sequence[str]) -> list[str]:
    """Who goes when: turns rotate, and every other full rotation is in the opposite direction.

    So no side always comes first, and none always comes after the same other one.
    """
    rotation, turn = divmod(round, len(names))
    turned = [*names[turn:], *names[:turn]]
    return turned[::-1] if rotation % 2 else turned


def of_loads(
    rounds: int,
    sides: Mapping[str, Callable[[Any], float]],
    quiet: Sequence[Any],
    fires: Sequence[Any],
    size: int,
) -> dict[str, list[Times]]:
    """Seconds of each side on loads of so many requests, each round another: with requests that do
    not fire (`harmless_ratio`), and with a quarter that do (`mixed_ratio`)."""
    calm, harm = cycle(quiet), cycle(fires)
    times: dict[str, list[Times]] = {"harmless_ratio": [], "mixed_ratio": []}
    for i in range(rounds):
        for name, share in (("harmless_ratio", 0), ("mixed_ratio", size // 4)):
            load = [*islice(harm, share), *islice(calm, size - share)]
            runs = {side: partial(seconds, load) for side, seconds in sides.items()}
            times[name].append(alternate(i, runs))
    return times


def alternate(round: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Seconds of each run in one round: the fastest of three, in rotating order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(3):
        for name in order(3 * round + k, list(runs)):
            times[name].append(runs[name]())
    return {name: min(seconds) for name, seconds in times.items()}
