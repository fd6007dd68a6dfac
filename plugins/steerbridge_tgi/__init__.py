"""Steerbridge for text-generation-inference: steers its unmodified server.

    steerbridge run --package guard.gguf -- text-generation-launcher --model-id M

`steerbridge run` adds the variables of `environment` to the launcher's environment. Each shard
then imports `site/sitecustomize.py`, which waits for the server to be imported (`hook`) and
attaches the package to the loaded model (`attach`). torch is not imported before that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def environment(package: Path, before: Mapping[str, str]) -> dict[str, str]:
    """Variables that make the server steer with a package.

    Args:
        package: the file or directory of the package.
        before: the environment without Steerbridge.
    """
    paths = [str(Path(__file__).with_name("site")), *filter(None, [before.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "STEERBRIDGE_PACKAGE": str(package)}
