#!/bin/sh
# The whole path of the online system on a GPU: control, concept model and pruned model on the same
# batches, measured and drawn. Stop it with Ctrl-C and start it again: training goes on from its last
# checkpoint, and what is finished is not done twice. Variables, as `make gpu BASE=… TOKENS=…`:
#   BASE    folder or Hub id of a base (Qwen/Qwen3-0.6B); tiny: random weights, to see it run
#   DATA    folder with train.* and heldout.* (.txt, .jsonl, .parquet), or one source whose first
#           documents are held out: .jsonl, .parquet or ID[:CONFIGURATION][#FIELD] on the Hub
#   TOKENS  that each model trains on (50000000)
#   RECIPE  of the concept model    OUT  its run folder (runs/gpu); the others lie beside it
#   TINY=1  BASE=tiny DATA=data TOKENS=20000: minutes on a CPU
set -eu

[ "${TINY:-}" != 1 ] || BASE=tiny DATA=data TOKENS=20000
: "${BASE:=Qwen/Qwen3-0.6B}" "${DATA:=HuggingFaceFW/fineweb-edu:sample-10BT}"
: "${TOKENS:=50000000}" "${OUT:=runs/gpu}"

stage() { printf '\n== %s\n' "$*"; }
# Whether a file of figures of a run is of its model as it is now.
fresh() { [ "$1/$2.json" -nt "$1/model/model.safetensors" ]; }

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ] && [ "$TOKENS" -gt 1000000 ]; then
    echo "error: torch finds no GPU here, and $TOKENS tokens through three models would take a CPU" \
        "weeks: need a GPU and a torch that was built for it. try: make gpu TINY=1" >&2
    exit 1
fi

# What fits; the batch is the same on every GPU, and so is the model that comes out.
length=1024 batch=32 few='' tokens=65536 ablated=8192 prompt=1024 new=128
if [ "$gpus" = 0 ]; then
    length=128 batch=8 parts=1 tokens=1024 ablated=256 prompt=64 new=16
    few="heldout_tokens=1024 calibration_tokens=4096"
else
    memory=$(python -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory >> 30)')
    [ "$memory" -lt 70 ] && at_once=2 || at_once=8
    parts=$((batch / (at_once * gpus)))
    [ "$parts" -gt 0 ] || parts=1
fi
steps=$((TOKENS / (length * batch)))
[ "$steps" -gt 0 ] || steps=1

split=''
case $BASE in
*[Qq]wen3-0.6[Bb]*) known=qwen3-0.6b ;;
*[Qq]wen2.5-0.5[Bb]*) known=qwen2.5-0.5b ;;
*) known=qwen3-0.6b split=split=null ;; # of another depth: as thick a middle as it has room for
esac
[ -z "${RECIPE:-}" ] || split=''
RECIPE=${RECIPE:-recipes/$known-online.yaml}

stage "1 of 8: the base and the text"
case $BASE in
tiny)
    BASE=$OUT-base few="$few num_concepts=64"
    PYTHONPATH=examples:${PYTHONPATH:-} python -c 'import pathlib, sys
from qwen import tiny_base
tiny_base(pathlib.Path(sys.argv[1]))' "$BASE"
    ;;
smollm2-*) sememe pull "$BASE" ;; # a folder is there, and the Hub is asked by the first training
esac
if [ ! -d "$DATA" ]; then
    python examples/corpus.py "$DATA" "$OUT-text" --tokens "$TOKENS"
    DATA=$OUT-text
fi
set -- "base=$BASE" "data.train=$(ls "$DATA"/train.*)" "data.heldout=$(ls "$DATA"/heldout.*)" \
    "steps=$steps" "sequence_length=$length" "batch_size=$batch" "gradient_accumulation=$parts" \
    $split $few
echo "$RECIPE with $*"

# Several GPUs of this machine meet where no other one can reach them: SECURITY.md.
launch=sememe
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
[ "$gpus" -lt 2 ] || launch="torchrun --nproc-per-node $gpus --rdzv-backend c10d \
    --rdzv-conf store_type=file -m sememe"

stage "2 of 8: train the control, LoRA without concepts, on $TOKENS tokens"
$launch train "$RECIPE" "$@" system=control --out "$OUT-control"

stage "3 of 8: train the concept model on the same batches"
$launch train "$RECIPE" "$@" --out "$OUT"

stage "4 of 8: evaluate it beside the control"
fresh "$OUT" evaluate || sememe evaluate "$OUT" --control "$OUT-control" --tokens "$tokens"

layers=$(python -c 'import json, sys
config, figures = (json.load(open(f"{sys.argv[1]}/{x}.json")) for x in ("model/config", "evaluate"))
layers = config["text_config"]["num_hidden_layers"]
print(max(1, round(layers * (1 - figures["layer_share"]))))' "$OUT")
stage "5 of 8: train and evaluate the base without the $layers layers that concepts spare a token"
$launch train "$RECIPE" "$@" system=prune "leave_out=$layers" --out "$OUT-prune"
fresh "$OUT-prune" evaluate ||
    sememe evaluate "$OUT-prune" --control "$OUT-control" --tokens "$tokens"

stage "6 of 8: ablate its codes"
fresh "$OUT" ablate || sememe ablate "$OUT" --tokens "$ablated"

stage "7 of 8: time both beside the unmodified base"
for run in "$OUT" "$OUT-prune"; do
    fresh "$run" benchmark ||
        sememe benchmark "$run" --prompt-tokens "$prompt" --new-tokens "$new" --repeats 3
done

stage "8 of 8: draw all of it as one HTML page"
sememe report "$OUT" "$OUT-prune"
