"""Find problems of a machine that affect training, and suggest remedies."""
