"""Run a graph with torch, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.inference.backends.graph import Graph, Operation


class GraphNetwork(nn.Module):
    """A graph as a module; its state dict is that of the network that the graph was traced from.

    Args:
        graph: the operations.
        weights: the whole state dict, including weights that the graph does not use (heads of deep supervision).

    Raises:
        ValueError: weights are missing.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        graph.require_weights(weights)
        self.graph = graph
        for name, tensor in weights.items():
            *path, last = name.split(".")
            holder: nn.Module = self
            for part in path:
                if part not in holder._modules:
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.register_parameter(last, nn.Parameter(tensor, requires_grad=False))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of shape (N, regions, X, Y, Z) for an image of shape (N, channels, X, Y, Z)."""
        values = {0: image}
        answer = image
        for number, operation, spent in self.graph.steps():
            given = [values[value] for value in operation.inputs]
            for value in spent:
                del values[value]
            weights = {role: self.get_parameter(name) for role, name in operation.weights.items()}
            answer = values[number] = _compute(operation, given, weights)
            del given
        return answer


def _compute(operation: Operation, values: list[Tensor], weights: Mapping[str, Tensor]) -> Tensor:  # noqa: PLR0911
    x, bias = values[0], weights.get("bias")
    settings: Mapping[str, Any] = operation.settings
    match operation.kind:
        case "conv":
            return functional.conv3d(
                x,
                weights["weight"],
                bias,
                stride=operation.triple("strides"),
                padding=operation.triple("paddings"),
                dilation=operation.triple("dilations"),
            )
        case "conv_transpose":
            return functional.conv_transpose3d(
                x,
                weights["weight"],
                bias,
                stride=operation.triple("strides"),
                padding=operation.triple("paddings"),
                output_padding=operation.triple("output_paddings"),
            )
        case "instance_norm":
            norm = norm_channels_last if _is_channels_last_on_gpu(x) else functional.instance_norm
            return norm(x, weight=weights.get("weight"), bias=bias, eps=settings["epsilon"])
        case "group_norm":
            return functional.group_norm(x, settings["group_count"], weights["weight"], bias, settings["epsilon"])
        case "prelu":
            return functional.prelu(x, weights["weight"])
        case "leaky_relu":
            return functional.leaky_relu(x, settings["slope"])
        case "relu":
            return functional.relu(x)
        case "cat":
            return torch.cat(values, dim=1)
        case "add":
            return values[0] + values[1]
        case "interpolate":
            factors = [float(factor) for factor in operation.triple("factors")]
            return functional.interpolate(x, scale_factor=factors, mode="trilinear", align_corners=False)


def _is_channels_last_on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.is_contiguous(memory_format=torch.channels_last_3d)


def norm_channels_last(x: Tensor, *, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance norm of a batch with channels innermost, whose result has them innermost too.

    torch's instance norm copies such a batch into the other layout and returns that, and the next convolution copies it
    back. The batch norm of a single sample is its instance norm, and keeps the layout. Several samples are joined,
    which copies them once.

    Args:
        x: shape (N, channels, X, Y, Z).
        weight: scale of each channel, or None.
        bias: shift of each channel, or None.
        eps: added to the variance.
    """
    normed = [functional.batch_norm(one, None, None, weight, bias, training=True, eps=eps) for one in x.split(1)]
    return normed[0] if len(normed) == 1 else torch.cat(normed)
