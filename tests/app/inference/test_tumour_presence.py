"""Logits of presence networks for a case."""

from __future__ import annotations

import numpy as np

from app.config.load import load_config
from app.inference.tumour_presence.answers import case_logits
from app.system.device import Runtime
from models import build_network

CPU = Runtime(device_name="cpu", precision_name="float32", channels_last=False, reasons=())


def test_an_ensemble_gives_the_mean_of_its_logits() -> None:
    config = load_config("presence-slabs", ["network.channels=[8, 8, 8, 8]", "training.patch_voxels=[16, 16, 5]"])
    networks = [build_network(config.network, in_channels=4, out_channels=3).eval() for _ in range(2)]
    image = np.random.default_rng(0).normal(size=(4, 16, 16, 12)).astype(np.float16)
    alone = [case_logits([network], image, config, CPU) for network in networks]
    together = case_logits(networks, image, config, CPU)
    assert together.shape == (3, 3), "slabs, outputs"
    assert not np.array_equal(alone[0], alone[1])
    np.testing.assert_array_equal(together, np.mean(alone, axis=0))
