"""Gradient overlap: what a skip path and the transformation beside it send back to the point where they part.

A residual unit computes f(x) + s(x), a U-Net skip concatenates x with f(x); x has the gradient a + b, a over the skip
path and b through the transformation f. Measured are a and b themselves, each where it arrives, not as a difference
of sums. Nothing is changed: each path gets an alias of x, whose gradient a hook reads.

Source: Yun, arXiv 2410.21564, gradient overlap in residual networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from znorm.stats import widest

#: Elements of an activation's gradient that are converted to float64 at a time.
_ELEMENTS_AT_A_TIME: Final = 2**24


@dataclass(frozen=True, kw_only=True)
class Junction:
    """A place where a skip path and a transformation of one tensor x meet again."""

    name: str
    """Path of the module where they meet."""
    transformation: nn.Module
    """Module that takes x first on its way through the transformation; its input's gradient is b."""
    skip: nn.Module
    """Module at which a is read."""
    side: Literal["input", "output"]
    """``input``: a is the gradient of the input of ``skip``; ``output``: that of its output, which is x + f(x)."""
    concatenated_dim: int | None = None
    """With ``output``: the dimension along which it is x and f(x) side by side, x first."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How the two gradients of a junction lie to each other; NaN where a norm is 0 or not finite."""

    cosine: float
    """Of the angle between a and b, from -1 (they cancel) to 1 (they add up)."""
    ratio: float
    """||a + b|| / (||a|| + ||b||), from 0 to 1."""
    norm_skip: float
    """||a||, in units of the loss per unit of x."""
    norm_transformation: float
    """||b||, in the same units."""


def find_junctions(model: nn.Module) -> tuple[Junction, ...]:
    """Residual units and skips of MONAI's UNet and SegResNet, told by the names of their classes and parts.

    Known are ``SkipConnection`` (modes cat and add), ``ResidualUnit``, ``ResBlock``, ``SegResBlock``, and the long
    skips of ``SegResNet``, which go by the up-sampling stage that receives them. Describe others as :class:`Junction`.

    Returns:
        the junctions in the model's order; none for a model without any.
    """
    return tuple(junction for name, module in model.named_modules() for junction in _of_module(name, module))


class watch_overlap:  # noqa: N801 - used as `with watch_overlap(...)`
    """Measure the overlap at junctions over the forward and backward passes within a block.

    Args:
        junctions: a model, for what :func:`find_junctions` finds in it, or the junctions themselves.

    All hooks go when the block ends. Of several passes, and of modules that are called more than once, a and b are
    those of all calls side by side. A junction whose x needs no gradient, such as one fed by the image itself, is
    left out. Norms and products are float64 where the device has it; they are read from the device once, by
    :meth:`read`. Modules inside ``torch.compile`` may not call their hooks.

    Raises:
        TypeError: ``junctions`` is neither.

    Example:
        >>> unit = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.constant_(unit.weight, 0.5)
        >>> last = nn.Identity()
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> with watch_overlap([Junction(name="sum", transformation=unit, skip=last, side="output")]) as watch:
        ...     (last(x + unit(x)) * torch.tensor([[3.0, 1.0]])).sum().backward()
        >>> x.grad  # a is [3, 1], b is [2, 2]
        tensor([[5., 3.]])
        >>> overlap = watch.read()["sum"]
        >>> round(overlap.cosine, 4), round(overlap.ratio, 4)
        (0.8944, 0.9743)
    """

    def __init__(self, junctions: nn.Module | Sequence[Junction]) -> None:
        self._junctions = find_junctions(junctions) if isinstance(junctions, nn.Module) else tuple(junctions)
        if not all(isinstance(junction, Junction) for junction in self._junctions):
            raise TypeError("give a model, or a sequence of znorm.overlap.Junction")
        self._hooks: list[RemovableHandle] = []
        self._sums: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        for junction in self._junctions:
            self._hooks += _watch(junction, partial(self._add, junction.name))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def read(self) -> dict[str, Overlap]:
        """What was measured, by the name of the junction, in the order of the junctions."""
        sums = [self._sums[junction.name] for junction in self._junctions if junction.name in self._sums]
        names = [junction.name for junction in self._junctions if junction.name in self._sums]
        rows = torch.stack([row.to(sums[0].device) for row in sums]).tolist() if sums else []
        return {name: _overlap(*row) for name, row in zip(names, rows, strict=True)}

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        sums = _sums(a, b)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums


