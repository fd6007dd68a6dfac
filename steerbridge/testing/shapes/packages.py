"""Every probe, reading, intervention and rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from steerbridge.testing import cases
from steerbridge.testing.cases import at_layers, cosine, head, linear, mlp, rule
from steerbridge.testing.kit import Trial
from steerbridge.testing.shapes.table import Table

TABLE: Final = Table()

FEW: Final = 24  # prompts for a package of a certain kind


def package_shape(table: Table, name: str, **parts: Any) -> None:
    """A shape that asks some prompts with a package of a certain kind."""

    @table.shape(name)
    def _(trial: Trial) -> None:
        case = trial.ground.case(name, lambda: cases.case(trial.model, **{"count": FEW, **parts}))
        assert min(len(case.fired), len(case.quiet)) >= 2 or not parts.get("probes", True), name
        with trial.guarded(case) as guard:
            for prompt in (*case.fired[:3], *case.quiet[:3]):
                guard.right([prompt])


def _probe(name: str, probe: cases.Json, **more: Any) -> None:
    package_shape(TABLE, f"probe: {name}", probes=[{**probe, **more}])


_probe("linear", linear("identity"))
_probe("linear with a sigmoid", linear())
_probe("fires at or above the threshold", linear(comparator=">="))
_probe("fires below the threshold", linear(comparator="<"))
_probe("fires at or below the threshold", linear(comparator="<="))
_probe("MLP, ReLU, softmax", mlp())
_probe("MLP, tanh, softmax", mlp("tanh"))
_probe("MLP, GELU, softmax", mlp("gelu"))
_probe("MLP of three layers", mlp(layers=3))
_probe("MLP, sigmoid, high is harm", mlp(output={"type": "sigmoid", "harmful_when": "high"}))
_probe("MLP, sigmoid, low is harm", mlp(output={"type": "sigmoid", "harmful_when": "low"}))
_probe("cosine", cosine())
_probe("cosine without a squash", cosine("none"))
_probe("standardised inputs", linear(), input_mean="p.mean", input_scale="p.scale")


def _reading(name: str, *readings: cases.Json) -> None:
    package_shape(TABLE, f"reading: {name}", probes=[linear(readings=readings)])


_reading("an earlier token", cases.reading("layer_input[2]", offset=-2))
_reading("the mean of the prompt", *cases.means())
_reading("the first block's output", cases.reading("layer_input[1]"))
_reading("a layer's output", cases.reading("layer_output[1]"))
_reading("the last block's input", cases.reading("layer_input[3]"))
_reading("the input of the final norm", cases.reading(cases.LAST))
_reading("several places", *cases.END, cases.reading("layer_input[1]"), *cases.means())
_reading(
    "images, in a prompt without one",
    *cases.END,
    cases.reading("layer_input[2]", "image_mean"),
)


def _acts(name: str, *acts: cases.Json, probes: Sequence[cases.Json] = (linear(),)) -> None:
    package_shape(TABLE, f"intervention: {name}", probes=probes, interventions=acts)


_acts("a dense head", head("dense"))
_acts("a head of low rank", head())
_acts("a vector at one layer", at_layers("add_vector", 2, alpha=2.0))
_acts("a vector at several layers", at_layers("add_vector", 1, 2, alpha=1.5))
_acts("a projection", at_layers("project_out", 2, alpha=0.8))
_acts("a head and a vector", head(), at_layers("add_vector", 2, alpha=1.0))


def _unconditional(name: str, act: cases.Json) -> None:
    package_shape(
        TABLE,
        f"rule: unconditional, {name}",
        probes=[],
        interventions=[act],
        rules=[rule(None, [act["id"]])],
    )


_unconditional("a head", head())
_unconditional("a vector from the prompt end", at_layers("add_vector", 2, alpha=2.0))
_unconditional(
    "a vector at all positions", at_layers("add_vector", 1, alpha=1.0, position="all_positions")
)

_TWO: Final = [linear(id="p"), linear(id="q", readings=cases.means())]
package_shape(TABLE, "rule: any of two probes", probes=_TWO)
package_shape(TABLE, "rule: all of two probes", probes=_TWO, rules=[rule(["p", "q"], ["h"], "all")])
package_shape(
    TABLE,
    "rule: strength by score",
    rules=[rule(["p"], ["h"], strength={"type": "score", "probe": "p", "scale": 1.5})],
)
package_shape(
    TABLE,
    "rule: two rules of two probes",
    probes=_TWO,
    interventions=[head(), at_layers("add_vector", 2, alpha=2.0)],
    rules=[rule(["p"], ["h"]), rule(["q"], ["v"], id="s")],
)
