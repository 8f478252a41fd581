"""Compare what is done to gradients: the same runs under every arm, statistics, a page."""
