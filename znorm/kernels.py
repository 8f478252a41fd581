"""ZNorm's maths on a GPU in a fixed number of kernel launches, if Triton is installed."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Final, Literal

import torch
from torch import Tensor

from znorm.self_check import zscore_reference

_Mode = Literal["zscore", "centre", "scale"]
_MODES: Final[tuple[_Mode, ...]] = ("zscore", "centre", "scale")
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
#: Elements per program: enough to hide its fixed costs, few enough for 32 registers per thread. At most 8192, so that
#: float32 sums of the differences between equal numbers and their rounded mean are exact.
_CHUNK = 8192
#: Chunks merged in parallel.
_LANES = 256
_WARPS: Final = 8

#: Whether the kernels passed their self-check, for each device and dtype used so far.
_passed: dict[tuple[torch.device, torch.dtype], bool] = {}


@torch.no_grad()
def zscore_kernels_(tensors: Sequence[Tensor], eps: float, mode: _Mode, *, together: bool) -> Tensor | None:
    """Replace each tensor g by (g - mean(g)) / (std(g) + eps * rms(g)), in place, as `zscore_` does.

    It takes three launches, whatever the number of tensors: one measures each chunk of 8192 elements, one merges the
    chunks of each tensor, one rewrites each chunk. Every element is read twice and written once. Temporaries take 20
    bytes per chunk and about 60 per tensor, 0.1 % of large float32 gradients. There are no atomic operations on floats,
    so the same gradients give the same bits. The first call with a device and dtype runs a self-check on small tensors
    and reads its results back; later calls do not synchronise.

    Args:
        tensors: gradients of any shape, on one device and of one dtype; empty ones are left out. Without ``together``
            a tensor of one element becomes 0, so the caller leaves those out.
        eps: added to the standard deviation (the population's), relative to rms(g); at least 0.
        mode: ``zscore``; ``centre`` only subtracts the mean; ``scale`` only divides and keeps the mean.
        together: use one mean and spread over all elements of all tensors instead of each tensor's own.

    Returns:
        one bool on the device (shape [1]): whether every element was finite; if not, nothing is changed. None, with
        nothing changed, if the kernels cannot be used: without Triton or a GPU, in float64, for tensors with gaps in
        their memory or with shared memory, while memory is short, and if the kernels cannot be built or fail their
        self-check. A RuntimeWarning reports the last two once.
    """
    tensors = [tensor for tensor in tensors if tensor.numel() > 0]
    if not tensors or not _fit(tensors):
        return None
    device, dtype = tensors[0].device, tensors[0].dtype
    if not _usable(device, dtype):
        return None
    try:
        return _run(tensors, eps, mode, together=together)
    except torch.OutOfMemoryError:  # other memory may be free at the next step
        return None
    except Exception as error:  # nothing has changed: only the last launch writes to gradients
        _give_up(device, dtype, _named(error))
        return None


def _fit(tensors: list[Tensor]) -> bool:
    """Whether addresses and sizes fully describe the tensors."""
    return (
        tensors[0].dtype in _DTYPES
        and len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1
        and all(_is_plain(tensor) for tensor in tensors)
        and len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether memory holds each element exactly once, without gaps; subclasses may keep their elements elsewhere."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and (tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor)))
    )


@functools.cache
def _kernels() -> Any:  # the module `znorm.kernels_triton`, whose functions Triton has wrapped
    """Import the kernels at the first use: Triton may be missing, and it reads the environment during import."""
    return importlib.import_module("znorm.kernels_triton")


def _usable(device: torch.device, dtype: torch.dtype) -> bool:
    if (device, dtype) not in _passed:
        # The interpreter cannot read GPU memory through an address, and compiled kernels cannot read CPU memory.
        interpreter = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != ("cpu" if interpreter else "cuda") or find_spec("triton") is None:
            return False
        try:
            reason = _self_check(device, dtype)
        except torch.OutOfMemoryError:
            return False  # for now; the next step tries again
        _passed[device, dtype] = reason is None
        if reason is not None:
            _give_up(device, dtype, reason)
    return _passed[device, dtype]


def _give_up(device: torch.device, dtype: torch.dtype, reason: str) -> None:
    _passed[device, dtype] = False
    warnings.warn(
        f"ZNorm uses plain tensor operations instead of its Triton kernels for {dtype} on {device}: {reason}",
        RuntimeWarning,
        stacklevel=3,
    )


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]


@dataclass
class _Layout:
    """Tables on the device that describe how gradients of given sizes are split into chunks."""

    owners: Tensor
    """int32 [chunks]: the tensor that a chunk belongs to."""
    counts: Tensor
    """int64 [tensors]: elements of each tensor."""
    first: Tensor
    """int64 [tensors + 1]: the first chunk of each tensor, then the number of chunks."""
    addresses: list[int] = field(default_factory=list)
    """Addresses of the tensors at the last call."""
    pointers: Tensor | None = None
    """int64 [tensors]: the addresses, on the device."""

    def pointers_to(self, addresses: list[int]) -> Tensor:
        """Return the table of addresses, copied to the device only if an address changed."""
        if self.pointers is None or addresses != self.addresses:
            self.pointers = _upload(torch.tensor(addresses, dtype=torch.int64), self.owners.device)
            self.addresses = addresses
        return self.pointers


# The stream is part of the key: on another stream, a table might be read before its copy has arrived.
@functools.lru_cache(maxsize=16)
def _layout(device: torch.device, stream: int, counts: tuple[int, ...], chunk: int) -> _Layout:  # noqa: ARG001
    chunks = torch.tensor([-(-count // chunk) for count in counts])
    owners = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(chunks)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), chunks.cumsum(0)])
    return _Layout(_upload(owners, device), _upload(torch.tensor(counts), device), _upload(first, device))


def _upload(table: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting; torch does not reuse the pinned memory before the transfer has ended."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _launch(kernel: Any, programs: int, *tensors_and_numbers: Tensor | float, **constants: Any) -> None:
    # No fused multiply-add: products are rounded before they are added, as in the interpreter used for development.
    kernel[(programs,)](*tensors_and_numbers, **constants, num_warps=_WARPS, enable_fp_fusion=False)


def _run(tensors: list[Tensor], eps: float, mode: _Mode, *, together: bool) -> Tensor:
    kernels, device = _kernels(), tensors[0].device
    if kernels.interpreted != (device.type == "cpu"):
        raise RuntimeError(f"Triton's interpreter was {'on' if kernels.interpreted else 'off'} at the first use")
    on_gpu = device.type == "cuda"
    current: AbstractContextManager[Any] = torch.cuda.device(device) if on_gpu else nullcontext()
    with current:
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        layout = _layout(device, stream, tuple(tensor.numel() for tensor in tensors), _CHUNK)
        addresses = [tensor.data_ptr() for tensor in tensors]
        pointers = layout.pointers_to(addresses)
        chunks, units = len(layout.owners), 1 if together else len(tensors)
        finite = torch.ones(1, dtype=torch.int32, device=device)
        largest = torch.empty(chunks, dtype=torch.int32, device=device)
        sums = torch.empty(3, chunks, dtype=torch.float32, device=device)
        scores = torch.empty(units, 6, dtype=torch.float32, device=device)
        tables = (layout.owners, layout.counts, layout.first, finite)
        kind = {
            "block": _CHUNK,
            "dtype": getattr(kernels.tl, str(tensors[0].dtype).removeprefix("torch.")),
        }
        # Capped to the range of float32, the widest the kernels take; with a larger eps, results are 0 anyway.
        settings = (min(float(eps), 1e38), _MODES.index(mode), len(tensors) if together else 1, chunks)
        _launch(kernels.measure, chunks, pointers, *tables, largest, sums, chunks, **kind)
        _launch(kernels.merge, units, *tables, largest, sums, scores, *settings, block=_CHUNK, lanes=_LANES)
        _launch(kernels.apply, chunks, pointers, *tables, scores, 0 if together else 6, **kind)
        # Only the version counter informs autograd of the change.
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
        return finite.bool()


def _self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare the kernels with the float64 reference on this device; return what is wrong, None if they agree.

    Raises:
        torch.OutOfMemoryError: the device has no memory left for the samples, which says nothing about the kernels.
    """
    samples = _samples(dtype)
    try:
        for mode, together in itertools.product(_MODES, (False, True)):
            # In scale mode a constant becomes 1 / eps, beyond the range of float16.
            chosen = samples[:2] if together else samples[:-1] if mode == "scale" else samples
            found = [_copy(sample, device, shifted=together) for sample in chosen]
            finite = _run(found, 1e-7, mode, together=together)
            joined = torch.cat([zscore_reference(g, 1e-7, mode) for g in ([torch.cat(chosen)] if together else chosen)])
            expected = torch.split(joined, [len(sample) for sample in chosen])
            if not bool(finite) or not all(map(_agree, found, expected)):
                return f"their result (mode {mode}) differs from the reference"
        for value in (math.nan, math.inf, -math.inf):
            sick = [samples[0], torch.cat([samples[1], torch.tensor([value], dtype=dtype)])]
            found = [_copy(sample, device) for sample in sick]
            finite = _run(found, 1e-7, "zscore", together=False)
            same = (torch.equal(f.cpu().nan_to_num(7.0), s.nan_to_num(7.0)) for f, s in zip(found, sick, strict=True))
            if bool(finite) or not all(same):
                return f"a gradient containing {value} was changed"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return _named(error)
    return None


def _samples(dtype: torch.dtype) -> list[Tensor]:
    """Return small gradients of odd sizes: several chunks, mean above spread, both ends of the range, constant."""
    generator = torch.Generator().manual_seed(0)
    limits = torch.finfo(dtype)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator).clamp(-3, 3)

    samples = [
        normal(2 * _CHUNK + 17),
        300 + 3 * normal(77),
        64 * limits.tiny * normal(33),
        limits.max / 4 * normal(35),
    ]
    return [sample.to(dtype) for sample in [*samples, torch.full((65,), 0.1)]]


def _copy(sample: Tensor, device: torch.device, *, shifted: bool = False) -> Tensor:
    """Copy to the device; with ``shifted``, to an address that is not aligned for the widest loads."""
    place = torch.empty(len(sample) + 1, dtype=sample.dtype, device=device)[int(shifted) :][: len(sample)]
    return place.copy_(sample)


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether the kernels' result equals the reference (float64, same shape) within the precision of its dtype."""
    size = float(expected.abs().max()) or 1.0
    tolerance = 4 * torch.finfo(found.dtype).eps + 1e-5
    return bool(((found.cpu().double() - expected).abs() <= tolerance * size).all())
