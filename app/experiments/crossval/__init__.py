"""Cross-validation: a network for each fold, tuned post-processing, one ensemble of them."""
