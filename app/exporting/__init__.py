"""Export networks to formats of other programs, each compared with the original; import a MONAI bundle."""
