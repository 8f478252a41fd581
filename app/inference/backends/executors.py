"""Executors of a trained network on whole volumes: torch on CPU or GPU, or OpenVINO on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from app.inference.backends.graph import Graph, divisor, live_values
from app.inference.sliding_window.grid import Size
from app.inference.sliding_window.memory_fallback import ComputePlan
from app.inference.sliding_window.numpy_blend import Array, stitched_logits
from app.system.device import Runtime, below_gpu
from app.system.resources import threads
from data.labels import CONTRASTS

if TYPE_CHECKING:
    from torch import Tensor

    from app.inference.backends.openvino_backend import CompiledNetwork
    from app.inference.backends.torch_backend import GraphNetwork

#: Memory for the values that a network must hold, with the overhead of libraries, as a factor on those values.
_OVERHEAD: Final = 1.6
#: Batch on a GPU: as many windows as together have the voxels of this many windows of 128x128x128.
_GPU_WINDOWS: Final = 2


class Backend(Protocol):
    """A network and the library that computes it."""

    @property
    def graph(self) -> Graph:
        """Operations of the network."""
        ...

    def first_way(self, window: Size, runtime: Runtime) -> ComputePlan:
        """Plan for the windows if memory is sufficient."""
        ...

    def warm_up(self, way: ComputePlan | None, runtime: Runtime) -> None:
        """Do what can be done before there is an image, for the windows of a plan if it is known already.

        Raises:
            MemoryError, RuntimeError: it failed; the same error will recur, and be handled, with the image.
        """
        ...

    def settle(self, runtime: Runtime) -> None:
        """Compute one small window on the first call, so that the memory libraries keep is counted from then on.

        Raises:
            MemoryError, RuntimeError: as in :meth:`warm_up`.
        """
        ...

    def forget(self) -> None:
        """Release what is only held for the next volume."""
        ...

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, way: ComputePlan
    ) -> npt.NDArray[Any]:
        """Compute the logits of a volume.

        Args:
            image: shape (contrasts, X, Y, Z).
            present: which contrasts are present, for a network with presence channels; else None.
            runtime: the one that the network was loaded for.
            overlap: least share of a window that its neighbour also covers.
            way: plan for the windows.

        Returns:
            float32, or float16 with ``way.half``; shape (regions, X, Y, Z).
        """
        ...

    def window_bytes(self, way: ComputePlan, runtime: Runtime) -> int:
        """Estimate of the CPU memory that computing takes, in addition to the image and the answer."""
        ...


class TorchEngine:
    """Computes a graph with torch.

    Args:
        graph: the operations.
        weights: the whole state dict.
        runtime: device and precision.

    Raises:
        ValueError: weights are missing.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], runtime: Runtime) -> None:
        from app.inference.backends.torch_backend import GraphNetwork

        self.graph = graph
        self.network: GraphNetwork = GraphNetwork(graph, weights)
        self._place(runtime)
        self.network.eval()
        self._settled = False
        self._live = live_values(graph, {name: tuple(tensor.shape) for name, tensor in weights.items()})

    def first_way(self, window: Size, runtime: Runtime) -> ComputePlan:
        """A plan for the runtime's device, on a GPU with several windows at once."""
        device = runtime.device_name
        batch = 1 if device == "cpu" else max(1, min(8, _GPU_WINDOWS * 128**3 // prod(window)))
        return ComputePlan(window=window, batch=batch, device=device, stitch_on=device)

    def warm_up(self, way: ComputePlan | None, runtime: Runtime) -> None:
        """Do nothing: torch needs no preparation."""

    def settle(self, runtime: Runtime) -> None:
        """As :meth:`Backend.settle`: loads torch's libraries, and those of a GPU."""
        import torch

        if self._settled:
            return
        self._settled = True
        self._place(runtime)
        with torch.inference_mode(), runtime.autocast():
            self.network(torch.zeros(_small_shape(self.graph), device=runtime.device))

    def forget(self) -> None:
        """Do nothing: torch keeps nothing of a volume on the CPU."""

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, way: ComputePlan
    ) -> npt.NDArray[Any]:
        """As :meth:`Backend.logits`."""
        import torch

        from app.inference.sliding_window.torch_blend import sliding_logits
        from models import GivenPresence

        if way.device != runtime.device_name:
            runtime = below_gpu(runtime)
        self._place(runtime)
        found = sliding_logits(
            self.network if present is None else GivenPresence(self.network, present).eval(),
            torch.from_numpy(image),
            window=way.window,
            overlap=overlap,
            runtime=runtime,
            batch=way.batch,
            stitch_on=way.stitch_on,
            half=way.half,
        )
        answer: npt.NDArray[Any] = found.cpu().numpy()
        return answer

    def window_bytes(self, way: ComputePlan, runtime: Runtime) -> int:
        """As :meth:`Backend.window_bytes`; 0 on a GPU, whose memory is not the CPU's."""
        if way.device != "cpu":
            return 0
        return int(_OVERHEAD * self._live * _item_bytes(runtime) * way.batch * prod(way.window))

    def _place(self, runtime: Runtime) -> None:
        self.network.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it


class OpenvinoEngine:
    """Computes a graph with OpenVINO.

    Args:
        graph: the operations.
        weights: the whole state dict, as arrays.

    Raises:
        ValueError: weights are missing.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        graph.require_weights(weights)
        self.graph = graph
        self.weights = weights
        self._compiled: CompiledNetwork | None = None
        self._settled = False
        self._live = live_values(graph, {name: array.shape for name, array in weights.items()})

    def first_way(self, window: Size, runtime: Runtime) -> ComputePlan:
        """A plan with one window at a time, since all cores work on it."""
        return ComputePlan(window=window, device=runtime.device_name)

    def warm_up(self, way: ComputePlan | None, runtime: Runtime) -> None:
        """Import OpenVINO, and compile the network if the plan is known."""
        from app.inference.backends import openvino_backend  # noqa: F401 - imports openvino

        if way is not None:
            self._compiled_for(way, runtime)

    def settle(self, runtime: Runtime) -> None:
        """As :meth:`Backend.settle`: loads OpenVINO's CPU plugin and the code it generates."""
        if self._settled:
            return
        self._settled = True
        shape = _small_shape(self.graph)
        self._network(shape, bfloat16=runtime.precision_name == "bfloat16")(np.zeros(shape, dtype=np.float32))
        self.forget()

    def forget(self) -> None:
        """As :meth:`Backend.forget`: releases the compiled network, which holds the values of its windows."""
        self._compiled = None

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, way: ComputePlan
    ) -> npt.NDArray[Any]:
        """As :meth:`Backend.logits`."""
        network = self._compiled_for(way, runtime)

        def compute(patches: Array) -> Array:
            return network(patches if present is None else _with_presence(patches, present))

        return stitched_logits(compute, image, window=way.window, overlap=overlap, batch=way.batch, half=way.half)

    def window_bytes(self, way: ComputePlan, runtime: Runtime) -> int:
        """As :meth:`Backend.window_bytes`."""
        return int(_OVERHEAD * self._live * _item_bytes(runtime) * way.batch * prod(way.window))

    def _compiled_for(self, way: ComputePlan, runtime: Runtime) -> CompiledNetwork:
        shape = (way.batch, self.graph.in_channels, *way.window)
        return self._network(shape, bfloat16=runtime.precision_name == "bfloat16")

    def _network(self, shape: tuple[int, int, int, int, int], *, bfloat16: bool) -> CompiledNetwork:
        """The network compiled for one shape; one compiled for another shape is freed first."""
        from app.inference.backends.openvino_backend import CompiledNetwork

        if self._compiled is None or (self._compiled.shape, self._compiled.bfloat16) != (shape, bfloat16):
            self._compiled = None
            self._compiled = CompiledNetwork(self.graph, self.weights, shape, bfloat16=bfloat16, threads=threads())
        return self._compiled


