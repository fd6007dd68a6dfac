"""`say`: which token each row is forced to, and the logits that force it.

Shapes: B rows of the batch, H columns that reach the head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steerbridge import reference
from steerbridge.plan import Act, Plan
from steerbridge.spec import Say, SteeringSpec
from steerbridge_hf.rows import Layout
from steerbridge_torch import NEVER


class Speech:
    """The interventions of a package that force an answer.

    A script depends on where a rule begins, so it is looked up again when that changes.
    """

    def __init__(self, spec: SteeringSpec, plan: Plan) -> None:
        self._spec = spec
        stops = [stop for stop in plan.stops if stop.depth == plan.logits_depth]
        self._acts: tuple[Act, ...] = stops[0].acts if stops else ()
        self._heard: Tensor | None = None  # [B, A] ids behind the prompt
        self._scripts: dict[Act, tuple[Tensor, Tensor, Tensor]] = {}  # begin, ids, lengths

    @property
    def listens(self) -> bool:
        """Whether the ids of answers matter: marks of a block of reasoning."""
        return any(self._say(act).reasoning is not None for act in self._acts)

    def _say(self, act: Act) -> Say:
        say = self._spec.interventions[act.intervention]
        assert isinstance(say, Say)
        return say

    def hear(self, start: int, ids: Tensor | None, prompt: int) -> None:
        """The ids [B, Q] of a pass; None: it was given embeddings."""
        if ids is None or start + ids.shape[1] <= prompt:
            return
        new = ids[:, max(0, prompt - start) :]
        kept = new[:, :0] if self._heard is None else self._heard[:, : max(0, start - prompt)]
        self._heard = torch.cat([kept, new], dim=1)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        self._heard = None if self._heard is None else self._heard[rows]
        self._scripts = {}

    def forced(
        self,
        logits: Tensor,
        columns: Tensor,
        layout: Layout,
        begins: Mapping[int, Tensor],
        ids: Tensor | None,
    ) -> Tensor:
        """Logits [B, H, V] with the rows of rules that began forced; the same object if there are
        none.

        Args:
            columns: [H] of the head.
            begins: [B] columns at which rules begin.
            ids: [B, P] of the prompt.
        """
        chosen = torch.full((len(layout.ends), len(columns)), -1)
        since = torch.full_like(chosen, NEVER)
        at = columns.expand(len(chosen), -1)
        for act in self._acts:
            begin = begins[act.rule]
            speaks = (columns[None] >= begin[:, None]) & (begin[:, None] < since)
            if not bool(speaks.any()):
                continue
            script, lengths = self._script(act, begin, layout, ids)
            first = layout.number(begin.clamp(max=1 << 30)[:, None])
            row = (layout.number(at) - first).clamp(min=0)
            row = torch.minimum(row, (lengths - 1)[:, None])
            chosen = torch.where(speaks, script.gather(1, row), chosen)
            since = torch.where(speaks, begin[:, None], since)
        spoken = chosen >= 0
        if not bool(spoken.any()):
            return logits
        spoken = spoken.to(logits.device)
        new = logits.masked_fill(spoken[..., None], reference.UNSAID)
        token = chosen.clamp(min=0).to(logits.device)[..., None]
        kept = torch.where(spoken[..., None], torch.zeros_like(new[..., :1]), new.gather(2, token))
        return new.scatter(2, token, kept)

    def _script(
        self, act: Act, begin: Tensor, layout: Layout, ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What each row says [B, L], and of how many tokens [B]."""
        known = self._scripts.get(act)
        if known is None or not torch.equal(known[0], begin):
            said = [
                reference.script(
                    self._say(act),
                    self._ids(row, int(column), layout, ids) if column < NEVER else (),
                    int(layout.lengths[row]) - 1,
                )
                for row, column in enumerate(begin.tolist())
            ]
            lengths = torch.tensor([len(s) for s in said])
            longest = int(lengths.max())
            script = torch.tensor([[*s, *[0] * (longest - len(s))] for s in said])
            known = self._scripts[act] = (begin, script, lengths)
        return known[1], known[2]

    def _ids(self, row: int, column: int, layout: Layout, ids: Tensor | None) -> list[int]:
        """The ids of a row's sequence up to a column; -1 where they are not known."""
        count = int(layout.number(torch.tensor([[column]]).expand(len(layout.ends), -1))[row]) + 1
        length = int(layout.lengths[row])
        known = [-1] * length if ids is None else ids[row][layout.mask[row]].tolist()
        behind = [] if self._heard is None else self._heard[row].tolist()
        behind += [-1] * (count - length - len(behind))
        return [*known, *behind][:count]
