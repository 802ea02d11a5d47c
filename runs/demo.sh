#!/bin/sh
# The whole path of the online system on bundled text: about 15 minutes on two slow CPU cores.
# Stop it with Ctrl-C and start it again: training goes on from its last checkpoint, and
# what is finished is not done twice.
set -eu

stage() { printf '\n== %s\n' "$*"; }
# Whether a file of figures is of the model as it is now.
fresh() { [ "$1" -nt runs/demo/model/model.safetensors ]; }

stage "1 of 7, a minute, once: pull the base model, SmolLM2-135M"
sememe pull smollm2-135m

stage "2 of 7, 4 minutes: train the control, LoRA without concepts"
sememe train recipes/demo.yaml system=control --out runs/demo-control

stage "3 of 7, 5 minutes: train the concept model on the same batches, a concept for every 2 tokens"
sememe train recipes/demo.yaml --out runs/demo

stage "4 of 7, 2 minutes: evaluate it on another novel, beside the control and with its codes ablated"
fresh runs/demo/evaluate.json || sememe evaluate runs/demo --control runs/demo-control

stage "5 of 7, 3 minutes: time it beside the unmodified base"
fresh runs/demo/benchmark.json ||
    sememe benchmark runs/demo --prompt-tokens 256 --new-tokens 48 --repeats 3

stage "6 of 7, half a minute: let it write, each segment in a colour and its concept behind it"
sememe generate runs/demo --prompt "The little priest looked at the locked door, and then he said:" \
    --max-new-tokens 48 --temperature 0.7 --show-concepts

stage "7 of 7, seconds: draw all of it as one HTML page"
sememe report runs/demo
