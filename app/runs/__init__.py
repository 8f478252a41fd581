"""Run folders: checkpoints, metrics, model cards and records of the training cases."""
