"""Cross-validation: one network per fold, tuned post-processing, and an ensemble of the networks."""
