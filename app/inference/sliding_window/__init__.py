"""The sliding window: placement of windows, blending in torch or numpy, and fallbacks when memory is short."""
