"""The way of a verdict: from a worker with its tokens to the scheduler, and from there with the
request's output to whoever asked.

A token that comes without a verdict was made by a worker without the package: then nothing is
answered at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Final

from steerbridge.errors import HookLost

FIELD: Final = "steering"
NOTHING: Final = -1  # in place of a token that was not sampled


def attached(output: Any, content: Mapping[str, Any]) -> Any:
    """What a model runner returns, with the verdicts of its pass, by request, as JSON has them."""
    if hasattr(output, "get_output"):  # its tokens are still on their way from the device
        original = output.get_output

        def get_output() -> Any:
            finished = original()
            finished.steering = content
            return finished

        output.get_output = get_output
    else:
        output.steering = content
    return output


def wrap_scheduler(module: Any) -> None:
    """Let the scheduler pass verdicts on, and let it see that there is one for every request."""
    scheduler = module.Scheduler
    original = scheduler.update_from_output

    @functools.wraps(original)
    def update_from_output(self: Any, scheduled: Any, output: Any) -> Any:
        known: dict[str, Any] = self.__dict__.setdefault("_steering", {})
        told = getattr(output, "steering", {})
        known.update(told)
        results = original(self, scheduled, output)
        for group in results.values():
            for one in group.outputs:
                if one.new_token_ids and one.request_id not in known:
                    raise HookLost(
                        f"request {one.request_id}: a worker without the package made its tokens"
                    )
                if one.request_id in told or (one.finished and one.request_id in known):
                    verdict = {FIELD: known[one.request_id]}
                    one.kv_transfer_params = {**(one.kv_transfer_params or {}), **verdict}
        for request in scheduled.finished_req_ids:
            known.pop(request, None)
        return results

    scheduler.update_from_output = update_from_output


def wrap_outputs(module: Any) -> None:
    """Give each `RequestOutput` the field `steering`: verdicts by index of the answer."""
    state = module.RequestState
    original = state.make_request_output
    signature = inspect.signature(original)

    @functools.wraps(original)
    def make_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        params = dict(bound.arguments.get("kv_transfer_params") or {})
        verdict = params.pop(FIELD, None)
        if "kv_transfer_params" in bound.arguments:
            bound.arguments["kv_transfer_params"] = params or None
        owner = self if self.parent_req is None else self.parent_req
        known: dict[int, Any] = owner.__dict__.setdefault("_steering", {})
        if verdict is not None:
            known[self.request_index] = verdict
        output = original(*bound.args, **bound.kwargs)
        if output is not None:
            output.steering = dict(known)
        return output

    state.make_request_output = make_request_output


def wrap_merging(module: Any) -> None:
    """Let outputs that a slow reader gets together keep the last verdicts."""
    output = module.RequestOutput
    original = output.add

    @functools.wraps(original)
    def add(self: Any, later: Any, *args: Any, **kwargs: Any) -> None:
        original(self, later, *args, **kwargs)
        self.steering = later.steering

    output.add = add
