"""Networks and losses: tensors in, tensors out."""

from models.contrast_presence import GivenPresence, with_presence
from models.losses import DeepLoss, PresenceLoss, RegionLoss
from models.networks import ARCHITECTURES, PRESENCE_ARCHITECTURES, NetworkConfig, build_network, patch_divisor

__all__ = [
    "ARCHITECTURES",
    "PRESENCE_ARCHITECTURES",
    "DeepLoss",
    "GivenPresence",
    "NetworkConfig",
    "PresenceLoss",
    "RegionLoss",
    "build_network",
    "patch_divisor",
    "with_presence",
]
