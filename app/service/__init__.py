"""``znormseg serve``: a queue of predictions behind pages and an HTTP API, for the departments of a hospital."""
