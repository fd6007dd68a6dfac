"""`SteeredLlama` and `steer`: `llama_cpp.Llama` with a steering package inside."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import llama_cpp

from steerbridge.package import SteeringPackage, load
from steerbridge_llama_cpp._mixin import Steering
from steerbridge_llama_cpp._tracker import OnOutcome
from steerbridge_llama_cpp.session import Session


def steer(
    llama: llama_cpp.Llama,
    package: SteeringPackage,
    *,
    ignore: Collection[str] = (),
    on_outcome: OnOutcome | None = None,
) -> Session:
    """Steer every request of `llama`, until `remove` or the end of a `with`.

    The Llama gets a new context, so its KV cache starts empty, and settings applied directly to
    the old context (a control vector, for example) must be applied again.

    Args:
        llama: an open model; any quantisation and backend.
        package: checked against the model; thresholds calibrated for its quantisation under
            the runtime name `llama.cpp` are used if the package holds any.
        ignore: names of base-model fields that may differ (see `fingerprint.CHECKED`).
        on_outcome: called with the outcome of each request when its prompt has ended.

    Raises:
        ModelMismatch: the package was made for another model.
        UnsupportedFeature: a site that llama.cpp does not expose, or it is steered already.
    """
    session = Session(llama, package, ignore, on_outcome)
    session.apply()
    return session


class SteeredLlama(Steering, llama_cpp.Llama):
    """`llama_cpp.Llama` with a package attached from the start, as `steer` attaches it.

    Args:
        model_path: a GGUF file; this and all other options are those of `Llama`.
        package: a package, or the path of one.
        ignore, on_outcome: see `steer`.

    Raises: as `steer`, and what `Llama` and `steerbridge.load` raise.
    """

    def __init__(
        self,
        model_path: str,
        *,
        package: SteeringPackage | str | Path,
        ignore: Collection[str] = (),
        on_outcome: OnOutcome | None = None,
        **options: Any,
    ) -> None:
        loaded = package if isinstance(package, SteeringPackage) else load(package)
        super().__init__(model_path, **options)
        steer(self, loaded, ignore=ignore, on_outcome=on_outcome)
