"""Score predicted label maps against references: metrics, and whole folders at once."""
