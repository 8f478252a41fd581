"""Engines that run a trained network on whole volumes: torch on CPU or GPU, or OpenVINO on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from app.inference.backends.graph import Graph, divisor, live_values
from app.inference.sliding_window.grid import Size, Windows, place_windows
from app.inference.sliding_window.memory_fallback import ComputePlan
from app.inference.sliding_window.numpy_blend import Array, stitched_logits
from app.system.device import Runtime, below_gpu
from app.system.resources import threads
from data.labels import CONTRASTS

if TYPE_CHECKING:
    from torch import Tensor

    from app.inference.backends.openvino_backend import CompiledNetwork
    from app.inference.backends.torch_backend import GraphNetwork

#: Ratio of the memory used, including the overhead of libraries, to the size of the values that a network must hold.
_OVERHEAD: Final = 1.6
#: Voxels of a batch of windows on a GPU: a single window of 128x128x128 keeps every part of one busy, and instance
#: norms copy larger batches once more.
_GPU_VOXELS: Final = 128**3


class Engine(ABC):
    """A network and the library that runs it.

    Args:
        graph: operations of the network.
        weights: the whole state dict, as arrays or tensors.

    Raises:
        ValueError: weights are missing.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, Any]) -> None:
        graph.require_weights(weights)
        self.graph = graph
        self._live = live_values(graph, {name: tuple(array.shape) for name, array in weights.items()})
        self._settled = False

    @abstractmethod
    def first_plan(self, window: Size, runtime: Runtime) -> ComputePlan:
        """Return the plan to use if memory is sufficient."""

    @abstractmethod
    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, plan: ComputePlan
    ) -> npt.NDArray[Any]:
        """Compute the logits of a volume.

        Args:
            image: shape (contrasts, X, Y, Z).
            present: which contrasts are present, for a network with presence channels; else None.
            runtime: the one that the network was loaded for.
            overlap: least share of a window that its neighbour also covers.
            plan: plan for the windows.

        Returns:
            float32, or float16 with ``plan.half``; shape (regions, X, Y, Z).
        """

    def warm_up(self, plan: ComputePlan | None, runtime: Runtime) -> None:  # noqa: B027 - torch on a CPU needs none
        """Do the work that needs no image, in advance; if a plan is given, also prepare for its windows.

        Raises:
            MemoryError, RuntimeError: it failed; the same error will recur with the image, and is handled there.
        """

    def settle(self, runtime: Runtime) -> None:
        """On the first call, compute one small window, so that the memory that libraries keep is counted from then on.

        Raises:
            MemoryError, RuntimeError: as raised by :meth:`warm_up`.
        """
        if not self._settled:
            self._settled = True
            side = 2 * self.divisor  # the smallest that the network accepts
            self._compute(np.zeros((1, self.graph.in_channels, side, side, side), dtype=np.float32), runtime)

    @abstractmethod
    def _compute(self, patches: Array, runtime: Runtime) -> None:
        """Compute a batch of windows and drop the result."""

    def forget(self) -> None:  # noqa: B027 - torch keeps nothing on the CPU
        """Release memory that is only held for the next volume."""

    def window_bytes(self, plan: ComputePlan, runtime: Runtime) -> int:
        """Estimate the CPU memory that the computation takes, in addition to the image and the answer."""
        if plan.device != "cpu":
            return 0
        item_bytes = 4 if runtime.precision_name == "float32" else 2
        return int(_OVERHEAD * self._live * item_bytes * plan.batch * prod(plan.window))

    @property
    def divisor(self) -> int:
        """Number that every side of a window must be a multiple of."""
        return divisor(self.graph)


