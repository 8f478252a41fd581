"""MONAI's ResNet as a network that answers whether something is present in a brain or in a slab of slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from monai.networks.nets.resnet import ResNet
from torch import Tensor, nn

#: Block and number of blocks by stage (He et al. 2016; ResNet-10 has one block in each stage).
_STAGES: Final[dict[str, tuple[str, list[int]]]] = {
    "resnet10": ("basic", [1, 1, 1, 1]),
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
}
#: Channels of the last stage as a multiple of its config entry.
_EXPANSION: Final = {"basic": 1, "bottleneck": 4}
#: Channels that a group norm normalises together.
_GROUP: Final = 8


class PresenceResNet(nn.Module):
    """A ResNet with group norms whose strongest response anywhere decides, in 3D or over slices as channels.

    Group norms replace batch norms, so that small batches and several processes give the same steps. Features are
    pooled by their maximum: a small tumour would hardly change their mean over the brain. The layer that makes the
    logits is the last child, ``head``, which ``znorm.select`` takes as the output block.

    Args:
        in_channels: contrasts of the input, shape (N, in_channels, X, Y, Z).
        outputs: number of logits.
        architecture: ``resnet10``, ``resnet18`` or ``resnet50``.
        channels: features of the four stages.
        first_stride: stride of the first convolution.
        slices: None for 3D convolutions; otherwise Z of the input, whose slices become channels of 2D convolutions.
        dropout: probability of dropping a pooled feature.

    Example:
        >>> import torch
        >>> network = PresenceResNet(4, 1, architecture="resnet10", channels=(8, 8, 8, 8))
        >>> tuple(network(torch.zeros(2, 4, 32, 32, 32)).shape)
        (2, 1)

    Source: He et al. 2016, arXiv 1512.03385; Hara et al. 2018, arXiv 1711.09577 (MONAI's implementation).
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        *,
        architecture: str,
        channels: Sequence[int],
        first_stride: int = 2,
        slices: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        block, blocks = _STAGES[architecture]
        self.slices = slices
        self.features = ResNet(
            block,
            blocks,
            list(channels),
            spatial_dims=3 if slices is None else 2,
            n_input_channels=in_channels * (slices or 1),
            conv1_t_size=5,
            conv1_t_stride=first_stride,
            feed_forward=False,
            bias_downsample=False,
        )
        self.features.avgpool = nn.AdaptiveMaxPool3d(1) if slices is None else nn.AdaptiveMaxPool2d(1)  # type: ignore[assignment]  # declared as a mean
        _use_group_norms_(self.features)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1] * _EXPANSION[block], outputs)
        nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of shape (N, outputs) for an image of shape (N, in_channels, X, Y, Z)."""
        if self.slices is not None:
            image = image.permute(0, 1, 4, 2, 3).flatten(1, 2)
        logits: Tensor = self.head(self.dropout(self.features(image)))
        return logits


def _use_group_norms_(network: nn.Module) -> None:
    """Replace all batch norms; MONAI's ResNet passes its argument ``norm`` only to the first of them."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
                features = child.num_features
                groups = features // _GROUP if features % _GROUP == 0 else 1
                setattr(parent, name, nn.GroupNorm(groups, features))
