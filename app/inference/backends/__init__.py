"""Run a network on windows: the network is a graph of operations, which torch or OpenVINO computes."""
