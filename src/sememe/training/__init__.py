"""Recipe → run."""
