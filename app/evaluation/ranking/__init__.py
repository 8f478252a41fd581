"""Rank several sets of predictions of the same cases: which is better, by how much, and on which cases."""
