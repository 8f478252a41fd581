"""What computes a network's answer for a window: a graph of operations, and torch or OpenVINO to run it."""
