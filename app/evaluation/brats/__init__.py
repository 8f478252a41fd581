"""Scores of the BraTS challenges from 2023 on: those of 2023 and 2024 computed here, those of 2026 by their package."""
