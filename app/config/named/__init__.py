"""Complete named runs as YAML: what ``--config NAME`` takes."""
