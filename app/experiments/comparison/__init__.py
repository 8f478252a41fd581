"""Compare gradient rules: the same runs under every arm, and statistics of their results."""
