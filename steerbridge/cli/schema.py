"""`steerbridge schema`: the JSON Schema of `steering_config.json`."""

from __future__ import annotations

import json
from typing import Any

from steerbridge.spec import SteeringSpec

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def schema() -> None:
    """Print the JSON Schema of steering_config.json, generated from the models."""
    print(json.dumps(build(), indent=2))


def build() -> dict[str, Any]:
    """The schema; what it cannot say (ids that refer, tensor shapes) is checked on load."""
    return {"$schema": SCHEMA_ID, **SteeringSpec.model_json_schema()}
