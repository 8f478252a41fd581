"""Jobs built on whole runs: the gradient comparison, cross-validation and the demo."""
