"""Scores of predicted label maps against references: the metrics, and whole folders at once."""
