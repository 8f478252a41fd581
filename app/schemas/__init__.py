"""JSON Schemas (draft 2020-12) of what commands write: ``predict.schema.json``, ``predict-output.schema.json``."""
