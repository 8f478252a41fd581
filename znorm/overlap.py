"""Gradient overlap: the gradients that a skip path and its parallel transformation send back to where they branch.

A residual unit computes f(x) + s(x); a U-Net skip concatenates x with f(x). The gradient of x is a + b: a through the
skip path, b through the transformation f. Hooks on the nodes of the autograd graph measure a and b directly where they
arrive, not as a difference of sums, and leave the graph and its order of summation unchanged.

Source: Yun, arXiv 2410.21564, gradient overlap in residual networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from znorm.stats import widest

#: Elements of an activation's gradient that are converted to float64 at a time.
_ELEMENTS_AT_A_TIME: Final = 2**24


@dataclass(frozen=True, kw_only=True)
class Junction:
    """A place where a skip path and a transformation of the same tensor x rejoin."""

    name: str
    """Path of the module where they rejoin."""
    transformation: nn.Module
    """First module that x passes in the transformation; returns a tensor. b is the gradient it sends back to x."""
    skip: nn.Module
    """Module where a is read."""
    side: Literal["path", "input", "output"]
    """How a is read. ``path``: ``skip`` transforms x, and a is the gradient it sends back to x. ``input``: ``skip``
    takes x + f(x), and a is the gradient of its input. ``output``: ``skip`` takes x and returns x + f(x), and a is the
    gradient of its output."""
    concatenated_dim: int | None = None
    """With ``output``: the dimension along which ``skip`` concatenates x and f(x), x first; None if it adds them."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How the two gradients of a junction relate; NaN where a norm is 0 or not finite."""

    cosine: float
    """Cosine of the angle between a and b, from -1 (they cancel) to 1 (they add up)."""
    ratio: float
    """||a + b|| / (||a|| + ||b||), from 0 to 1."""
    norm_skip: float
    """||a||, in units of the loss per unit of x."""
    norm_transformation: float
    """||b||, in the same units."""


def find_junctions(model: nn.Module) -> tuple[Junction, ...]:
    """Find the residual units and skips of MONAI's UNet and SegResNet by the names of their classes and parts.

    It recognises ``SkipConnection`` (modes cat and add), ``ResidualUnit``, ``ResBlock``, ``SegResBlock``, and the long
    skips of ``SegResNet``, which are named after the up-sampling stage that receives them. Describe others with
    :class:`Junction`.

    Returns:
        the junctions in the model's order; empty if there are none.
    """
    return tuple(junction for name, module in model.named_modules() for junction in _of_module(name, module))


