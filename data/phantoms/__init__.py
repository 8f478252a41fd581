"""Synthetic glioma cases, named and stored as BraTS names and stores its own.

A phantom is the MNI152 anatomy that nilearn carries (Fonov et al., NeuroImage 54, 2011), bent anew for every case, with
a glioma grown into it and four contrasts rendered from it. It needs no download and nobody's data, so that tests and
first steps have something to work on. It is no substitute for patients: numbers measured on phantoms say nothing about
the clinic.

Positions are millimetres from the centre of the first voxel along the voxel axes (left, posterior, superior). Every
random field is drawn on a lattice fixed in millimetres, so a case has the same anatomy and tumour at every spacing.
"""

from data.phantoms.files import case_name, write_phantom, write_phantoms
from data.phantoms.make import Phantom, make_phantom

__all__ = ["Phantom", "case_name", "make_phantom", "write_phantom", "write_phantoms"]
