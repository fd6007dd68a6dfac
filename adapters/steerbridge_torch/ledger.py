"""The record of a forward pass: which planned stops it has reached."""

from __future__ import annotations

from collections.abc import Iterable

from steerbridge.errors import HookLost, RowMappingLost


class Ledger:
    """Every stop reports once in a pass; a pass that does not add up gives no token.

    A hook that was removed, a module that was swapped, a shortened model and a module that is
    called twice are all seen here.

    Args:
        depths: of the stops, the head's among them (see `SteeringSpec.depth`).
    """

    def __init__(self, depths: Iterable[int]) -> None:
        self._wanted = frozenset(depths)
        self._seen: set[int] = set()

    @property
    def untouched(self) -> bool:
        """True until a stop reports: nothing ran, or a captured graph ran in place of the hooks."""
        return not self._seen

    def report(self, depth: int) -> None:
        """A stop was reached.

        Raises:
            RowMappingLost: for the second time in this pass.
        """
        if depth in self._seen:
            raise RowMappingLost(f"the site at depth {depth} was reached twice in one pass")
        self._seen.add(depth)

    def check(self) -> None:
        """The pass is over.

        Raises:
            HookLost: a stop was not reached.
        """
        if missing := self._wanted - self._seen:
            raise HookLost(
                f"sites at depths {sorted(missing)} were not reached: a hook was removed, or a "
                "module was replaced"
            )
