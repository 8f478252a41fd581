"""JSON Schemas (draft 2020-12) of what commands write."""
