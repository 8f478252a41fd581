"""Synthetic glioma cases with the names and file format of BraTS.

A phantom is the MNI152 anatomy shipped with nilearn (Fonov et al., NeuroImage 54, 2011), warped differently for every
case, with a simulated glioma and four contrasts rendered from it. Phantoms need no download and no patient data, so
they serve tests and first steps. They are no substitute for patients: numbers measured on phantoms have no clinical
meaning.

Positions are millimetres from the centre of the first voxel along the voxel axes (left, posterior, superior). Every
random field is drawn on a lattice fixed in millimetres, so a case has the same anatomy and tumour at every spacing.
"""

from data.phantoms.files import case_name, write_phantom, write_phantoms
from data.phantoms.make import Phantom, make_phantom

__all__ = ["Phantom", "case_name", "make_phantom", "write_phantom", "write_phantoms"]
