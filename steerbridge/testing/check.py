"""`check_runtime`: every shape of request against the oracle, for one driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from steerbridge.errors import SteerbridgeError
from steerbridge.testing.driver import Driver
from steerbridge.testing.kit import Ground, Kept, Lacking, Result, Shape, Trial, Wrong
from steerbridge.testing.shapes import SHAPES


def check_runtime(
    driver: Driver,
    ground: Ground,
    shapes: Sequence[Shape] | None = None,
    tell: Callable[[str, Result], None] | None = None,
) -> dict[str, Result]:
    """Try every shape on a runtime.

    Args:
        ground: models and files; one may serve several drivers.
        shapes: some of `SHAPES`; None: all.
        tell: called with each result.

    Returns:
        Shape -> result. `wrong` anywhere means that the runtime breaks the contract.
    """
    results = {}
    with closing(Kept(driver)) as kept:
        for shape in SHAPES if shapes is None else shapes:
            results[shape.name] = _tried(shape, driver, ground, kept)
            if tell:
                tell(shape.name, results[shape.name])
    return results


def _tried(shape: Shape, driver: Driver, ground: Ground, kept: Kept) -> Result:
    if missing := shape.needs - driver.abilities:
        return Result("absent", ", ".join(sorted(missing)))
    try:
        shape.run(Trial(driver, ground, kept))
    except Wrong as wrong:
        return Result("wrong", str(wrong))
    except Lacking as lacking:
        return Result("absent", str(lacking))
    except SteerbridgeError as error:
        return Result("refused", f"{type(error).__name__}: {error}")
    except Exception as error:  # an untyped error is no refusal
        return Result("wrong", f"{type(error).__name__}: {error}")
    return Result("right")
