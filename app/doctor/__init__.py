"""Find what on a machine gets in the way of training, and what to do about it."""
