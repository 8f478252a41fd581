"""From a data set and a machine to a config that fits both, and a dry run that verifies it."""
