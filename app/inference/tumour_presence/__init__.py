"""Answers of presence networks: whether something is present in a case or a slab; also the gate of a segmentation."""
