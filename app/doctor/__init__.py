"""What on a machine is in the way of training, and what to do about it."""
