"""Plan a config that fits a data set and a machine, and verify it with a dry run."""
