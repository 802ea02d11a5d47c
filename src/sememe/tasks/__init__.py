"""Made-up tasks with known answers. Pure Python: no model is needed to make, check or grade
them."""
