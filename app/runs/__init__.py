"""Run folders: checkpoints, metrics, model cards and the record of the training cases."""
