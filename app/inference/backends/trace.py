"""Turn a network into a graph by following its forward pass symbolically (torch.fx)."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import fx, nn

from app.inference.backends.graph import Graph, Kind, Operation
from data.labels import REGIONS
from models import NetworkConfig, build_network

#: Modules without effect in prediction.
_NOTHING: Final = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_ADD: Final = (operator.add, operator.iadd, torch.add)


def trace(network: nn.Module, *, in_channels: int) -> Graph:
    """Trace the operations of a network in eval mode, whatever its current mode.

    Args:
        network: any of :data:`models.ARCHITECTURES`; it is not changed.
        in_channels: number of input channels.

    Raises:
        ValueError: the network does something for which a graph has no operation.
    """
    was_training = network.training
    network.eval()
    try:
        # Only the forward pass is traced; parameters are neither copied nor changed.
        traced = fx.Tracer().trace(network)
    except fx.proxy.TraceError as error:
        raise ValueError(f"{type(network).__name__}: its forward pass cannot be traced ({error})") from error
    finally:
        network.train(was_training)
    modules = dict(network.named_modules())
    values: dict[fx.Node, int] = {}
    operations: list[Operation] = []
    answer: int | None = None
    for node in traced.nodes:
        if node.op == "placeholder":
            values[node] = 0
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise ValueError(f"{type(network).__name__}: it returns several tensors")
            answer = values[node.args[0]]
        else:
            inputs = _inputs(node, values)
            operation = _operation(node, modules, inputs)
            if operation is None:
                values[node] = inputs[0]
                continue
            operations.append(operation)
            values[node] = len(operations)
    if answer != len(operations):
        raise ValueError(f"{type(network).__name__}: its output is not the last value it computes")
    return Graph(in_channels=in_channels, operations=tuple(operations))


def trace_of(config: NetworkConfig, *, in_channels: int) -> Graph:
    """Trace the graph of a network that is built from its config, with random weights that are discarded.

    Raises:
        ValueError: as raised by :func:`trace`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return trace(build_network(config, in_channels=in_channels, out_channels=len(REGIONS)), in_channels=in_channels)


def _inputs(node: fx.Node, values: Mapping[fx.Node, int]) -> tuple[int, ...]:
    first = node.args[0]
    given = first if isinstance(first, list | tuple) else [arg for arg in node.args if isinstance(arg, fx.Node)]
    return tuple(values[one] for one in given if isinstance(one, fx.Node))


def _operation(node: fx.Node, modules: Mapping[str, nn.Module], inputs: tuple[int, ...]) -> Operation | None:
    """Return the operation of a node; None if the node has no effect."""
    if node.op == "call_module":
        name = str(node.target)
        module = modules[name]
        if isinstance(module, _NOTHING):
            return None
        kind, settings = _of_module(module)
        weights = {
            role: f"{name}.{role}"
            for role, parameter in module.named_parameters(recurse=False)
            if role in ("weight", "bias") and parameter is not None
        }
        return Operation(kind=kind, inputs=inputs, weights=weights, settings=settings)
    if node.op == "call_function" and node.target in _ADD and len(inputs) == 2:
        return Operation(kind="add", inputs=inputs, weights={}, settings={})
    if node.op == "call_function" and node.target is torch.cat and _dimension(node) == 1:
        return Operation(kind="cat", inputs=inputs, weights={}, settings={})
    raise ValueError(f"no operation for {node.op} {node.target}")


def _dimension(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _of_module(module: nn.Module) -> tuple[Kind, dict[str, Any]]:  # noqa: PLR0911 - one return per kind
    match module:
        case nn.Conv3d(groups=1, padding_mode="zeros") if not isinstance(module.padding, str):
            return "conv", {
                "strides": module.stride,
                "paddings": module.padding,
                "dilations": module.dilation,
            }
        case nn.ConvTranspose3d(groups=1, dilation=(1, 1, 1)) if not isinstance(module.padding, str):
            return "conv_transpose", {
                "strides": module.stride,
                "paddings": module.padding,
                "output_paddings": module.output_padding,
            }
        case nn.InstanceNorm3d(track_running_stats=False):
            return "instance_norm", {"epsilon": module.eps}
        case nn.GroupNorm(affine=True):
            return "group_norm", {"epsilon": module.eps, "group_count": module.num_groups}
        case nn.PReLU():
            return "prelu", {}
        case nn.LeakyReLU():
            return "leaky_relu", {"slope": module.negative_slope}
        case nn.ReLU():
            return "relu", {}
        case nn.Upsample(size=None, mode="trilinear", align_corners=False | None):
            scale = module.scale_factor
            factors = scale if isinstance(scale, tuple) else (scale,) * 3
            if all(float(factor or 0).is_integer() for factor in factors):
                return "interpolate", {"factors": tuple(int(factor or 0) for factor in factors)}
    raise ValueError(f"no operation for {module}")
