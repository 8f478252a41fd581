"""Networks out to other programs' formats, each compared with the original; and in from MONAI's bundle."""
