"""An answer that is stopped in its middle: a package made by hand, without training.

    python examples/watched.py

The probe is linear, and its direction is known: the mean state of a few sentences about food less
that of some about other things. It reads the rows of the answer, eight at a time; where the model
begins to talk about food, a rule has it say a sentence instead. The package is saved, and runs in
transformers and in llama.cpp.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import steerbridge
from steerbridge import Example, SteeringPackage
from steerbridge.package import parse
from steerbridge.spec import LayerInput, PromptEnd, Reading
from steerbridge.tensors import Tensor

LAYER = 14
ROWS, ROWS_BEHIND = 8, 5  # of each sentence; of the chat template behind it
STEEP = 4  # the logit of the mean of FOOD is half of it, that of OTHER minus that
FOOD = [
    "Knead the dough, let it rise for an hour and bake it in a hot oven.",
    "Chop the onions, fry them in butter and add the tomatoes.",
    "The soup needs salt, pepper and a spoon of cream before it is served.",
    "For dinner they had roasted chicken with potatoes and a green salad.",
    "Whisk the eggs with sugar until the mixture is pale, then fold in the flour.",
    "The cake was soft, with a layer of chocolate and fresh strawberries.",
]
OTHER = [
    "The train leaves at nine and arrives in the old town before noon.",
    "A new bridge was built over the river for cyclists and walkers.",
    "She opened the window and listened to the rain on the roof.",
    "The museum shows paintings of the last century on three floors.",
    "Our team meets every Monday to plan the work of the week.",
    "The path leads through a forest to a small lake with clear water.",
]
SENTENCE = "I would rather not talk about food."
QUESTION = "Write a short story about a walk through a city that ends in a restaurant."


# --8<-- [start:package]
def made(model: Any) -> SteeringPackage:
    """The package; `model` is opened in transformers."""
    site = LayerInput(stream="layer_input", layer=LAYER)
    readings = [
        Reading(site=site, position=PromptEnd(type="prompt_end", offset=-ROWS_BEHIND - k))
        for k in range(ROWS)
    ]
    sides = []
    for texts in (FOOD, OTHER):
        states = np.empty((len(texts), ROWS, model.facts.hidden_size), np.float32)
        model.capture([Example(text, False) for text in texts], readings, states)
        sides.append(states.mean(axis=(0, 1)))
    direction = (sides[0] - sides[1]) / np.square(sides[0] - sides[1]).sum() * STEEP
    middle = (sides[0] + sides[1]) / 2
    tokens = model.tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    spec = {
        "spec_version": "1.1",
        "name": "no food in answers",
        "base_model": model.facts.info().model_dump(exclude_unset=True),
        "probes": [
            {
                "id": "food",
                "type": "linear",
                "token_reading": {
                    "sites": [{"stream": "layer_input", "layer": LAYER}],
                    "scope": "answer",
                    "window": 8,
                    "skip": 4,
                    "rows": "all",
                },
                "weight": "direction",
                "bias": float(-direction @ middle),
                "link": "sigmoid",
                "comparator": ">",
                "threshold": 0.65,
            }
        ],
        "interventions": [
            {
                "id": "sentence",
                "type": "say",
                "text": SENTENCE,
                "tokens": [*tokens, model.end_of_turn()],
            }
        ],
        "rules": [
            {
                "id": "stop",
                "condition": {"type": "any", "probes": ["food"]},
                "interventions": ["sentence"],
                "strength": {"type": "constant", "value": 1.0},
            }
        ],
    }
    weight = Tensor.of(direction.astype(np.float32))
    return SteeringPackage(parse(spec), {"direction": weight})
    # --8<-- [end:package]


def main(target: Path) -> None:
    package = made(steerbridge.open_model("hf", "smollm2"))
    print(package.save(target))
    for runtime in ("hf", "llama.cpp"):
        model = steerbridge.open_model(runtime, "smollm2")
        [plain] = model.generate([Example(QUESTION, False)], None, max_new_tokens=120)
        [answer] = model.generate([Example(QUESTION, False)], package, max_new_tokens=120)
        print(f"\n--- {runtime}, unsteered\n{plain.text}")
        print(f"--- {runtime}, watched\n{answer.text}\n{answer.outcome}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "watched"))
