"""Scores of the BraTS challenges: those of 2023 and 2024 are computed here, those of 2026 by their package."""