class TorchEngine(Engine):
    """Computes a graph with torch, on the device and in the precision of a runtime."""

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor], runtime: Runtime) -> None:
        from app.inference.backends.torch_backend import GraphNetwork

        super().__init__(graph, weights)
        self.network: GraphNetwork = GraphNetwork(graph, weights)
        self._placed: tuple[str, bool] | None = None
        self._place(runtime)
        self.network.eval()

    def first_plan(self, window: Size, runtime: Runtime) -> ComputePlan:
        """Return a plan for the runtime's device; on a GPU, several windows are computed at once."""
        device = runtime.device_name
        batch = 1 if device == "cpu" else max(1, min(8, _GPU_VOXELS // prod(window)))
        return ComputePlan(window=window, batch=batch, device=device, stitch_on=device)

    def warm_up(self, plan: ComputePlan | None, runtime: Runtime) -> None:
        """On a GPU, compute one batch of windows if a plan is given, which loads its libraries and chooses kernels."""
        if plan is not None and plan.device != "cpu":
            self._compute(np.zeros((plan.batch, self.graph.in_channels, *plan.window), dtype=np.float32), runtime)

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, plan: ComputePlan
    ) -> npt.NDArray[Any]:
        """See :meth:`Engine.logits`."""
        import torch

        from data.patches.transfer import upload

        volume = upload(torch.from_numpy(image), torch.device(plan.stitch_on))
        windows = place_windows(image, plan.window, overlap)
        answer: npt.NDArray[Any] = self.tensor_logits(volume, windows, present, runtime, plan=plan).cpu().numpy()
        return answer

    def tensor_logits(
        self, volume: Tensor, windows: Windows, present: Sequence[bool] | None, runtime: Runtime, *, plan: ComputePlan
    ) -> Tensor:
        """Compute the logits of a volume, and leave them on the device where its windows are blended.

        Args:
            volume: shape (contrasts, X, Y, Z), on ``plan.stitch_on``.
            windows: windows on the volume, of the plan's size.
            present: see :meth:`Engine.logits`.
            runtime: see :meth:`Engine.logits`.
            plan: see :meth:`Engine.logits`.

        Returns:
            the same as :meth:`Engine.logits`.
        """
        from app.inference.sliding_window.torch_blend import window_logits
        from models import GivenPresence

        if plan.device != runtime.device_name:
            runtime = below_gpu(runtime)
        self._place(runtime)
        network = self.network if present is None else GivenPresence(self.network, present).eval()
        return window_logits(network, volume, windows, runtime=runtime, batch=plan.batch, half=plan.half)

    def _compute(self, patches: Array, runtime: Runtime) -> None:
        import torch

        self._place(runtime)
        with torch.inference_mode(), runtime.autocast():
            batch = torch.from_numpy(patches).to(runtime.device)
            self.network(batch.contiguous(memory_format=runtime.memory_format))

    def _place(self, runtime: Runtime) -> None:
        placed = runtime.device_name, runtime.channels_last
        if placed != self._placed:
            self.network.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
            self._placed = placed


class OpenvinoEngine(Engine):
    """Computes a graph with OpenVINO."""

    def __init__(self, graph: Graph, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__(graph, weights)
        self.weights = weights
        self._compiled: CompiledNetwork | None = None

    def first_plan(self, window: Size, runtime: Runtime) -> ComputePlan:
        """Return a plan with one window at a time, since all cores work on it."""
        return ComputePlan(window=window, device=runtime.device_name)

    def warm_up(self, plan: ComputePlan | None, runtime: Runtime) -> None:
        """Import OpenVINO, and compile the network if a plan is given."""
        from app.inference.backends import openvino_backend  # noqa: F401 - imports openvino

        if plan is not None:
            self._network((plan.batch, self.graph.in_channels, *plan.window), runtime)

    def forget(self) -> None:
        """Release the compiled network, which holds the values of its windows."""
        self._compiled = None

    def logits(
        self, image: Array, present: Sequence[bool] | None, runtime: Runtime, *, overlap: float, plan: ComputePlan
    ) -> npt.NDArray[Any]:
        """See :meth:`Engine.logits`."""
        network = self._network((plan.batch, self.graph.in_channels, *plan.window), runtime)

        def compute(patches: Array) -> Array:
            return network(patches if present is None else _with_presence(patches, present))

        return stitched_logits(compute, image, window=plan.window, overlap=overlap, batch=plan.batch, half=plan.half)

    def _compute(self, patches: Array, runtime: Runtime) -> None:
        self._network(patches.shape, runtime)(patches)
        self.forget()

    def _network(self, shape: tuple[int, ...], runtime: Runtime) -> CompiledNetwork:
        """Return the network compiled for one shape; one compiled for another shape is freed first."""
        from app.inference.backends.openvino_backend import CompiledNetwork

        bfloat16 = runtime.precision_name == "bfloat16"
        if self._compiled is None or (self._compiled.shape, self._compiled.bfloat16) != (shape, bfloat16):
            self._compiled = None
            self._compiled = CompiledNetwork(self.graph, self.weights, shape, bfloat16=bfloat16, threads=threads())
        return self._compiled


def make_engine(graph: Graph, weights: Mapping[str, Any], runtime: Runtime) -> Engine:
    """Create the engine of a runtime's backend; weights are tensors for torch, arrays for OpenVINO.

    Raises:
        ValueError: weights are missing.
    """
    if runtime.backend == "openvino":
        return OpenvinoEngine(graph, weights)
    return TorchEngine(graph, weights, runtime)


def needed_bytes(
    engine: Engine,
    plan: ComputePlan,
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
        engine: the network's engine.
        plan: plan for the windows.
        runtime: the one that the network was loaded for.
        image_shape: shape of the network's input.
        box_shape: shape of the answer.
        several: whether the mean of the previous answers is held while the next one is computed.
        uncertainty: whether entropies are computed, in float32; with several answers, their mean is held too.
        mirrored: whether a mirrored copy of the image is held.
    """
    number = 2 if plan.half else 4
    padded_shape = tuple(max(side, size) for side, size in zip(plan.window, image_shape, strict=True))
    stitched, window = prod(padded_shape), prod(plan.window)
    padded = 0 if padded_shape == image_shape else len(CONTRASTS) * stitched * 4
    logits, weight_sum, patches = 3 * stitched * number, stitched * number, (engine.graph.in_channels + 8) * window * 4
    on_cpu = logits if plan.stitch_on != "cpu" else logits + weight_sum
    of_box = 3 * prod(box_shape)
    entropy = of_box * 4 if uncertainty else 0
    before = of_box * number + entropy if several else 0
    copy = len(CONTRASTS) * prod(image_shape) * 4 + prod(box_shape) if mirrored else 0
    computing = before + copy + padded + on_cpu + patches + engine.window_bytes(plan, runtime)
    other = image_shape != box_shape
    # Memory over the box: the answer (twice if it was resampled or averaged), and masks before and after cleaning. If
    # entropies are computed, there are three more arrays at once in addition to their mean.
    answering = (logits if other else 0) + prod(box_shape) * (2 * 3 * number + 8) + 3 * entropy
    if several:
        answering += entropy
    return max(computing, answering)


def _with_presence(patches: Array, present: Sequence[bool]) -> Array:
    """Numpy version of :func:`models.contrast_presence.with_presence`, for inputs that all lack the same contrasts."""
    brain = (patches != 0).any(axis=1, keepdims=True)
    given = np.array(present, dtype=np.float32).reshape(1, -1, 1, 1, 1)
    return np.concatenate([patches, brain * given], axis=1)
