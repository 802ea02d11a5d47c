#!/bin/sh
# Text as concept ids and back: about half an hour on two slow CPU cores. Every command goes on
# where it was stopped. More `steps` make it better: recipes/smollm2-135m-compressor.yaml has 400.
set -eu

sememe pull smollm2-135m
sememe train recipes/smollm2-135m-compressor.yaml steps=60 --out runs/compressor

# A short text: writing a text again takes many times as long as reading it.
head -c 4000 data/heldout.txt > runs/compressor/short.txt
rm -f runs/compressor/codes.json runs/compressor/back.txt
sememe compress runs/compressor runs/compressor/short.txt --out runs/compressor/codes.json
sememe decompress runs/compressor runs/compressor/codes.json --out runs/compressor/back.txt

# How much comes back and for how many bits, at three inference-time concept rates; and what the ids are
# worth to go on from. `--bins RUN`: beside a run of recipes/smollm2-135m-compressor-bins.yaml.
sememe reconstruct runs/compressor --data data/heldout.txt --tokens 1024 --rate 0.25,0.33,0.5
sememe benchmark runs/compressor
sememe report runs/compressor
