"""The maths of ZNorm, in place on a list of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from znorm.finite import Finite, are_finite, stays_on_gpu
from znorm.kernels import zscore_kernels_

Scope = Literal["layer", "channel", "global"]
Mode = Literal["zscore", "centre", "scale"]

#: Relative to a gradient's root mean square. About the resolution of float32, so that rounding noise is not amplified.
EPS: Final = 1e-7
#: Elements per thread in each block that is first squared, then summed: 1 MB, so that the second reduction finds them
#: in the core's cache. A smaller block would start the threads more often.
_BLOCK: Final = 2**18
#: Outside this range of mean squares, sums of squares have lost digits or are about to.
_SAFE: Final = {torch.float32: (1e-30, 1e30), torch.float64: (1e-280, 1e280)}
#: If the variance is a smaller share of the mean square, E[x^2] - mean^2 has lost too many digits to cancellation.
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

    std is the population's standard deviation. rms is the root mean square: an eps relative to it makes the result
    independent of the gradient's scale, from subnormal numbers to the largest. A mean far larger than the spread is
    subtracted exactly. A tensor of one element has no spread and is left as it is; a constant tensor becomes 0. On a
    CPU each tensor is read twice and written once, without a copy; half-precision tensors are computed in a float32
    copy.

    Args:
        gradients: floating-point tensors of any shape, on one or several devices.
        eps: added to the standard deviation (the population's), relative to rms(g); default 1e-7.
        scope: scope of each mean and spread: a tensor (``layer``), an output channel (``channel``) or all tensors
            together (``global``).
        mode: ``zscore``; ``centre`` only subtracts the mean; ``scale`` only divides and keeps the mean.
        channel_dims: with scope ``channel``, the dimension of each tensor that holds its output channels (1 for a
            transposed convolution); default 0.

    Returns:
        whether every element was finite; if not, nothing is changed.

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
    return bool(_zscore(gradients, eps, scope, mode, channel_dims, waits=True))


@torch.no_grad()
def zscore_unread_(
    gradients: Sequence[Tensor],
    eps: float = EPS,
    *,
    scope: Scope = "layer",
    mode: Mode = "zscore",
    channel_dims: Sequence[int] | None = None,
) -> Finite:
    """Like :func:`zscore_`, but the host does not wait for gradients on one GPU.

    Returns:
        as :func:`zscore_`; for gradients on one GPU an unread tensor, and if it is false, they may have changed.
    """
    return _zscore(gradients, eps, scope, mode, channel_dims, waits=not stays_on_gpu(gradients))


def _zscore(
    gradients: Sequence[Tensor],
    eps: float,
    scope: Scope,
    mode: Mode,
    channel_dims: Sequence[int] | None,
    *,
    waits: bool,
) -> Finite:
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    if scope == "channel":
        dims = channel_dims if channel_dims is not None else [0] * len(gradients)
        chosen = [(one, dim) for one, dim in zip(gradients, dims, strict=True) if one.numel() > 0]
        return _by_channel(chosen, eps, mode, waits=waits)
    fewest = 1 if scope == "global" else 2
    tensors = [gradient for gradient in gradients if gradient.numel() >= fewest]
    if not tensors:
        return True
    if all(tensor.is_cpu for tensor in tensors):
        return _on_cpu([[tensor] for tensor in tensors] if scope == "layer" else [tensors], eps, mode)
    return _on_device(tensors, eps, mode, together=scope == "global", waits=waits)


@dataclass(slots=True)
class _Piece:
    """One gradient as a flat tensor that can be written to."""

    flat: Tensor
    gradient: Tensor | None
    """Tensor that the result must be copied to; None if ``flat`` is a view of the gradient."""


@dataclass(slots=True)
class _Unit:
    """Gradients that share one mean and one spread, with their sums."""

    pieces: list[_Piece]
    count: int
    total: float = 0.0
    squares: float = 0.0

    def measure(self) -> None:
        """Sum all elements and their squares."""
        self.total = self.squares = 0.0
        block = _BLOCK * torch.get_num_threads()
        for piece in self.pieces:
            flat = piece.flat
            for part in (flat,) if flat.numel() <= block else torch.split(flat, block):
                # The dot product comes first: it takes longer, but the wait for memory hides its arithmetic. The plain
                # sum, the fastest pass there is, then reads from the cache.
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
    """Normalise on a CPU, where reading a scalar is free: two reductions, then one pass a * g + b.

    That pass takes the tensors in reverse order, as those measured last are still in a shared cache.
    """
    units = [_Unit([_piece(g) for g in group], sum(g.numel() for g in group)) for group in groups]
    for unit in units:
        unit.measure()
    # An overflowed sum of squares looks like a non-finite gradient; only then is every element checked.
    suspicious = [unit for unit in units if not math.isfinite(unit.squares)]
    if not all(bool(torch.isfinite(piece.flat).all()) for unit in suspicious for piece in unit.pieces):
        return False
    lines = [_line(unit, eps, mode) for unit in units]
    # All offsets in one tensor: for small gradients, creating one tensor each would take as long as the pass itself.
    offsets = torch.tensor([line.offset for line in lines], dtype=torch.float64)
    of_dtype = {dtype: offsets.to(dtype).unbind() for dtype in {unit.pieces[0].flat.dtype for unit in units}}
    for number in reversed(range(len(units))):
        line = lines[number]
        for piece in reversed(units[number].pieces):
            flat = piece.flat
            # One pass; two in-place operations would write the tensor twice.
            torch.add(of_dtype[flat.dtype][number], flat, alpha=line.factor, out=flat)
            if mode == "centre" and line.exponent:
                _times_power_of_two(flat, line.exponent)
            if piece.gradient is not None:
                piece.gradient.copy_(flat.view(piece.gradient.shape))
    return True


class _Line(NamedTuple):
    """The remaining operation on each element: factor * g + offset, then in ``centre`` mode times 2 ** exponent."""

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
    """Scale by a power of two, which is exact, so that the largest magnitude is in [1/2, 1); return its exponent."""
    largest = max(float(torch.linalg.vector_norm(piece.flat, math.inf)) for piece in unit.pieces)
    exponent = math.frexp(largest)[1] if largest > 0 else 0
    for piece in unit.pieces:
        _times_power_of_two(piece.flat, -exponent)
    unit.measure()
    return exponent


def _times_power_of_two(flat: Tensor, exponent: int) -> None:
    # In two steps, as the factor itself may not be representable in the dtype.
    half = exponent // 2
    flat.mul_(2.0**half).mul_(2.0 ** (exponent - half))


def _centre_exactly(unit: _Unit) -> float:
    """Subtract the mean until what remains of it is small against the spread; return the total subtracted."""
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
    """All elements in memory order, or None if memory has gaps or holds an element twice."""
    if gradient.is_contiguous():
        return gradient.view(-1)
    expected = 1
    for stride, size in sorted(zip(gradient.stride(), gradient.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return None
            expected *= size
    return gradient.as_strided((gradient.numel(),), (1,))


def _on_device(tensors: list[Tensor], eps: float, mode: Mode, *, together: bool, waits: bool = True) -> Finite:
    """Normalise without reading anything back, except, with ``waits``, whether every element is finite."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    groups = list(kinds.values())
    if len(groups) == 1:  # with several, one might be changed before another is checked
        finite = zscore_kernels_(tensors, eps, mode, together=together)
        if finite is not None:
            return bool(finite) if waits else finite.reshape(())
    wide = [[g.float() if g.dtype not in _SAFE else g for g in group] for group in groups]
    largest = [torch.stack(torch._foreach_norm(group, math.inf)) for group in wide]
    flags = [torch.isfinite(of_group).all().to(tensors[0].device) for of_group in largest]
    every = flags[0] if len(flags) == 1 else torch.stack(flags).all()
    if waits and not bool(every):
        return False
    if together and len(wide) > 1:
        raise ValueError("scope global needs gradients of one device and dtype")
    for group, of_group, targets in zip(wide, largest, groups, strict=True):
        _foreach_zscore_(group, of_group.amax().expand_as(of_group) if together else of_group, eps, mode, together)
        for result, target in zip(group, targets, strict=True):
            if result is not target:
                target.copy_(result)
    return True if waits else every


