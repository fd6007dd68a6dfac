"""What the entry points name: where the parts are. Imports nothing that takes long."""

from steerbridge.registry import Command, Runtime

RUNTIME = Runtime(
    target="toy_runtime:ToyModel",
    engine="toy_engine:ToyEngine",
)
TENSORS = Command(
    target="toy_command:tensors",
    summary="List the tensors of a package.",
)
