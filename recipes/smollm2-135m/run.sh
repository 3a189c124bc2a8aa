#!/usr/bin/env bash
# From a dense SmolLM2-135M to TurboSparse-SmolLM2-135M and its SwiGLU control. Steps that are done are skipped.
#
#     recipes/smollm2-135m/run.sh SMOLLM2 CORPUS WORK
#
# SMOLLM2: a Hugging Face folder, hub id or GGUF file; CORPUS: web/, code/, math/, validation/ as JSONL (.zst); WORK: output.
# TRAIN: what trains a recipe; on two GPUs "torchrun --nproc-per-node 2 -m turbosparse train".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$1
export CORPUS=$2 WORK=$3
turbosparse=${TURBOSPARSE:-python3 -m turbosparse}
train=${TRAIN:-$turbosparse train}

mkdir -p "$WORK"
[ -d "$WORK/smollm2-135m-dense" ] || $turbosparse convert "$source" "$WORK/smollm2-135m-dense" --activation keep
[ -f "$WORK/chat.jsonl" ] || python3 "$here/make_chat.py" "$CORPUS" "$WORK/chat.jsonl"
$train "$here/control.yaml" --resume
[ -d "$WORK/smollm2-135m-drelu" ] || $turbosparse convert "$WORK/runs/control/1-trunk" "$WORK/smollm2-135m-drelu"
$train "$here/drelu.yaml" --resume
$train "$here/chat-drelu.yaml" --resume
$train "$here/chat-control.yaml" --resume
