"""Training patches: cached cases, sampling and augmentation."""
