"""The report of a run: an HTML page and the pictures and charts in it."""
