"""Data sets on disk: layouts, descriptions, names, folds and export."""
