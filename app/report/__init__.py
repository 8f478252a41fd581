"""Pages of what is there already: a run, predictions, a comparison, a cross-validation."""
