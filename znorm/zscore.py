"""The maths of ZNorm, in place on a list of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from znorm.kernels import zscore_kernels_

Scope = Literal["layer", "channel", "global"]
Mode = Literal["zscore", "centre", "scale"]

#: Relative to a gradient's root mean square: about float32's resolution, so that rounding noise is not blown up.
EPS: Final = 1e-7
#: Elements for each thread that are squared and summed in turn: 1 MB, so that the second reduction finds them in a
#: core's cache. Fewer would start the threads more often.
_BLOCK: Final = 2**18
#: Mean squares outside of this range have lost digits, or are about to (float32 sums of squares).
_SAFE: Final = {torch.float32: (1e-30, 1e30), torch.float64: (1e-280, 1e280)}
#: Where the variance is a smaller share of the mean square, E[x^2] - mean^2 has cancelled too many digits.
_CANCELS: Final = 0.25


@torch.no_grad()
def zscore_(
    gradients: Sequence[Tensor],
    eps: float = EPS,
    *,
    scope: Scope = "layer",
    mode: Mode = "zscore",
    channel_dims: Sequence[int] | None = None,
) -> bool:
    """Replace each tensor g by (g - mean(g)) / (std(g) + eps * rms(g)), in place.

    The standard deviation is the population's; rms is the root of the mean square, which makes the result independent
    of the gradient's scale, from subnormal numbers to the largest. A mean far larger than the spread is taken off
    exactly. A tensor of one element has no spread and stays as it is; a constant one becomes 0. On a CPU each tensor is
    read twice and written once, without a copy of it; half-precision tensors are computed in a float32 copy each.

    Args:
        gradients: floating-point tensors of any shapes; on one or several devices.
        eps: added to the standard deviation (the population's), relative to rms(g); default 1e-7.
        scope: ``layer``: each tensor by its own mean and spread; ``channel``: each of its output channels; ``global``:
            all tensors by those of all their elements.
        mode: ``zscore``; ``centre``: only the mean is taken off; ``scale``: only divided, the mean stays in.
        channel_dims: with scope ``channel``, the dimension of each tensor that holds its output channels (1 for a
            transposed convolution); default 0.

    Returns:
        whether every element was finite; where not, nothing is changed.

    Raises:
        ValueError: eps is negative or not finite.

    Example:
        >>> g = torch.tensor([1.0, 2.0, 3.0])
        >>> zscore_([g])
        True
        >>> [round(v, 4) for v in g.tolist()]
        [-1.2247, 0.0, 1.2247]

    Source: Yun, arXiv 2408.01215; the relative eps is ours.
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    if scope == "channel":
        dims = channel_dims if channel_dims is not None else [0] * len(gradients)
        chosen = zip(gradients, dims, strict=True)
        return _by_channel([(gradient, dim) for gradient, dim in chosen if gradient.numel() > 0], eps, mode)
    fewest = 1 if scope == "global" else 2
    tensors = [gradient for gradient in gradients if gradient.numel() >= fewest]
    if not tensors:
        return True
    if all(tensor.is_cpu for tensor in tensors):
        return _on_cpu([[tensor] for tensor in tensors] if scope == "layer" else [tensors], eps, mode)
    return _on_device(tensors, eps, mode, together=scope == "global")


@dataclass(slots=True)
class _Piece:
    """One gradient as a flat tensor that may be written to."""

    flat: Tensor
    gradient: Tensor | None
    """Where the result must be copied to; None where ``flat`` is a view of the gradient."""


@dataclass(slots=True)
class _Unit:
    """Gradients that share one mean and one spread, and their sums so far."""

    pieces: list[_Piece]
    count: int
    total: float = 0.0
    squares: float = 0.0

    def measure(self) -> None:
        """Sum and sum of squares of every element."""
        self.total = self.squares = 0.0
        block = _BLOCK * torch.get_num_threads()
        for piece in self.pieces:
            flat = piece.flat
            for part in (flat,) if flat.numel() <= block else torch.split(flat, block):
                # The dot product first: it takes longer, and waiting for memory hides its arithmetic. The plain sum,
                # the quickest pass there is, then reads the cache.
                self.squares += torch.dot(part, part).item()
                self.total += part.sum().item()

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def mean_square(self) -> float:
        return self.squares / self.count

    @property
    def variance(self) -> float:
        return max(self.mean_square - self.mean**2, 0.0)


def _on_cpu(groups: list[list[Tensor]], eps: float, mode: Mode) -> bool:
    """Scalars are free to read on a CPU: two reductions, then one pass a * g + b.

    That pass takes the tensors in reverse: those that were measured last are still in a shared cache.
    """
    units = [_Unit([_piece(g) for g in group], sum(g.numel() for g in group)) for group in groups]
    for unit in units:
        unit.measure()
    # A sum of squares that overflowed looks like a gradient that is not finite; only then each element is looked at.
    suspicious = [unit for unit in units if not math.isfinite(unit.squares)]
    if not all(bool(torch.isfinite(piece.flat).all()) for unit in suspicious for piece in unit.pieces):
        return False
    lines = [_line(unit, eps, mode) for unit in units]
    # One tensor of all offsets: for small gradients a tensor each takes as long as the pass itself.
    offsets = torch.tensor([line.offset for line in lines], dtype=torch.float64)
    of_dtype = {dtype: offsets.to(dtype).unbind() for dtype in {unit.pieces[0].flat.dtype for unit in units}}
    for number in reversed(range(len(units))):
        line = lines[number]
        for piece in reversed(units[number].pieces):
            flat = piece.flat
            # One pass; two in-place operations would write it twice.
            torch.add(of_dtype[flat.dtype][number], flat, alpha=line.factor, out=flat)
            if mode == "centre" and line.exponent:
                _times_power_of_two(flat, line.exponent)
            if piece.gradient is not None:
                piece.gradient.copy_(flat.view(piece.gradient.shape))
    return True


class _Line(NamedTuple):
    """What is left to do to each element: factor * g + offset, and with ``centre`` 2 ** exponent after it."""

    factor: float
    offset: float
    exponent: int


def _line(unit: _Unit, eps: float, mode: Mode) -> _Line:
    low, high = _SAFE[unit.pieces[0].flat.dtype]
    mean_square = unit.mean_square
    exponent = 0
    if not low < mean_square < high:
        exponent = _to_unit_magnitude(unit)
        mean_square = unit.mean_square
        if mean_square == 0:
            return _Line(1.0, 0.0, 0)
    variance, shift = unit.variance, 0.0
    if variance < _CANCELS * mean_square:
        shift = _centre_exactly(unit)
        variance = unit.variance
    divisor = math.sqrt(variance) + eps * math.sqrt(mean_square)
    factor = 1.0 if mode == "centre" else 1 / divisor if divisor > 0 else 0.0
    return _Line(factor, factor * (shift if mode == "scale" else -unit.mean), exponent)


def _to_unit_magnitude(unit: _Unit) -> int:
    """Bring the largest magnitude between 1/2 and 1 by a power of two, which changes no digit; returns its exponent."""
    largest = max(float(torch.linalg.vector_norm(piece.flat, math.inf)) for piece in unit.pieces)
    exponent = math.frexp(largest)[1] if largest > 0 else 0
    for piece in unit.pieces:
        _times_power_of_two(piece.flat, -exponent)
    unit.measure()
    return exponent


def _times_power_of_two(flat: Tensor, exponent: int) -> None:
    # In two steps, as the factor itself may not be a number of the dtype.
    half = exponent // 2
    flat.mul_(2.0**half).mul_(2.0 ** (exponent - half))


def _centre_exactly(unit: _Unit) -> float:
    """Take the mean off until what is left of it is small beside the spread; returns what was taken off."""
    shift = 0.0
    for _ in range(3):
        mean = float(torch.tensor(unit.mean, dtype=unit.pieces[0].flat.dtype))
        for piece in unit.pieces:
            piece.flat.sub_(mean)
        shift += mean
        unit.measure()
        if unit.variance >= _CANCELS * unit.mean_square:
            break
    return shift


def _piece(gradient: Tensor) -> _Piece:
    flat = _dense_view(gradient)
    if gradient.dtype in _SAFE and flat is not None:
        return _Piece(flat, None)
    wide = gradient.contiguous().view(-1)
    wide = wide.clone() if gradient.dtype in _SAFE else wide.float()
    return _Piece(wide, gradient)


def _dense_view(gradient: Tensor) -> Tensor | None:
    """All elements in the order of memory, or None where memory holds gaps or one element twice."""
    if gradient.is_contiguous():
        return gradient.view(-1)
    expected = 1
    for stride, size in sorted(zip(gradient.stride(), gradient.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return None
            expected *= size
    return gradient.as_strided((gradient.numel(),), (1,))


def _on_device(tensors: list[Tensor], eps: float, mode: Mode, *, together: bool) -> bool:
    """Without reading a scalar back, but one, to know whether all is finite."""
    groups = list(_by_kind(tensors))
    if len(groups) == 1:  # of several, each might be changed before another is known to be finite
        finite = zscore_kernels_(tensors, eps, mode, together=together)
        if finite is not None:
            return bool(finite)
    wide = [[g.float() if g.dtype not in _SAFE else g for g in group] for group in groups]
    largest = [torch.stack(torch._foreach_norm(group, math.inf)) for group in wide]
    if not bool(torch.stack([torch.isfinite(of_group).all().cpu() for of_group in largest]).all()):
        return False
    if together and len(wide) > 1:
        raise ValueError("scope global needs gradients of one device and dtype")
    for group, of_group, targets in zip(wide, largest, groups, strict=True):
        _foreach_zscore_(group, of_group.amax().expand_as(of_group) if together else of_group, eps, mode, together)
        for result, target in zip(group, targets, strict=True):
            if result is not target:
                target.copy_(result)
    return True


def _foreach_zscore_(group: list[Tensor], largest: Tensor, eps: float, mode: Mode, together: bool) -> None:
    """One device and dtype; every sum stays on it."""
    counts = torch.tensor([g.numel() for g in group], dtype=largest.dtype, device=largest.device)

    def mean_of(sums: Tensor) -> Tensor:
        return (sums.sum() / counts.sum()).expand_as(sums) if together else sums / counts

    # A power of two changes no digit. ldexp in two steps: the factor itself may not be a number of the dtype.
    exponents = torch.frexp(torch.where(largest > 0, largest, 1))[1]
    for part in (exponents // 2, exponents - exponents // 2):
        torch._foreach_mul_(group, list(torch.ldexp(torch.ones_like(largest), -part).unbind()))
    mean_square = mean_of(torch.stack(torch._foreach_norm(group, 2)) ** 2)
    shift = torch.zeros_like(largest)
    for _ in range(2):
        mean = mean_of(torch.stack([g.sum() for g in group]))
        torch._foreach_sub_(group, list(mean.unbind()))
        shift = shift + mean
    spread = mean_of(torch.stack(torch._foreach_norm(group, 2)) ** 2).sqrt()
    if mode == "scale":
        torch._foreach_add_(group, list(shift.unbind()))
    if mode == "centre":
        for part in (exponents // 2, exponents - exponents // 2):
            torch._foreach_mul_(group, list(torch.ldexp(torch.ones_like(largest), part).unbind()))
        return
    divisor = spread + eps * mean_square.sqrt()
    torch._foreach_div_(group, list(torch.where(divisor > 0, divisor, 1).unbind()))


def _by_kind(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    yield from kinds.values()


def _by_channel(chosen: list[tuple[Tensor, int]], eps: float, mode: Mode) -> bool:
    """Plain tensor operations: this scope is for experiments."""
    if not all(bool(torch.isfinite(gradient).all()) for gradient, _ in chosen):
        return False
    for gradient, dim in chosen:
        others = [d for d in range(gradient.dim()) if d != dim % max(1, gradient.dim())]
        if not others or gradient.numel() == gradient.shape[dim]:
            continue  # a channel of one element has no spread
        values = gradient.double()
        mean = values.mean(others, keepdim=True)
        mean_square = (values**2).mean(others, keepdim=True)
        centred = values - mean
        divisor = (centred**2).mean(others, keepdim=True).sqrt() + eps * mean_square.sqrt()
        scaled = (values if mode == "scale" else centred) / torch.where(divisor > 0, divisor, 1)
        gradient.copy_(centred if mode == "centre" else scaled)
    return True
