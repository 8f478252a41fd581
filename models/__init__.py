"""Networks and losses: tensors in, tensors out."""

from models.losses import DeepLoss, RegionLoss
from models.networks import ARCHITECTURES, NetworkConfig, build_network, patch_divisor
from models.presence import GivenPresence, with_presence

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
