"""Run a graph with OpenVINO on the CPU; the model is built directly, without torch or a conversion."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from app.inference.backends.graph import Graph, Operation

#: Samples, channels, then the three axes of a window.
Shape = tuple[int, ...]
Array = npt.NDArray[np.float32]


@functools.cache
def openvino_core() -> Any:
    """Return the ``openvino.Core`` of this process; use no other.

    The CPU plugin of a core gives the thread that loads it a stack for signal handlers (openvino pull request 11894).
    A second plugin that is unloaded after the first restores the stack of the first, whose memory is gone; the next
    signal, such as Ctrl-C, then ends the process with a segmentation fault. Seen with OpenVINO 2026.4. This core stays
    until the process ends.
    """
    return ov.Core()


def build_model(graph: Graph, weights: Mapping[str, npt.NDArray[Any]], shape: Shape) -> Any:
    """Build the graph as an ``openvino.Model`` for input of one shape.

    Args:
        graph: the operations.
        weights: float arrays by name.
        shape: shape of the input, (N, in_channels, X, Y, Z).

    Raises:
        ValueError: weights are missing, or the shape has the wrong number of channels.
    """
    graph.require_weights(weights)
    if shape[1] != graph.in_channels:
        raise ValueError(f"the network takes {graph.in_channels} channels, got {shape[1]}")
    image = ops.parameter(list(shape), np.float32, name="image")
    values: list[Any] = [image]
    for operation in graph.operations:
        given = [values[value] for value in operation.inputs]
        own = {role: np.ascontiguousarray(weights[name], np.float32) for role, name in operation.weights.items()}
        values.append(_node(operation, given, own))
    return ov.Model([values[-1]], [image], "network")


class CompiledNetwork:
    """A graph compiled for batches of windows of one shape.

    Args:
        graph: the operations.
        weights: float arrays by name.
        shape: shape of the input, (N, in_channels, X, Y, Z).
        bfloat16: whether to multiply in bfloat16 where OpenVINO supports it; else in float32.
        threads: number of threads.

    Raises:
        ValueError: as raised by :func:`build_model`.
        RuntimeError: OpenVINO cannot compile the graph, or memory is not sufficient.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, npt.NDArray[Any]],
        shape: Shape,
        *,
        bfloat16: bool,
        threads: int,
    ) -> None:
        self.shape, self.bfloat16 = shape, bfloat16
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino_core().compile_model(build_model(graph, weights, shape), "CPU", settings)
        self._request = compiled.create_infer_request()
        self._output = compiled.output(0)

    def __call__(self, batch: Array) -> Array:
        """Return logits of shape (N, regions, X, Y, Z); valid until the next call, which overwrites them."""
        found: Array = self._request.infer([np.ascontiguousarray(batch)], share_inputs=True, share_outputs=True)[
            self._output
        ]
        return found


def _node(operation: Operation, values: list[Any], weights: dict[str, Array]) -> Any:  # noqa: PLR0911
    x = values[0]
    settings: Mapping[str, Any] = operation.settings
    match operation.kind:
        case "conv":
            pads = list(operation.triple("paddings"))
            strides, dilations = list(operation.triple("strides")), list(operation.triple("dilations"))
            return _biased(ops.convolution(x, weights["weight"], strides, pads, pads, dilations), weights)
        case "conv_transpose":
            pads = list(operation.triple("paddings"))
            result = ops.convolution_backprop_data(
                x,
                ops.constant(weights["weight"]),
                list(operation.triple("strides")),
                pads_begin=pads,
                pads_end=pads,
                dilations=[1, 1, 1],
                output_padding=list(operation.triple("output_paddings")),
            )
            return _biased(result, weights)
        case "instance_norm":
            axes = ops.constant(np.array([2, 3, 4], dtype=np.int64))
            normed = ops.mvn(x, axes, True, settings["epsilon"], "inside_sqrt")
            if "weight" in weights:
                normed = ops.multiply(normed, _by_channel(weights["weight"]))
            return _biased(normed, weights)
        case "group_norm":
            scale, shift = ops.constant(weights["weight"]), ops.constant(weights["bias"])
            return ops.group_normalization(x, scale, shift, settings["group_count"], settings["epsilon"])
        case "prelu":
            return ops.prelu(x, ops.constant(weights["weight"]))
        case "leaky_relu":
            return ops.prelu(x, ops.constant(np.array([settings["slope"]], dtype=np.float32)))
        case "relu":
            return ops.relu(x)
        case "cat":
            return ops.concat(values, 1)
        case "add":
            return ops.add(values[0], values[1])
        case "interpolate":
            factors = np.array(operation.triple("factors"), dtype=np.float32)
            return ops.interpolate(
                x,
                ops.constant(factors),
                "linear_onnx",
                "scales",
                axes=ops.constant(np.array([2, 3, 4], dtype=np.int64)),
                coordinate_transformation_mode="half_pixel",
            )


def _biased(node: Any, weights: Mapping[str, Array]) -> Any:
    return node if "bias" not in weights else ops.add(node, _by_channel(weights["bias"]))


def _by_channel(values: Array) -> Any:
    return ops.constant(values.reshape(1, -1, 1, 1, 1))
