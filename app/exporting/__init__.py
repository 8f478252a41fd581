"""Export networks to formats of other programs and compare them with the original; import a MONAI bundle."""
