"""One config and one builder for every network, and the patch sizes that a network accepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from torch import nn

#: Probability of each region in an untrained network.
_FIRST_PROBABILITY: Final = 0.05

#: Default number of encoder blocks of ``resenc`` by level; further levels have as many as the last.
_BLOCKS: Final = (1, 3, 4, 6, 6, 6)

#: Number of stages of a ResNet.
_STAGES: Final = 4

Architecture = Literal["unet", "resunet", "segresnet", "resenc", "resnet10", "resnet18", "resnet50"]
#: Architectures that answer whether something is present, with one logit for each output instead of a map.
PRESENCE_ARCHITECTURES: Final = ("resnet10", "resnet18", "resnet50")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Architecture and size of the network."""

    architecture: Architecture = "resunet"
    """``unet``: MONAI UNet; ``resunet``: MONAI UNet with residual units; ``segresnet``: MONAI SegResNet; ``resenc``:
    deep residual encoder and light decoder, after nnU-Net's ResEnc; ``resnet10``, ``resnet18``, ``resnet50``: MONAI
    ResNet, for the task ``presence``."""
    channels: tuple[int, ...] = (32, 64, 128, 256, 320)
    """Feature channels by level, finest first; each level has half the resolution of the one before. ``segresnet`` only
    uses the first entry, which it doubles from level to level, and the number of entries as the number of levels. A
    ResNet has four stages."""
    residual_units: int = 2
    """Convolutions in each residual unit of ``resunet``."""
    first_stride: Literal[1, 2] = 2
    """For all but ``segresnet``: 1 keeps the first level at full resolution; 2 halves it too, which is faster."""
    slices: int | None = None
    """For a ResNet: null uses 3D convolutions; a number uses 2D convolutions on slabs of this many axial slices."""
    blocks: tuple[int, ...] | None = None
    """For ``resenc``: residual blocks of the encoder by level, finest first; null means 1, 3, 4, 6, 6, 6."""
    deep_supervision: bool = False
    """For ``resenc``: also train on logits at the coarser resolutions; prediction uses only the finest."""
    dropout: float = 0.0
    """Dropout probability: of whole channels in ``segresnet``, of pooled features in a ResNet, of single values in the
    others."""
    backward_normalization: tuple[str, ...] = ()
    """Patterns of module names, such as ``model.1*``: in training, the gradient that flows back into their outputs gets
    a fixed size (arXiv 2106.09475). ``auto`` stands for residual units and skips, or activations where there are none;
    empty: nowhere."""

    def __post_init__(self) -> None:
        if len(self.channels) < 2:
            raise ValueError(f"network.channels: at least two levels are needed, got {list(self.channels)}")
        if min(self.channels) < 1 or max(self.channels) > 4096:
            raise ValueError(f"network.channels: from 1 to 4096 channels per level, got {list(self.channels)}")
        if len(self.channels) > 8:
            raise ValueError(f"network.channels: at most 8 levels, got {len(self.channels)}")
        if self.architecture == "segresnet" and self.channels[0] % 8:
            raise ValueError(
                f"network.channels: segresnet normalises in 8 groups, so the first entry must be a multiple of 8, "
                f"got {self.channels[0]}"
            )
        if not 1 <= self.residual_units <= 8:
            raise ValueError(f"network.residual_units: from 1 to 8, got {self.residual_units}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"network.dropout: a probability from 0 to below 1, got {self.dropout}")
        self._check_resnet()
        if not all(self.backward_normalization):
            raise ValueError(
                f"network.backward_normalization: names or patterns of modules, or auto, got "
                f"{list(self.backward_normalization)}"
            )
        if self.blocks is not None:
            self._check_blocks(self.blocks)
        if self.deep_supervision and self.architecture != "resenc":
            raise ValueError(
                f"network.deep_supervision: {self.architecture} has no logits at coarser resolutions; set "
                "network.architecture to resenc, or leave it out"
            )
        if self.deep_supervision and len(self.channels) == 2 and self.first_stride == 1:
            raise ValueError(
                "network.deep_supervision: two levels at first_stride 1 have no coarser logits; add a level"
            )

    def _check_resnet(self) -> None:
        if self.architecture in PRESENCE_ARCHITECTURES and len(self.channels) != _STAGES:
            raise ValueError(f"network.channels: a ResNet has {_STAGES} stages, got {list(self.channels)}")
        if self.slices is not None and self.architecture not in PRESENCE_ARCHITECTURES:
            raise ValueError(f"network.slices: only a ResNet takes slabs, not {self.architecture}; leave it out")
        if self.slices is not None and not 1 <= self.slices <= 64:
            raise ValueError(f"network.slices: from 1 to 64, or null, got {self.slices}")

    def _check_blocks(self, blocks: tuple[int, ...]) -> None:
        if self.architecture != "resenc":
            raise ValueError(f"network.blocks: only resenc has blocks, not {self.architecture}; leave it out")
        if len(blocks) != len(self.channels):
            raise ValueError(
                f"network.blocks: one number per level (network.channels has {len(self.channels)}), got {list(blocks)}"
            )
        if min(blocks) < 1 or max(blocks) > 32:
            raise ValueError(f"network.blocks: from 1 to 32 per level, got {list(blocks)}")

    @property
    def blocks_by_level(self) -> tuple[int, ...]:
        """Residual blocks of the encoder of ``resenc``, one number per level."""
        if self.blocks is not None:
            return self.blocks
        return (*_BLOCKS, *(_BLOCKS[-1:] * len(self.channels)))[: len(self.channels)]


def build_network(config: NetworkConfig, *, in_channels: int, out_channels: int) -> nn.Module:
    """Build a network with random weights.

    Args:
        config: architecture and size.
        in_channels: contrasts of the input, shape (N, in_channels, X, Y, Z).
        out_channels: regions of the output, logits of shape (N, out_channels, X, Y, Z); with ``deep_supervision`` a
            network in training mode returns a list of logits, finest first, each at half the resolution of the one
            before. For a ResNet: number of logits, shape (N, out_channels).

    Raises:
        ValueError: the architecture is unknown.

    Source: Kerfoot et al. 2019 (MONAI UNet); Myronenko 2018, arXiv 1810.11654 (SegResNet); Isensee et al. 2024,
    arXiv 2404.09556 (ResEnc).
    """
    if config.architecture not in ARCHITECTURES:
        raise ValueError(f"network.architecture: {config.architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    network = ARCHITECTURES[config.architecture](config, in_channels, out_channels)
    if config.architecture in PRESENCE_ARCHITECTURES:
        return network
    _start_from_background(network, out_channels)
    return network


def patch_divisor(config: NetworkConfig) -> int:
    """Return the number of voxels that every side of a patch must be a multiple of: 2 ** the number of halvings.

    A ResNet takes patches of any size: 1.

    A side must also be at least twice this long: an instance norm over a single voxel has nothing to normalise.

    Example:
        >>> patch_divisor(NetworkConfig(channels=(16, 32, 64, 128)))
        8
    """
    if config.architecture in PRESENCE_ARCHITECTURES:
        return 1
    halvings = len(config.channels) - 1
    if config.architecture == "resenc":
        halvings += config.first_stride - 1
    elif config.architecture != "segresnet" and config.first_stride == 1:
        halvings -= 1
    return int(2**halvings)


def _start_from_background(network: nn.Module, out_channels: int) -> None:
    """Set the bias of the logits so that an untrained network gives each voxel a small tumour probability.

    Tumour fills a few per cent of a head; starting from one half would waste the first steps on learning that.
    Source: the bias initialisation of RetinaNet (Lin et al., arXiv 1708.02002).
    """
    biases = [p for name, p in network.named_parameters() if name.endswith("bias") and p.numel() == out_channels]
    heads = getattr(network, "heads", None)
    for bias in biases[-1:] if heads is None else [head.conv.bias for head in heads]:
        nn.init.constant_(bias, math.log(_FIRST_PROBABILITY / (1 - _FIRST_PROBABILITY)))


def _unet(config: NetworkConfig, in_channels: int, out_channels: int) -> nn.Module:
    from monai.networks.nets.unet import UNet

    return UNet(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=config.channels,
        strides=(config.first_stride, *(2,) * (len(config.channels) - 2)),
        num_res_units=config.residual_units if config.architecture == "resunet" else 0,
        norm=("INSTANCE", {"affine": False}),
        dropout=config.dropout,
    )


def _segresnet(config: NetworkConfig, in_channels: int, out_channels: int) -> nn.Module:
    from monai.networks.nets.segresnet import SegResNet

    levels = len(config.channels)
    # Encoder: one block at the first level, two at each further one, four at the coarsest, which for four levels is the
    # BraTS bundle's (1, 2, 2, 4). Decoder: one block per level.
    return SegResNet(
        spatial_dims=3,
        init_filters=config.channels[0],
        in_channels=in_channels,
        out_channels=out_channels,
        blocks_down=(1, *(2,) * (levels - 2), 4),
        blocks_up=(1,) * (levels - 1),
        dropout_prob=config.dropout or None,
    )


def _resenc(config: NetworkConfig, in_channels: int, out_channels: int) -> nn.Module:
    from models.resenc import ResEncUNet

    return ResEncUNet(
        in_channels,
        out_channels,
        channels=config.channels,
        blocks=config.blocks_by_level,
        first_stride=config.first_stride,
        dropout=config.dropout,
        deep_supervision=config.deep_supervision,
    )


def _resnet(config: NetworkConfig, in_channels: int, out_channels: int) -> nn.Module:
    from models.resnet import PresenceResNet

    return PresenceResNet(
        in_channels,
        out_channels,
        architecture=config.architecture,
        channels=config.channels,
        first_stride=config.first_stride,
        slices=config.slices,
        dropout=config.dropout,
    )


#: Builders of the networks by name; each takes a config and the numbers of input and output channels.
ARCHITECTURES: Final[dict[str, Callable[[NetworkConfig, int, int], nn.Module]]] = {
    "unet": _unet,
    "resunet": _unet,
    "segresnet": _segresnet,
    "resenc": _resenc,
    "resnet10": _resnet,
    "resnet18": _resnet,
    "resnet50": _resnet,
}