class OverlapWatch:
    """Measurements of :func:`watch_overlap`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sums: dict[str, Tensor] = {}

    def read(self) -> dict[str, Overlap]:
        """Return the overlap of each junction that both gradients reached, by name, in the order of the junctions."""
        names = [name for name in self._names if name in self._sums]
        rows = [self._sums[name] for name in names]
        table = torch.stack([row.to(rows[0].device) for row in rows]).tolist() if rows else []
        return {name: _overlap(*row) for name, row in zip(names, table, strict=True)}

    def _add(self, name: str, a: Tensor, b: Tensor) -> None:
        sums = _sums(a, b)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums


@contextmanager
def watch_overlap(junctions: nn.Module | Sequence[Junction]) -> Iterator[OverlapWatch]:
    """Measure the overlap at junctions during the forward and backward passes within a block.

    Args:
        junctions: a model, whose junctions :func:`find_junctions` finds, or the junctions themselves.

    Yields:
        the watch, complete when the block ends; :meth:`OverlapWatch.read` copies its numbers from the device once.
        Norms and products are float64 where the device supports it.

    All hooks are removed when the block ends. With several passes, or several calls of a module, a and b are the
    concatenated gradients of all calls. A junction whose x needs no gradient, such as one fed by the image itself, is
    left out. Modules inside ``torch.compile`` may not call their hooks.

    Example:
        >>> unit = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.constant_(unit.weight, 0.5)
        >>> last = nn.Identity()
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> with watch_overlap([Junction(name="sum", transformation=unit, skip=last, side="input")]) as watch:
        ...     (last(x + unit(x)) * torch.tensor([[3.0, 1.0]])).sum().backward()
        >>> x.grad  # a is [3, 1], b is [2, 2]
        tensor([[5., 3.]])
        >>> overlap = watch.read()["sum"]
        >>> round(overlap.cosine, 4), round(overlap.ratio, 4)
        (0.8944, 0.9733)
    """
    found = find_junctions(junctions) if isinstance(junctions, nn.Module) else junctions
    watch = OverlapWatch([junction.name for junction in found])
    with ExitStack() as stack:
        for junction in found:
            for hook in _watch(junction, partial(watch._add, junction.name)):
                stack.callback(hook.remove)
        yield watch


def _of_module(name: str, module: nn.Module) -> Iterator[Junction]:
    kind = type(module).__name__

    def part(attribute: str) -> nn.Module:
        return module.get_submodule(attribute)

    if kind == "SkipConnection" and module.mode in ("cat", "add"):
        dim = int(module.dim) if module.mode == "cat" else None  # type: ignore[arg-type]  # torch's stub: Tensor | Module
        yield Junction(name=name, transformation=part("submodule"), skip=module, side="output", concatenated_dim=dim)
    elif kind == "ResidualUnit":
        identity = isinstance(module.residual, nn.Identity)
        skip = module if identity else part("residual")
        yield Junction(name=name, transformation=part("conv"), skip=skip, side="output" if identity else "path")
    elif kind in ("ResBlock", "SegResBlock"):
        yield Junction(name=name, transformation=part("norm1"), skip=module, side="output")
    elif kind == "SegResNet":
        down, up = list(part("down_layers").children()), list(part("up_layers").children())
        prefix = f"{name}." if name else ""
        for number, stage in enumerate(up):
            # The stage's input is the up-sampled coarser features plus the input of the level below.
            below = down[len(down) - 1 - number]
            yield Junction(name=f"{prefix}up_layers.{number}", transformation=below, skip=stage, side="input")


def _watch(junction: Junction, add: Callable[[Tensor, Tensor], None]) -> list[RemovableHandle]:
    """Install hooks that call ``add(a, b)`` for each call of the junction's modules, once both gradients are there."""
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

    def after_call(is_skip: bool, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
        calls[is_skip] += 1
        x, dim = args[0], junction.concatenated_dim
        report = partial(arrived, calls[is_skip], is_skip)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return
        if not is_skip or junction.side == "path":
            _on_gradient_through(output, x, report)
        elif junction.side == "input":
            x.register_hook(report)
        elif dim is None:
            output.register_hook(lambda gradient: report(gradient.sum_to_size(x.shape)))
        else:
            output.register_hook(lambda gradient: report(gradient.narrow(dim, 0, x.shape[dim])))

    # In front of other hooks: one that rescales the gradient of an output (znorm.backward) would separate a from b.
    return [
        junction.transformation.register_forward_hook(partial(after_call, False), prepend=True),
        junction.skip.register_forward_hook(partial(after_call, True), prepend=True),
    ]


def _on_gradient_through(output: Tensor, x: Tensor, report: Callable[[Tensor], None]) -> None:
    """Call ``report`` in the backward pass with the gradient ``output`` sends back to x, summed over all uses of x."""
    users = _users(output, x)
    left = len(users)
    parts: list[Tensor] = []

    def note(places: Sequence[int], inputs: Sequence[Tensor | None], _: Sequence[Tensor | None]) -> None:
        nonlocal left
        left -= 1
        parts.extend(gradient for place in places if (gradient := inputs[place]) is not None)
        if left == 0 and parts:
            report(reduce(torch.add, parts))
            parts.clear()

    for node, places in users.items():
        node.register_hook(partial(note, places))


def _users(output: Tensor, x: Tensor) -> dict[Node, list[int]]:
    """Nodes between ``output`` and x that use x, with the positions of x in their inputs; empty if ``output`` is x."""
    edge = torch.autograd.graph.get_gradient_edge(x)
    users: dict[Node, list[int]] = {}
    seen = {edge.node}
    ahead = [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for place, (following, number) in enumerate(node.next_functions):
            if following == edge.node and number == edge.output_nr:
                users.setdefault(node, []).append(place)
            ahead.append(following)
    return users


@torch.no_grad()
def _sums(a: Tensor, b: Tensor) -> Tensor:
    """The products a.b, a.a, b.b and (a+b).(a+b) as a tensor of four."""
    total = widest(a.new_zeros(4))
    dim = max(range(a.dim()), key=lambda d: a.shape[d], default=0)
    step = max(1, a.shape[dim] * _ELEMENTS_AT_A_TIME // max(1, a.numel())) if a.dim() else 1
    parts = zip(torch.split(a, step, dim), torch.split(b, step, dim), strict=True) if a.dim() else [(a, b)]
    for one, other in parts:
        p, q = (widest(tensor).reshape(-1) for tensor in (one, other))
        both = p + q
        total += torch.stack([p.dot(q), p.dot(p), q.dot(q), both.dot(both)])
    return total


def _overlap(product: float, skip: float, transformation: float, both: float) -> Overlap:
    a, b = skip**0.5, transformation**0.5
    # Rounding may push values beyond their limits; the comparisons let NaN through.
    cosine = product / (a * b) if a * b > 0 else float("nan")
    ratio = both**0.5 / (a + b) if a + b > 0 else float("nan")
    return Overlap(
        cosine=-1.0 if cosine < -1 else 1.0 if cosine > 1 else cosine,
        ratio=1.0 if ratio > 1 else ratio,
        norm_skip=a,
        norm_transformation=b,
    )
