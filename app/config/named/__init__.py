"""The named configs that ``--config NAME`` accepts, as YAML."""
