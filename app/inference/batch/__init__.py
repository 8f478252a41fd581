"""Prediction of many cases: order, worker processes, retries and the manifest."""
