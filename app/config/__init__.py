"""RunConfig: its sections, loading it from YAML, and what each field means."""