def _foreach_zscore_(group: list[Tensor], largest: Tensor, eps: float, mode: Mode, together: bool) -> None:
    """Normalise tensors of one device and dtype; every sum stays on the device."""
    counts = [g.numel() for g in group]

    def mean_of(sums: Sequence[Tensor]) -> Tensor:
        # The counts are arguments of the division: a tensor of them would have to be copied to the device.
        if together:
            return (torch.stack(list(sums)).sum() / sum(counts)).expand_as(largest)
        return torch.stack(torch._foreach_div(list(sums), counts))

    # Scaling by a power of two is exact. It takes two steps: the factor itself may not be representable in the dtype.
    exponents = torch.frexp(torch.where(largest > 0, largest, 1))[1]
    for part in (exponents // 2, exponents - exponents // 2):
        torch._foreach_mul_(group, list(torch.ldexp(torch.ones_like(largest), -part).unbind()))
    mean_square = mean_of(torch._foreach_pow(torch._foreach_norm(group, 2), 2))
    shift = torch.zeros_like(largest)
    for _ in range(2):
        mean = mean_of([g.sum() for g in group])
        torch._foreach_sub_(group, list(mean.unbind()))
        shift = shift + mean
    spread = mean_of(torch._foreach_pow(torch._foreach_norm(group, 2), 2)).sqrt()
    if mode == "scale":
        torch._foreach_add_(group, list(shift.unbind()))
    if mode == "centre":
        for part in (exponents // 2, exponents - exponents // 2):
            torch._foreach_mul_(group, list(torch.ldexp(torch.ones_like(largest), part).unbind()))
        return
    divisor = spread + eps * mean_square.sqrt()
    torch._foreach_div_(group, list(torch.where(divisor > 0, divisor, 1).unbind()))


def _by_channel(chosen: list[tuple[Tensor, int]], eps: float, mode: Mode, *, waits: bool) -> Finite:
    """Normalise each output channel with plain tensor operations; this scope is meant for experiments."""
    finite = are_finite([gradient for gradient, _ in chosen])
    if waits and not bool(finite):
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
    return True if waits else finite
