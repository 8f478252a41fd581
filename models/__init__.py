"""Networks and losses: tensors in, tensors out."""

from models.losses import RegionLoss
from models.networks import ARCHITECTURES, NetworkConfig, build_network, patch_divisor

__all__ = ["ARCHITECTURES", "NetworkConfig", "RegionLoss", "build_network", "patch_divisor"]
