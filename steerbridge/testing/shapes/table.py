"""How shapes are added to the table, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from steerbridge.testing.cases import Case
from steerbridge.testing.driver import Ability
from steerbridge.testing.kit import Guarded, Shape, Trial

KINDS: Final = {
    "head": "",
    "layers": ", steering a layer",
    "mean": ", reading a mean",
    "earlier": ", reading an earlier token",
    "pictures": ", reading the pictures",
}
ONE: Final = [chr(c) for c in range(33, 127)]  # texts of one token


class Table(list[Shape]):
    """Shapes in the order in which they are added."""

    def shape(self, name: str, *needs: Ability) -> Callable[[Callable[[Trial], None]], None]:
        """Add a shape."""

        def add(run: Callable[[Trial], None]) -> None:
            self.append(Shape(name, run, frozenset(needs)))

        return add

    def each(
        self, name: str, *needs: Ability, kinds: Sequence[str] = ("head", "mean", "layers")
    ) -> Callable[[Callable[[Guarded], None]], None]:
        """Add a shape for each kind of package; it is given a running guard."""

        def add(run: Callable[[Guarded], None]) -> None:
            for kind in kinds:

                @self.shape(name + KINDS[kind], *needs)
                def _(trial: Trial, kind: str = kind) -> None:
                    with trial.guarded(kind) as guard:
                        run(guard)

        return add


def first(prompts: Iterable[str], wanted: Callable[[str], bool], what: str) -> str:
    """The first prompt that will do; the tiny model has many."""
    prompt = next((p for p in prompts if wanted(p)), None)
    assert prompt is not None, f"the tiny model has no prompt for: {what}"
    return prompt


def sound(case: Case, prompt: str, fired: bool) -> bool:
    """True if a prompt is sound, and fires or not as wanted."""
    return case.holds(prompt) == fired and case.sound(prompt)
