"""Disk to arrays and tensors, and back: data sets, NIfTI, labels, preprocessing, phantoms."""