def make_engine(graph: Graph, weights: Mapping[str, Any], runtime: Runtime) -> Backend:
    """Create the engine of a runtime's backend; weights are tensors for torch, arrays for OpenVINO.

    Raises:
        ValueError: weights are missing.
    """
    if runtime.backend == "openvino":
        return OpenvinoEngine(graph, weights)
    return TorchEngine(graph, weights, runtime)


def needed_bytes(
    engine: Backend,
    way: ComputePlan,
    runtime: Runtime,
    image_shape: Size,
    box_shape: Size,
    *,
    several: bool = False,
    uncertainty: bool = False,
    mirrored: bool = False,
) -> int:
    """Estimate the memory for logits, resampling to the files' spacing and masks, in addition to the image.

    Args:
        engine: of the network.
        way: plan for the windows.
        runtime: the one that the network was loaded for.
        image_shape: shape of what the network sees.
        box_shape: shape of the answer.
        several: whether the mean of the previous answers is held while the next one is computed.
        uncertainty: whether entropies are computed, in float32; with several answers, their mean is held too.
        mirrored: whether a mirrored copy of the image is held.
    """
    number = 2 if way.half else 4
    padded_shape = tuple(max(side, size) for side, size in zip(way.window, image_shape, strict=True))
    stitched, window = prod(padded_shape), prod(way.window)
    padded = 0 if padded_shape == image_shape else len(CONTRASTS) * stitched * 4
    logits, weight_sum, patches = 3 * stitched * number, stitched * number, (engine.graph.in_channels + 8) * window * 4
    on_cpu = logits if way.stitch_on != "cpu" else logits + weight_sum
    of_box = 3 * prod(box_shape)
    entropy = of_box * 4 if uncertainty else 0
    before = of_box * number + entropy if several else 0
    copy = len(CONTRASTS) * prod(image_shape) * 4 + prod(box_shape) if mirrored else 0
    computing = before + copy + padded + on_cpu + patches + engine.window_bytes(way, runtime)
    other = image_shape != box_shape
    # Over the box: the answer (twice if it was resampled or averaged), and masks before and after cleaning; with
    # entropies, three arrays at once in addition to their mean.
    answering = (logits if other else 0) + prod(box_shape) * (2 * 3 * number + 8) + 3 * entropy
    if several:
        answering += entropy
    return max(computing, answering)


def window_divisor(engine: Backend) -> int:
    """Number that every side of a window must be a multiple of."""
    return divisor(engine.graph)


def _small_shape(graph: Graph) -> tuple[int, int, int, int, int]:
    """Shape of a batch of one window, the smallest that the network accepts."""
    side = 2 * divisor(graph)
    return (1, graph.in_channels, side, side, side)


def _item_bytes(runtime: Runtime) -> int:
    return 4 if runtime.precision_name == "float32" else 2


def _with_presence(patches: Array, present: Sequence[bool]) -> Array:
    """As :func:`models.presence.with_presence`, for inputs that all lack the same contrasts."""
    brain = (patches != 0).any(axis=1, keepdims=True)
    given = np.array(present, dtype=np.float32).reshape(1, -1, 1, 1, 1)
    return np.concatenate([patches, brain * given], axis=1)
