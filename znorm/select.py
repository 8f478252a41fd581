"""Which parameters are normalised, and the report of which are not and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

#: ``output_block`` values with a meaning of their own; any other is the name of a module.
AUTO = "auto"
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class TensorChoice:
    """What happens to the gradient of one parameter."""

    name: str
    shape: tuple[int, ...]
    normalised: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What happens to the gradient of every parameter of a model."""

    choices: tuple[TensorChoice, ...]
    output_block: str | None
    """Name of the module left out as the output block, None where none is."""

    @property
    def normalised(self) -> frozenset[str]:
        """Names of the parameters that are normalised."""
        return frozenset(choice.name for choice in self.choices if choice.normalised)

    def report(self) -> str:
        """What is normalised and what is not, grouped by reason, for a log."""
        groups: dict[tuple[bool, str], list[TensorChoice]] = {}
        for choice in self.choices:
            groups.setdefault((choice.normalised, choice.reason), []).append(choice)
        lines = []
        for (normalised, reason), group in sorted(groups.items(), key=lambda item: not item[0][0]):
            elements = sum(_count(choice.shape) for choice in group)
            lines.append(
                f"{'z-scored' if normalised else 'left as is'}: {len(group)} tensors, {elements:,} elements - {reason}"
            )
            lines += [f"    {choice.name}  {'x'.join(str(n) for n in choice.shape) or '1'}" for choice in group]
        return "\n".join(lines)


def select(model: nn.Module, *, min_dimensions: int = 2, output_block: str = AUTO) -> Selection:
    """Choose the parameters whose gradients are normalised.

    Args:
        model: the network; a wrapper with one child (``torch.compile``, DistributedDataParallel) is looked through.
        min_dimensions: tensors with fewer dimensions are left as they are. The default of 2 leaves out biases and
            norms: a bias before an instance norm has no true gradient, and a z-score would turn its rounding noise
            into full steps.
        output_block: ``"auto"`` leaves out the last block (see :func:`find_output_block`), whose mean gradient moves
            every logit towards a rare foreground; ``"none"`` leaves nothing out; else the name of a module.

    Raises:
        ValueError: no such module, or no parameter is left to normalise.
    """
    block = find_output_block(model) if output_block == AUTO else None if output_block == NONE else output_block
    if block is not None and (not block or block not in dict(model.named_modules())):
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"output_block: the model has no module named {block!r}; its first level has {names}")
    choices = tuple(
        _choose(name, tuple(parameter.shape), min_dimensions, block) for name, parameter in model.named_parameters()
    )
    if not any(choice.normalised for choice in choices):
        raise ValueError(
            f"no parameter is left to normalise (min_dimensions={min_dimensions}, output block {block!r}); "
            "lower min_dimensions or set output_block to 'none'"
        )
    return Selection(choices=choices, output_block=block)


def find_output_block(model: nn.Module) -> str | None:
    """Name of the block that makes the logits: the last child, once single wrappers have been looked through.

    In MONAI's UNet this is the last up-sampling stage, ``model.2`` (with residual units a transposed convolution and
    the residual unit whose shortcut feeds the logits, so more than the last convolution); in its SegResNet
    ``conv_final``.

    Returns:
        the name, or None for a model whose parameters all lie in one layer.
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


def _choose(name: str, shape: tuple[int, ...], min_dimensions: int, block: str | None) -> TensorChoice:
    if _count(shape) <= 1:
        reason = "one element has no spread"
    elif len(shape) < min_dimensions:
        reason = f"fewer than {min_dimensions} dimensions (bias or norm)"
    elif block is not None and name.startswith(f"{block}."):
        reason = f"output block {block}"
    else:
        return TensorChoice(name=name, shape=shape, normalised=True, reason=f"{min_dimensions} or more dimensions")
    return TensorChoice(name=name, shape=shape, normalised=False, reason=reason)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
