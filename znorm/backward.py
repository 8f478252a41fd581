"""Backward gradient normalization: places in a network that give the gradient flowing back through them a fixed size.

The forward pass does not change. Unlike ZNorm, which changes the gradients of the weights once they are complete, a
place changes the gradient of an activation on its way back, and so the gradients of all weights in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from znorm.overlap import find_junctions
from znorm.select import AUTO, find_output_block

#: Which values share one norm: those of a ``sample``, or those of the whole ``batch``.
Share = Literal["sample", "batch"]

#: Module of torch in which the classes of activation functions are defined.
_ACTIVATIONS: Final = nn.ReLU.__module__


def rescale_gradient(gradient: Tensor, factor: float = 1.0, share: Share = "sample") -> Tensor:
    """Return the gradient with a root mean square of factor / N in each sample, where N is the number of samples.

    For n values per sample, each sample's gradient g becomes (factor / N) * sqrt(n) * g / ||g||. Dividing by N keeps
    the size that the mean of a loss over the batch gives, so batches split over processes or over micro-batches add up
    to the gradient of the joined batch.

    Args:
        gradient: shape (N, ...), of any floating-point type. A gradient without dimensions is one sample.
        factor: what the loss was multiplied by, since the result no longer depends on it; default 1.
        share: ``sample`` (default) takes the norm of each sample, ``batch`` that of the whole batch, which keeps the
            proportions between samples.

    Returns:
        a tensor of the same shape and type. A gradient of 0 stays 0, and a non-finite value becomes NaN, so that the
        step can be recognised and skipped.

    Example:
        >>> rescale_gradient(torch.tensor([[3.0, 4.0], [0.0, 0.1]]))
        tensor([[0.4243, 0.5657],
                [0.0000, 0.7071]])

    Source: Cabana and Lago-Fernandez, arXiv 2106.09475; the division by N is ours.
    """
    if gradient.numel() == 0:
        return gradient
    samples = gradient.shape[0] if gradient.dim() else 1
    count = gradient.numel() if share == "batch" else gradient.numel() // samples
    dims = tuple(range(0 if share == "batch" else 1, gradient.dim()))
    # The square of a float32 number can overflow float32, but not float64, which MPS does not have.
    wide = torch.float32 if gradient.device.type == "mps" else torch.float64
    norm = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True, dtype=wide) if dims else gradient.abs().to(wide)
    size = torch.where(norm > 0, factor / samples * math.sqrt(count) / norm, torch.where(norm == 0, 0.0, norm))
    # A float16 factor could overflow, so half precision is multiplied in float32.
    narrow = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient * size.clamp(max=torch.finfo(narrow).max).to(narrow)).to(gradient.dtype)


class _BackwardNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float, share: Share) -> Tensor:  # noqa: ARG004
        # A copy: torch forbids in-place operations, such as an activation that follows, on a view made here.
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, Share], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.factor, ctx.share = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return rescale_gradient(gradients[0], ctx.factor, ctx.share), None, None


def backward_norm(x: Tensor, factor: float = 1.0, share: Share = "sample") -> Tensor:
    """Return a copy of x whose gradient is rescaled on its way back to x by :func:`rescale_gradient`.

    Args:
        x: activation of shape (N, ...).
        factor: as in :func:`rescale_gradient`.
        share: as in :func:`rescale_gradient`.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> (100 * backward_norm(x)).sum().backward()
        >>> x.grad
        tensor([[1., 1.]])

    Source: Cabana and Lago-Fernandez, arXiv 2106.09475.
    """
    result: Tensor = _BackwardNorm.apply(x, factor, share)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return result


class BackwardNormHandle:
    """Handle of the places in a model: their names, the factor of the loss, and ``remove()``."""

    def __init__(self, model: nn.Module, places: Sequence[str], share: Share) -> None:
        self.places = tuple(places)
        """Names of the modules whose outputs are places."""
        self.factor = 1.0
        """What the loss is multiplied by before the next backward pass: a GradScaler's scale, divided by the number of
        micro-batches whose gradients are accumulated. Set it before the forward pass."""
        self._share = share
        self._hooks: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_hook(partial(_after_forward, self)) for name in places
        ]

    def remove(self) -> None:
        """Remove all places; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def attach_backward_norm(
    model: nn.Module, places: Sequence[str] = (AUTO,), *, share: Share = "sample"
) -> BackwardNormHandle:
    """Normalise the gradient that flows back into the outputs of modules, in training mode.

    Forward pass, parameters and the names in the ``state_dict`` stay as they are. In evaluation mode, and where no
    gradients are recorded, nothing happens. Attach before the model is wrapped or compiled.

    Args:
        model: the network.
        places: patterns (``fnmatch``) of module names, such as ``layer?.*``; ``auto`` stands for the places that
            :func:`find_places` chooses.
        share: as in :func:`rescale_gradient`.

    Returns:
        a handle. With a GradScaler or accumulated gradients, set its ``factor``: the gradient behind a place no longer
        depends on the loss's scale, but ``unscale_`` divides by it.

    Raises:
        ValueError: a pattern matches no module, or ``auto`` finds no place.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> attach_backward_norm(model).places
        ('1',)

    Source: Cabana and Lago-Fernandez, arXiv 2106.09475.
    """
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in places:
        found = find_places(model) if pattern == AUTO else [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            first = ", ".join(name for name, _ in model.named_children())
            what = "has no residual unit, skip or activation" if pattern == AUTO else f"has no module named {pattern!r}"
            raise ValueError(f"the model {what}; its first level has {first}")
        chosen.update(found)
    return BackwardNormHandle(model, [name for name in names if name in chosen], share)


def find_places(model: nn.Module) -> tuple[str, ...]:
    """Return the places that ``auto`` stands for.

    These are the modules in which a skip and its transformation rejoin (:func:`znorm.overlap.find_junctions`), so that
    both receive the rescaled gradient; in a model without them, its activation functions. The output block
    (:func:`znorm.select.find_output_block`) has no place: the gradient of the loss reaches it as it is.
    """
    block = find_output_block(model)
    junctions = [junction.name for junction in find_junctions(model) if junction.name]
    activations = [name for name, module in model.named_modules() if type(module).__module__ == _ACTIVATIONS and name]
    for names in (junctions, activations):
        inside = [name for name in names if block is None or not f"{name}.".startswith(f"{block}.")]
        if inside:
            return tuple(inside)
    return ()


def _after_forward(handle: BackwardNormHandle, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG001
    if not (module.training and torch.is_grad_enabled()):
        return None
    return _each_tensor(output, handle.factor, handle._share)


def _each_tensor(output: Any, factor: float, share: Share) -> Any:
    if isinstance(output, Tensor):
        return backward_norm(output, factor, share) if output.is_floating_point() else output
    if isinstance(output, list | tuple):
        return type(output)(_each_tensor(one, factor, share) for one in output)
    return output
