"""The reference semantics in torch, batched over requests.

Arithmetic is float32 whatever the model's dtype, outside autocast and of whatever default dtype;
results are cast back. Tensors follow the hidden states to their device, once per device. Nothing
here branches on data, so that a captured graph can hold it.

Shapes: B rows of the batch, Q columns of one forward pass, I inputs of a probe, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerbridge import fingerprint
from steerbridge.package import SteeringPackage
from steerbridge.spec import (
    AddVector,
    CosineProbe,
    DenseMatrix,
    HeadMatrix,
    ImageMean,
    LinearProbe,
    MlpProbe,
    Sigmoid,
    Softmax,
)

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def weights_sha256(model: nn.Module) -> str:
    """Hash of samples of a module's tensors, packed ones as they are stored (see
    `steerbridge.fingerprint.weights_sha256`)."""
    tensors = {
        name: t.detach().reshape(-1)
        for name, t in model.state_dict().items()
        if isinstance(t, Tensor) and not t.is_meta
    }

    def read(name: str, at: int, count: int) -> bytes:
        flat = tensors[name]
        size = flat.element_size()
        some = flat[at // size : -(-(at + count) // size)].cpu().contiguous()
        return bytes(some.view(torch.uint8).numpy().data)

    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    return fingerprint.weights_sha256(sizes, read, blocks=8)


def quantisation(dtype: torch.dtype, config: Any) -> str:
    """Name of a model's arithmetic as used in `calibrations`: F32, BF16, F16, or the method that
    quantised its weights (AWQ, GPTQ, NF4, FP8, ...).

    Args:
        config: the model's configuration: `quantize` of TGI, or `quantization_config`.
    """
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    method = getattr(config, "quantize", None) or _method(
        getattr(config, "quantization_config", None)
    )
    if method:
        return str(method).upper().removeprefix("BITSANDBYTES-")
    return names.get(dtype, str(dtype))


def _method(settings: Any) -> str:
    """How a model was quantised; empty if its weights are not, as those from a GGUF file."""
    if hasattr(settings, "quantization_method"):  # of bitsandbytes: nf4, fp4, llm_int8
        return str(settings.quantization_method() or "")
    found = (
        settings.get("quant_method")
        if isinstance(settings, dict)
        else getattr(settings, "quant_method", None)
    )
    method = str(getattr(found, "value", found) or "")
    return "" if method == "gguf" else method


def exact(kernel: Kernel) -> Kernel:
    """Run a kernel outside autocast, which would compute its products in half precision."""

    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run  # type: ignore[return-value]


class Weights:
    """The package's tensors as float32, copied to each device once.

    Args:
        device: copied there at once, so that no request waits for it; to others on first use.
    """

    def __init__(self, package: SteeringPackage, device: torch.device | None = None) -> None:
        self._package = package
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        if device is not None:
            for name in package.tensors:
                self(name, device)

    def __call__(self, name: str, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._copies:
            values = self._package.tensors[name].float32()
            self._copies[key] = torch.tensor(values, dtype=torch.float32, device=device)
        return self._copies[key]


@exact
def judge(
    probe: Any, weights: Weights, x_BI: Tensor, missing_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores [B] of probe inputs, and whether they may be trusted ([B] bool).

    A row is not to be trusted if one of its inputs or logits is not finite: squashing would hide
    it.

    Args:
        missing_B: rows without an image to read; they take the probe's input mean. None: the probe
            reads no image.
    """
    device = x_BI.device
    x_BI = _with_means(probe, weights, x_BI, missing_B)
    finite = _finite(x_BI)
    if probe.input_mean is not None:
        x_BI = x_BI - weights(probe.input_mean, device)
    if probe.input_scale is not None:
        x_BI = x_BI / weights(probe.input_scale, device)
    y_BO = _logits(probe, weights, x_BI)
    return _squashed(probe, y_BO), finite & _finite(y_BO)


def _finite(x_BI: Tensor) -> Tensor:
    """Rows [B] without a value that is not finite: such a value less itself is not a number."""
    return (x_BI - x_BI).sum(dim=1) == 0


def _with_means(probe: Any, weights: Weights, x_BI: Tensor, missing_B: Tensor | None) -> Tensor:
    """Inputs in which an image that is missing is the input mean (0 without one)."""
    of_image = [isinstance(reading.position, ImageMean) for reading in probe.readings]
    if missing_B is None or not any(of_image):
        return x_BI
    width = x_BI.shape[1] // len(of_image)
    columns = torch.tensor(of_image, device=x_BI.device).repeat_interleave(width)
    mean = torch.zeros_like(x_BI[0])
    if probe.input_mean is not None:
        mean = weights(probe.input_mean, x_BI.device)
    return torch.where(missing_B[:, None] & columns[None], mean[None], x_BI)


def _logits(probe: Any, weights: Weights, x: Tensor) -> Tensor:
    """[B, O], before squashing."""
    match probe:
        case LinearProbe():
            return (x @ weights(probe.weight, x.device) + probe.bias)[:, None]
        case CosineProbe():
            return _cosine(probe, weights, x)[:, None]
        case MlpProbe():
            return _mlp(probe, weights, x)
    raise TypeError(f"unknown probe {probe!r}")


def _squashed(probe: Any, y_BO: Tensor) -> Tensor:
    match probe:
        case LinearProbe(link="sigmoid"):
            return torch.sigmoid(y_BO[:, 0])
        case MlpProbe(output=Softmax() as output):
            return torch.softmax(y_BO, dim=1)[:, output.classes.index(output.harmful)]
        case MlpProbe(output=Sigmoid() as output):
            high = torch.sigmoid(y_BO[:, 0])
            return high if output.harmful_when == "high" else 1 - high
    return y_BO[:, 0]


def _cosine(probe: CosineProbe, weights: Weights, x: Tensor) -> Tensor:
    c = weights(probe.direction, x.device)
    projected = torch.outer(x @ c / (c @ c), c)
    if probe.squash == "tanh":
        projected = torch.tanh(projected)
    norms = x.norm(dim=1) * projected.norm(dim=1)
    dots = (x * projected).sum(dim=1)
    return torch.where(norms == 0, torch.zeros_like(dots), dots / norms)


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": functional.gelu}


def _mlp(probe: MlpProbe, weights: Weights, x: Tensor) -> Tensor:
    for i, layer in enumerate(probe.layers):
        if i:
            x = ACTIVATIONS[probe.activation](x)
        x = functional.linear(x, weights(layer.weight, x.device), weights(layer.bias, x.device))
    return x


@exact
def apply(
    intervention: Any, target: int | None, weights: Weights, h: Tensor, strength: Tensor
) -> Tensor:
    """Hidden states [B, Q, D] after one act; `strength` [B] float32."""
    x = h.float()
    factor = strength[:, None, None]
    if isinstance(intervention, HeadMatrix):
        delta = factor * intervention.eps * _head_product(intervention, weights, x)
    else:
        assert target is not None
        v = weights(intervention.targets[target].vector, h.device)
        along: Any = 1.0 if isinstance(intervention, AddVector) else -(x @ v)[..., None]
        delta = factor * intervention.alpha * along * v
    return (x + delta).to(h.dtype)


def _head_product(head: HeadMatrix, weights: Weights, x: Tensor) -> Tensor:
    if isinstance(head.weight, DenseMatrix):
        return functional.linear(x, weights(head.weight.matrix, x.device))
    low = functional.linear(x, weights(head.weight.v, x.device))
    return functional.linear(low, weights(head.weight.u, x.device))
