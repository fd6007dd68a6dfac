"""Several packages in one engine, of which each request has one.

All of them read every row: a prefix that one request computed serves any other, whichever package
that one has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from steerbridge.errors import HookLost
from steerbridge.runtime import Outcome
from steerbridge_vllm.gates import Gates, Mine
from steerbridge_vllm.rows import Part


class Several:
    """The gates of each package; the rest of its members are those of `Gates`.

    Args:
        made: makes the gates of a package that acts on these requests, by its name; requests that
            name none have the first.
    """

    def __init__(self, made: Mapping[str, Callable[[Mine], Gates]]) -> None:
        self._named: dict[str, str] = {}
        self._first = next(iter(made))
        self.gates = {name: make(self._has(name)) for name, make in made.items()}
        self._at: dict[int, list[Gates]] = {}  # by depth
        for gates in self._all:
            for depth in gates.depths:
                self._at.setdefault(depth, []).append(gates)

    def _has(self, name: str) -> Mine:
        return lambda request: self.name_of(request) == name

    def name_of(self, request: str) -> str:
        """The package of a request."""
        return self._named.get(request, self._first)

    def choose(self, request: str, name: str | None) -> None:
        """A request that is new; `name`: of the package that it wants.

        Raises:
            HookLost: there is none of this name.
        """
        if name is None:
            return
        if name not in self.gates:
            raise HookLost(f"request {request}: there is no package {name!r}")
        self._named[request] = name

    @property
    def _all(self) -> Iterable[Gates]:
        return self.gates.values()

    @property
    def depths(self) -> list[int]:
        """See `Gates`."""
        return sorted(self._at)

    @property
    def keeps_rows(self) -> bool:
        """See `Gates`."""
        return any(gates.keeps_rows for gates in self._all)

    def allocate(self, blocks: int, size: int) -> None:
        """See `Gates`."""
        for gates in self._all:
            if gates.keeps_rows:
                gates.allocate(blocks, size)

    @property
    def samples(self) -> bool:
        """See `Gates`."""
        return any(gates.samples for gates in self._all)

    def begin(self, parts: Sequence[Part]) -> None:
        """See `Gates`."""
        for gates in self._all:
            gates.begin(parts)

    def visit(self, depth: int, hidden: Tensor, residual: Tensor | None) -> None:
        """See `ops.Visitor`."""
        for gates in self._at[depth]:
            gates.visit(depth, hidden, residual)

    def finish(self, hidden: Tensor) -> None:
        """See `Gates`."""
        for gates in self._all:
            gates.finish(hidden)

    def at_head(self, rows_LD: Tensor) -> Tensor:
        """See `Gates`."""
        for gates in self._all:
            rows_LD = gates.at_head(rows_LD)
        return rows_LD

    def said(self) -> dict[int, int]:
        """See `Gates`."""
        return {row: token for gates in self._all for row, token in gates.said().items()}

    def end(self, accepted: Mapping[str, int]) -> dict[str, Outcome]:
        """See `Gates`."""
        told: dict[str, Outcome] = {}
        for gates in self._all:
            told |= gates.end(accepted)
        return told

    def drop(self) -> None:
        """See `Gates`."""
        for gates in self._all:
            gates.drop()

    def forget(self, requests: Iterable[str]) -> None:
        """See `Gates`."""
        ended = [*requests]
        for gates in self._all:
            gates.forget(ended)
        for request in ended:
            self._named.pop(request, None)

    @property
    def live(self) -> int:
        """How many requests are known."""
        return max(gates.live for gates in self._all) + len(self._named)
