"""A U-Net with a deep residual encoder and a light decoder, built from MONAI's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from monai.networks.blocks.convolutions import Convolution
from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import Tensor, cat, einsum, nn

_NORM: Final = ("INSTANCE", {"affine": True})
_ACTIVATION: Final = ("LEAKYRELU", {"negative_slope": 0.01, "inplace": True})


class ResEncUNet(nn.Module):
    """A U-Net with any number of residual blocks per encoder level and one convolution per decoder level.

    Level i has half the resolution of level i - 1: strided convolutions halve it, transposed ones double it. Norms are
    instance norms, activations LeakyReLU. The 1x1 convolutions that make the logits are the last child, ``heads``,
    finest first, so that ``znorm.select``, which takes the last child as the output block, finds all of them.

    Args:
        in_channels: contrasts of the input, shape (N, in_channels, X, Y, Z).
        out_channels: regions of the output.
        channels: features by level, finest first, at least two.
        blocks: residual blocks of the encoder by level; as many entries as ``channels``.
        first_stride: 1 keeps the first level at full resolution; 2 halves it, and a last transposed convolution
            restores it.
        dropout: probability of dropping a value after a convolution of the encoder.
        deep_supervision: create heads at every resolution of the decoder instead of only the finest.

    Example:
        >>> import torch
        >>> network = ResEncUNet(4, 3, channels=(8, 16, 32), blocks=(1, 2, 2), first_stride=1, deep_supervision=True)
        >>> [tuple(logits.shape) for logits in network(torch.zeros(1, 4, 16, 16, 16))]
        [(1, 3, 16, 16, 16), (1, 3, 8, 8, 8)]
        >>> tuple(network.eval()(torch.zeros(1, 4, 16, 16, 16)).shape)
        (1, 3, 16, 16, 16)

    Source: the ResEnc presets of nnU-Net (Isensee et al. 2024, arXiv 2404.09556). Their strided shortcuts average
    before the 1x1 convolution; MONAI's take every second voxel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: Sequence[int],
        blocks: Sequence[int],
        first_stride: int = 1,
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "bias": False}
        adn: dict[str, Any] = {"norm": _NORM, "act": _ACTIVATION}
        self.stem = Convolution(
            in_channels=in_channels, out_channels=channels[0], strides=first_stride, **common, **adn
        )
        stages = []
        before = channels[0]
        for level, (features, count) in enumerate(zip(channels, blocks, strict=True)):
            stage = nn.Sequential()
            for number in range(count):
                stride = 2 if level > 0 and number == 0 else 1
                options: dict[str, Any] = {"norm_name": _NORM, "act_name": _ACTIVATION, "dropout": dropout or None}
                stage.append(UnetResBlock(3, before, features, kernel_size=3, stride=stride, **options))
                before = features
            stages.append(stage)
        self.encoder = nn.ModuleList(stages)
        #: Coarsest first, in the order of use.
        finer = list(reversed(channels[:-1]))
        self.ups = nn.ModuleList(_Up(deep, fine) for deep, fine in zip(reversed(channels), finer, strict=False))
        self.decoder = nn.ModuleList(
            Convolution(in_channels=2 * fine, out_channels=fine, **common, **adn) for fine in finer
        )
        self.to_full = _Up(channels[0], channels[0]) if first_stride == 2 else None
        widths = [*([channels[0]] if first_stride == 2 else []), *channels[:-1]]
        if not deep_supervision:
            widths = widths[:1]
        self.heads = nn.ModuleList(
            Convolution(3, width, out_channels, kernel_size=1, conv_only=True) for width in widths
        )

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits at full resolution; in training mode with deep supervision, those of all heads, finest first."""
        features = self.stem(image)
        skips = []
        for stage in self.encoder:
            features = stage(features)
            skips.append(features)
        skips.pop()
        found = []
        for up, block in zip(self.ups, self.decoder, strict=True):
            features = block(cat([up(features), skips.pop()], dim=1))
            found.append(features)
        finest, *coarser = self.heads
        if self.to_full is None:
            logits: Tensor = finest(found.pop())
        else:
            logits = self.to_full(features, finest.conv)
        if self.training and coarser:
            return [logits, *(head(features) for head, features in zip(coarser, reversed(found), strict=True))]
        return logits


class _Up(nn.Module):
    """A transposed convolution that doubles the resolution: every voxel becomes a block of 2x2x2 voxels.

    As the blocks do not overlap, training computes them as one matrix product, several times as fast on a CPU as the
    transposed convolution and equal to it up to rounding (``bench/upsampling.py``). Otherwise the convolution itself is
    used, which exported graphs contain.
    """

    def __init__(self, deep: int, fine: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(deep, fine, kernel_size=2, stride=2, bias=False)

    def forward(self, features: Tensor, head: nn.Conv3d | None = None) -> Tensor:
        """Double the resolution, and apply a convolution of 1x1x1 voxels if one is given.

        The two are linear, so training multiplies their weights instead of computing all features at full resolution.
        """
        if not self.training:
            fine: Tensor = self.conv(features)
            return fine if head is None else head(fine)
        weight = self.conv.weight
        if head is not None:
            weight = einsum("dfxyz,of->doxyz", weight, head.weight.flatten(1))
        blocks = features.movedim(1, -1) @ weight.flatten(1)
        blocks = blocks.unflatten(-1, weight.shape[1:])  # (N, X, Y, Z, features, 2, 2, 2)
        doubled: Tensor = blocks.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return doubled if head is None or head.bias is None else doubled + head.bias[:, None, None, None]
