"""llama-cpp-python's OpenAI-compatible server, steered by a package.

    python -m steerbridge_llama_cpp.server --package guard.gguf --model model.gguf

All other options are those of `python -m llama_cpp.server`. Answers, and each chunk of a
stream, carry the field `steering`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import llama_cpp

from steerbridge.errors import RuntimeMissing, SteerbridgeError
from steerbridge.package import SteeringPackage, load
from steerbridge_llama_cpp.llama import SteeredLlama

try:
    import llama_cpp.server.__main__ as server
    from llama_cpp.server.app import router
except ImportError as error:
    raise RuntimeMissing("llama-cpp-python[server]", extra="serve") from error

_ANSWERS = "completions"  # suffix of the paths whose answers get the field `steering`


def serve_steered(package: SteeringPackage) -> None:
    """Attach the package to every `Llama` of this process, which is the server's.

    The server looks up `llama_cpp.Llama` by name, both to open models and to call methods of the
    class, so the class itself is replaced.
    """

    class Llama(SteeredLlama):
        """The class that the server opens, with the package of this process."""

        def __init__(self, model_path: str, **options: Any) -> None:
            super().__init__(model_path, package=package, **options)

    vars(llama_cpp)["Llama"] = Llama  # the class of the process
    _keep_unknown_fields(router.routes)


def _keep_unknown_fields(routes: list[Any]) -> None:
    """Drop the response models of the routes: they would remove the field `steering`."""
    for i, route in enumerate(routes):
        if route.path.endswith(_ANSWERS):
            routes[i] = type(route)(  # the server's own class, which formats its errors
                route.path,
                route.endpoint,
                methods=route.methods,
                dependencies=route.dependencies,
                response_model=None,
            )


def main() -> None:
    """Load the package, then run llama-cpp-python's own command line."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--package", required=True)
    options, rest = parser.parse_known_args()
    try:
        serve_steered(load(options.package))
        sys.argv[1:] = rest
        server.main()  # type: ignore[no-untyped-call]
    except (SteerbridgeError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
