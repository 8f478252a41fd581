"""The sliding window: where windows lie, blending in torch or numpy, and fallbacks when memory is short."""
