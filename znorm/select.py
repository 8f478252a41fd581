"""Selects the parameters that are normalised, and reports which are not and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import nn

#: Special values of ``output_block``; any other value is the name of a module.
AUTO = "auto"
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class TensorChoice:
    """What happens to the gradient of one parameter."""

    name: str
    """Name in ``model.named_parameters()``."""
    shape: tuple[int, ...]
    """Shape of the parameter and its gradient."""
    normalised: bool
    """Whether the gradient is z-scored."""
    reason: str
    """Why it is or is not z-scored, in words."""
    channel_dim: int = 0
    """Dimension that holds the output channels: 1 for a transposed convolution."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What happens to the gradient of every parameter of a model."""

    choices: tuple[TensorChoice, ...]
    """One choice per parameter, in the model's order."""
    output_block: str | None
    """Name of the module left out as the output block; None if no module is left out."""

    @property
    def normalised(self) -> frozenset[str]:
        """Names of the parameters that are normalised."""
        return frozenset(choice.name for choice in self.choices if choice.normalised)

    def report(self) -> str:
        """Text for a log: the parameters that are normalised and those that are not, grouped by reason."""
        groups: dict[tuple[bool, str], list[TensorChoice]] = {}
        for choice in self.choices:
            groups.setdefault((choice.normalised, choice.reason), []).append(choice)
        lines = []
        for (normalised, reason), group in sorted(groups.items(), key=lambda item: not item[0][0]):
            elements = sum(prod(choice.shape) for choice in group)
            lines.append(
                f"{'z-scored' if normalised else 'left as is'}: {len(group)} tensors, {elements:,} elements - {reason}"
            )
            lines += [f"    {choice.name}  {'x'.join(str(n) for n in choice.shape) or '1'}" for choice in group]
        return "\n".join(lines)


def select(
    model: nn.Module,
    *,
    min_dimensions: int = 2,
    output_block: str = AUTO,
    modules: Sequence[str] = (),
    only: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    single: bool = False,
) -> Selection:
    """Choose the parameters whose gradients are normalised.

    Args:
        model: the network; wrappers with one child (``torch.compile``, DistributedDataParallel) are looked through.
        min_dimensions: tensors with fewer dimensions are left as they are. The default of 2 leaves out biases and
            norms: a bias before an instance norm has no true gradient, and a z-score would turn its rounding noise
            into full steps.
        output_block: ``"auto"`` leaves out the last block (see :func:`find_output_block`), whose mean gradient moves
            every logit towards a rare foreground; ``"none"`` leaves nothing out; any other value names a module.
        modules: module types, such as ``Conv3d``, whose parameters are taken; empty for any type.
        only: patterns (``fnmatch``); a parameter's name must match one of them. Empty for any name.
        leave_out: patterns (``fnmatch``) that a parameter's name must not match.
        single: also take tensors of one element, which have no spread of their own.

    Raises:
        ValueError: there is no such module, or no parameter is left to normalise.
    """
    block = find_output_block(model) if output_block == AUTO else None if output_block == NONE else output_block
    if block is not None and (not block or block not in dict(model.named_modules())):
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"output_block: the model has no module named {block!r}; its first level has {names}")
    owners = {
        id(parameter): type(module).__name__
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    }

    def reason_against(name: str, shape: tuple[int, ...], owner: str) -> str | None:
        if prod(shape) <= 1 and not single:
            return "one element has no spread"
        if len(shape) < min_dimensions:
            return f"fewer than {min_dimensions} dimensions (bias or norm)"
        if block is not None and name.startswith(f"{block}."):
            return f"output block {block}"
        if modules and owner not in modules:
            return f"module type {owner}"
        if (only and not _matches(name, only)) or _matches(name, leave_out):
            return "name left out"
        return None

    choices = []
    for name, parameter in model.named_parameters():
        shape, owner = tuple(parameter.shape), owners[id(parameter)]
        reason = reason_against(name, shape, owner)
        choices.append(
            TensorChoice(
                name=name,
                shape=shape,
                normalised=reason is None,
                reason=reason or f"{min_dimensions} or more dimensions",
                channel_dim=1 if "Transpose" in owner and len(shape) > 1 else 0,
            )
        )
    if not any(choice.normalised for choice in choices):
        raise ValueError(
            f"no parameter is left to normalise (min_dimensions={min_dimensions}, output block {block!r}, "
            f"modules={list(modules)}, only={list(only)}, leave_out={list(leave_out)}); "
            "lower min_dimensions or set output_block to 'none'"
        )
    return Selection(choices=tuple(choices), output_block=block)


def find_output_block(model: nn.Module) -> str | None:
    """Find the block that makes the logits: the last child, after looking through wrappers with one child.

    In MONAI's UNet this is the last up-sampling stage, ``model.2``. With residual units, that stage holds a transposed
    convolution and the residual unit whose shortcut feeds the logits, so it is more than the last convolution. In
    MONAI's SegResNet it is ``conv_final``.

    Returns:
        its name, or None if all parameters of the model are in one layer.
    """
    path: list[str] = []
    module = model
    while True:
        children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
        if not children:
            return None
        if len(children) > 1:
            return ".".join([*path, children[-1][0]])
        path.append(children[0][0])
        module = children[0][1]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
