"""RunConfig: its sections, its YAML loader and the documentation of its fields."""