def _of_module(name: str, module: nn.Module) -> Iterator[Junction]:
    kind = type(module).__name__

    def part(attribute: str) -> nn.Module:
        return module.get_submodule(attribute)

    if kind == "SkipConnection" and module.mode in ("cat", "add"):
        dim = int(module.dim) if module.mode == "cat" else None  # type: ignore[arg-type]  # torch's stub: Tensor | Module
        yield Junction(
            name=name, transformation=part("submodule"), skip=module, side="output", concatenated_dim=dim
        )
    elif kind == "ResidualUnit":
        yield Junction(name=name, transformation=part("conv"), skip=part("residual"), side="input")
    elif kind in ("ResBlock", "SegResBlock"):
        yield Junction(name=name, transformation=part("norm1"), skip=module, side="output")
    elif kind == "SegResNet":
        down, up = list(part("down_layers").children()), list(part("up_layers").children())
        prefix = f"{name}." if name else ""
        for number, stage in enumerate(up):
            # The stage's input is up-sampled coarser features plus the input of the level below.
            below = down[len(down) - 1 - number]
            yield Junction(name=f"{prefix}up_layers.{number}", transformation=below, skip=stage, side="input")


def _watch(junction: Junction, add: Callable[[Tensor, Tensor], None]) -> list[RemovableHandle]:
    """Install hooks that call ``add(a, b)`` for each call of the junction's modules, once both have arrived."""
    waiting: dict[int, tuple[bool, Tensor]] = {}
    calls = {True: 0, False: 0}

    def arrived(call: int, is_skip: bool, gradient: Tensor) -> None:
        other = waiting.pop(call, None)
        if other is None:
            waiting[call] = (is_skip, gradient.detach())
        elif is_skip:
            add(gradient.detach(), other[1])
        else:
            add(other[1], gradient.detach())

    def next_call(is_skip: bool) -> int:
        calls[is_skip] += 1
        return calls[is_skip]

    def on_input(is_skip: bool, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG001
        if not torch.is_grad_enabled():
            return None
        call = next_call(is_skip)
        if not args[0].requires_grad:
            return None
        alias = args[0][...]  # view_as would change strides of dimensions of size 1, and so the memory format
        alias.register_hook(lambda gradient: arrived(call, is_skip, gradient))
        return (alias, *args[1:])

    def on_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        if not torch.is_grad_enabled():
            return
        call, shape, dim = next_call(True), args[0].shape, junction.concatenated_dim
        if not args[0].requires_grad:
            return

        def share(gradient: Tensor) -> None:
            part = gradient if dim is None else gradient.narrow(dim, 0, shape[dim])
            arrived(call, True, part.sum_to_size(shape))

        output.register_hook(share)

    through = junction.transformation.register_forward_pre_hook(partial(on_input, False))
    if junction.side == "input":
        return [through, junction.skip.register_forward_pre_hook(partial(on_input, True))]
    return [through, junction.skip.register_forward_hook(on_output)]


@torch.no_grad()
def _sums(a: Tensor, b: Tensor) -> Tensor:
    """The products a.b, a.a, b.b and (a+b).(a+b) as a tensor of four."""
    total = widest(a.new_zeros(4))
    dim = max(range(a.dim()), key=lambda d: a.shape[d], default=0)
    step = max(1, a.shape[dim] * _ELEMENTS_AT_A_TIME // max(1, a.numel())) if a.dim() else 1
    parts = zip(a.split(step, dim), b.split(step, dim), strict=True) if a.dim() else [(a, b)]
    for one, other in parts:
        p, q = widest(one), widest(other)
        total += torch.stack([(p * q).sum(), p.square().sum(), q.square().sum(), (p + q).square().sum()])
    return total


def _overlap(product: float, skip: float, transformation: float, both: float) -> Overlap:
    a, b = skip**0.5, transformation**0.5
    # Rounding alone may lead beyond the limits; comparisons keep a NaN.
    cosine = product / (a * b) if a * b > 0 else float("nan")
    ratio = both**0.5 / (a + b) if a + b > 0 else float("nan")
    return Overlap(
        cosine=-1.0 if cosine < -1 else 1.0 if cosine > 1 else cosine,
        ratio=1.0 if ratio > 1 else ratio,
        norm_skip=a,
        norm_transformation=b,
    )
