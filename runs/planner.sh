#!/bin/sh
# Plan first, then write: about an hour on two slow CPU cores. Training goes on where it was
# stopped. More `steps` make it better: recipes/smollm2-135m-planner.yaml has 400.
set -eu

sememe pull smollm2-135m
sememe train recipes/smollm2-135m-planner.yaml steps=60 --out runs/planner
# The control reads the source itself, on the same pairs.
sememe train recipes/smollm2-135m-planner.yaml steps=60 system=control --out runs/planner-control

sememe evaluate runs/planner --control runs/planner-control --tokens 1024
sememe ablate runs/planner --tokens 1024
# The same text from a plan with another concept in the first place of type 0.
sememe generate runs/planner --prompt "The old detective" --show-concepts --edit 0:0=5
sememe report runs/planner
