"""What computes a whole volume with a trained network: torch on CPU or GPU, or OpenVINO on the CPU."""

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

#: What libraries take beside the values of a network that must be held, as a factor on these.
_OVERHEAD: Final = 1.6
#: Windows at once on a GPU: as many as have together the voxels of this many windows of 128x128x128.
_GPU_WINDOWS: Final = 2


class Backend(Protocol):
    """A network and what computes it."""

    @property
    def graph(self) -> Graph:
        """Its operations."""
        ...

    def first_way(self, window: Size, runtime: Runtime) -> ComputePlan:
        """How windows are computed where memory is enough."""
        ...

    def warm_up(self, way: ComputePlan | None, runtime: Runtime) -> None:
        """Do what can be done before there is an image, for windows of a way where that is known already.

        Raises:
            MemoryError, RuntimeError: it cannot be done; the same will come, and be handled, with the image.
        """
        ...

    def settle(self, runtime: Runtime) -> None:
        """Compute one small window, the first time, so that what stays in the process from then on is in its memory.

        Raises:
            MemoryError, RuntimeError: as of :meth:`warm_up`.
        """
        ...

    def forget(self) -> None:
        """Give back what is held for the next volume alone."""
        ...

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, way: ComputePlan
    ) -> npt.NDArray[Any]:
        """Logits of a volume.

        Args:
            image: shape (contrasts, X, Y, Z).
            present: which contrasts are there, for a network that is told; else None.
            runtime: as the network was loaded for.
            overlap: of windows.
            way: how windows are computed.

        Returns:
            float32, or float16 where the way says half; shape (regions, X, Y, Z).
        """
        ...

    def window_bytes(self, way: ComputePlan, runtime: Runtime) -> int:
        """Estimate of what computing takes on the CPU, beside image and answer."""
        ...


class TorchEngine:
    """A graph computed by torch.

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
        """On the runtime's device; on a GPU some windows at once."""
        device = runtime.device_name
        batch = 1 if device == "cpu" else max(1, min(8, _GPU_WINDOWS * 128**3 // prod(window)))
        return ComputePlan(window=window, batch=batch, device=device, stitch_on=device)

    def warm_up(self, way: ComputePlan | None, runtime: Runtime) -> None:
        """Nothing: torch needs no preparation."""

    def settle(self, runtime: Runtime) -> None:
        """As of :class:`Backend`: torch's libraries, and those of a GPU."""
        import torch

        if self._settled:
            return
        self._settled = True
        self._place(runtime)
        with torch.inference_mode(), runtime.autocast():
            self.network(torch.zeros(_small_shape(self.graph), device=runtime.device))

    def forget(self) -> None:
        """Nothing: torch keeps nothing of a volume on the CPU."""

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, way: ComputePlan
    ) -> npt.NDArray[Any]:
        """As of :class:`Backend`."""
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
        """As of :class:`Backend`; a GPU's memory is not the CPU's."""
        if way.device != "cpu":
            return 0
        return int(_OVERHEAD * self._live * _item_bytes(runtime) * way.batch * prod(way.window))

    def _place(self, runtime: Runtime) -> None:
        self.network.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it


class OpenvinoEngine:
    """A graph computed by OpenVINO.

    Args:
        graph: the operations.
        weights: the whole state dict as arrays.

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
        """One window at once: all cores work on it."""
        return ComputePlan(window=window, device=runtime.device_name)

    def warm_up(self, way: ComputePlan | None, runtime: Runtime) -> None:
        """Import OpenVINO, and have it compile the network."""
        from app.inference.backends import openvino_backend  # noqa: F401 - imports openvino

        if way is not None:
            self._compiled_for(way, runtime)

    def settle(self, runtime: Runtime) -> None:
        """As of :class:`Backend`: OpenVINO's plugin for CPUs, and code that it makes for them."""
        if self._settled:
            return
        self._settled = True
        shape = _small_shape(self.graph)
        self._network(shape, bfloat16=runtime.precision_name == "bfloat16")(np.zeros(shape, dtype=np.float32))
        self.forget()

    def forget(self) -> None:
        """As of :class:`Backend`: the compiled network, which holds the values of its windows."""
        self._compiled = None

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, way: ComputePlan
    ) -> npt.NDArray[Any]:
        """As of :class:`Backend`."""
        network = self._compiled_for(way, runtime)

        def compute(patches: Array) -> Array:
            return network(patches if present is None else _with_presence(patches, present))

        return stitched_logits(compute, image, window=way.window, overlap=overlap, batch=way.batch, half=way.half)

    def window_bytes(self, way: ComputePlan, runtime: Runtime) -> int:
        """As of :class:`Backend`."""
        return int(_OVERHEAD * self._live * _item_bytes(runtime) * way.batch * prod(way.window))

    def _compiled_for(self, way: ComputePlan, runtime: Runtime) -> CompiledNetwork:
        shape = (way.batch, self.graph.in_channels, *way.window)
        return self._network(shape, bfloat16=runtime.precision_name == "bfloat16")

    def _network(self, shape: tuple[int, int, int, int, int], *, bfloat16: bool) -> CompiledNetwork:
        """The network for one shape; the one for another shape goes before, with its memory."""
        from app.inference.backends.openvino_backend import CompiledNetwork

        if self._compiled is None or (self._compiled.shape, self._compiled.bfloat16) != (shape, bfloat16):
            self._compiled = None
            self._compiled = CompiledNetwork(self.graph, self.weights, shape, bfloat16=bfloat16, threads=threads())
        return self._compiled


def make_engine(graph: Graph, weights: Mapping[str, Any], runtime: Runtime) -> Backend:
    """The engine of a runtime's backend; weights are tensors for torch, arrays for OpenVINO.

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
    """Estimate of the memory that logits, their way to the files' spacing and masks take beside the image.

    Args:
        engine: of the network.
        way: how windows are computed.
        runtime: as the network was loaded for.
        image_shape: of what the network sees.
        box_shape: of the answer.
        several: whether the mean of the answers before is held while the next one is computed.
        uncertainty: whether entropies are computed, in float32, and of several answers their mean is held too.
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
    # Of the box: the answer (twice where it was resampled or averaged), masks before and after they are cleaned; where
    # entropies are computed, three arrays at once beside their mean.
    answering = (logits if other else 0) + prod(box_shape) * (2 * 3 * number + 8) + 3 * entropy
    if several:
        answering += entropy
    return max(computing, answering)


def window_divisor(engine: Backend) -> int:
    """What every side of a window must be a multiple of."""
    return divisor(engine.graph)


def _small_shape(graph: Graph) -> tuple[int, int, int, int, int]:
    """Of a batch of one window, the smallest that a network takes."""
    side = 2 * divisor(graph)
    return (1, graph.in_channels, side, side, side)


def _item_bytes(runtime: Runtime) -> int:
    return 4 if runtime.precision_name == "float32" else 2


def _with_presence(patches: Array, present: Sequence[bool]) -> Array:
    """As :func:`models.presence.with_presence`, for input of which all lacks the same."""
    brain = (patches != 0).any(axis=1, keepdims=True)
    given = np.array(present, dtype=np.float32).reshape(1, -1, 1, 1, 1)
    return np.concatenate([patches, brain * given], axis=1)
