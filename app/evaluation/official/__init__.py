"""Scores as the scripts of the BraTS challenges of 2023 and 2024 give them: whole-volume and lesion by lesion."""
