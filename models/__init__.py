"""Networks and losses: tensors in, tensors out."""

from models.contrast_presence import GivenPresence, with_presence
from models.losses import DeepLoss, RegionLoss
from models.networks import ARCHITECTURES, NetworkConfig, build_network, patch_divisor

__all__ = [
    "ARCHITECTURES",
    "DeepLoss",
    "GivenPresence",
    "NetworkConfig",
    "RegionLoss",
    "build_network",
    "patch_divisor",
    "with_presence",
]
