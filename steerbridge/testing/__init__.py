"""The conformance kit: does a runtime keep the contract?

`check_runtime(driver, ground)` sends every shape of request in `SHAPES` to a runtime, compares what
comes back with an oracle in numpy, and says for each shape `right`, `refused` (a typed error before
a token), `absent` (the runtime has no such thing) or `wrong`. A driver is a small class that sends
a request and reads tokens, verdicts and, where there are some, logits.

    from steerbridge.testing import Ground, OpenerDriver, check_runtime

    results = check_runtime(OpenerDriver("toy", my_open_model), Ground(tmp_path))
    assert not [name for name, result in results.items() if result.status == "wrong"]

Refusing is no way to pass: keep the results in a file of pins (`Pins`), so that a shape that was
right and is refused now fails a test.
"""

from typing import TYPE_CHECKING

from steerbridge.registry import lazy

if TYPE_CHECKING:
    from steerbridge.testing.check import check_runtime
    from steerbridge.testing.driver import Ability, Driver, Files, How, Reply, Running
    from steerbridge.testing.kit import Ground, Result, Shape
    from steerbridge.testing.model import TinyModel
    from steerbridge.testing.opener import OpenerDriver
    from steerbridge.testing.pins import Pins, table
    from steerbridge.testing.shapes import SHAPES

_HOMES = {
    "check": ("check_runtime",),
    "driver": ("Ability", "Driver", "Files", "How", "Reply", "Running"),
    "kit": ("Ground", "Result", "Shape"),
    "model": ("TinyModel",),
    "opener": ("OpenerDriver",),
    "pins": ("Pins", "table"),
    "shapes": ("SHAPES",),
}

__all__ = [
    "SHAPES",
    "Ability",
    "Driver",
    "Files",
    "Ground",
    "How",
    "OpenerDriver",
    "Pins",
    "Reply",
    "Result",
    "Running",
    "Shape",
    "TinyModel",
    "check_runtime",
    "table",
]

__getattr__ = lazy(
    __name__, {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}
)
