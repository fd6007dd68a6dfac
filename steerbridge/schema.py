"""The JSON Schema of `steering_config.json`, and a page that explains it in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from steerbridge.spec import SteeringSpec

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def build() -> dict[str, Any]:
    """The schema; what it cannot say (ids that refer, tensor shapes) is checked on load."""
    return {"$schema": SCHEMA_ID, **SteeringSpec.model_json_schema()}


def page(schema: dict[str, Any]) -> Iterator[str]:
    """The schema as lines of Markdown: a table of fields for each object."""
    yield "# Reference of `steering_config.json`"
    yield ""
    yield "Generated from the models by `steerbridge schema --markdown`; do not edit."
    yield ""
    yield "What a schema cannot say (ids that refer to something, shapes of tensors, the order of"
    yield "reading and acting) is checked when a package is loaded. How it is stored: [the"
    yield "format](format.md)."
    for name, model in {"SteeringSpec": schema, **schema["$defs"]}.items():
        if "properties" not in model:
            continue
        yield from ["", f"## {name}", "", *(model.get("description") or "").splitlines()]
        yield from ["", "| field | value | |", "|---|---|---|"]
        required = model.get("required", [])
        for field, value in model["properties"].items():
            if field in required:
                needed = "required"
            else:
                needed = f"default `{json.dumps(value.get('default'))}`"
            yield f"| `{field}` | {_value(value)} | {needed} |"


def _value(value: dict[str, Any]) -> str:
    """What a field may hold, in words."""
    if ref := value.get("$ref"):
        name = ref.rsplit("/", 1)[1]
        return "any JSON" if name == "JsonValue" else f"[{name}](#{name.lower()})"
    if options := value.get("anyOf") or value.get("oneOf"):
        return " or ".join(_value(option) for option in options)
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return ", ".join(f"`{json.dumps(option)}`" for option in value["enum"])
    kind = value.get("type", "any JSON")
    if kind == "array":
        bounds = _bounds(value, "minItems", "maxItems")
        return f"list of {_value(value['items'])}{bounds}" if "items" in value else f"list{bounds}"
    if kind == "object":
        return f"object of {_value(value.get('additionalProperties') or {})}"
    pattern = f", pattern `{_escaped(value['pattern'])}`" if "pattern" in value else ""
    said = f" ({value['description']})" if "description" in value else ""
    return f"{kind}{_bounds(value, 'minimum', 'maximum')}{pattern}{said}"


def _bounds(value: dict[str, Any], low: str, high: str) -> str:
    least, most = value.get(low), value.get(high)
    if least is None and most is None:
        return ""
    if most is None:
        return f", {least} or more"
    return f", {most} at most" if least is None else f", {least} to {most}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
