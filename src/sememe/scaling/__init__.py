"""What a run would take elsewhere, from the arithmetic of its layers: nothing is loaded."""
