"""Computation of a network on windows: a graph of operations, and torch or OpenVINO to run it."""
