"""Jobs made of several runs: the gradient comparison, cross-validation and the demo."""
