"""LiteLLM's moderation guardrail, pointed at a server: prints which texts it lets through.

python litellm_guardrail.py URL < JSON    ["text", ...]
"""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

from fastapi import HTTPException
from litellm.proxy.guardrails.guardrail_hooks.openai.moderations import OpenAIModerationGuardrail

guardrail = OpenAIModerationGuardrail("guard", api_key="none", api_base=f"{sys.argv[1]}/v1")


async def passes(text: str) -> object:
    """True, or what was violated."""
    try:
        data = {"metadata": {}}
        await guardrail.apply_guardrail({"texts": [text]}, data, "request")
    except HTTPException as error:
        return error.detail["moderation_result"]["violated_categories"]
    return True


async def main() -> None:
    print(json.dumps([await passes(text) for text in json.load(sys.stdin)]))


asyncio.run(main())
