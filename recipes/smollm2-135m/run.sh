#!/usr/bin/env bash
# From a dense SmolLM2-135M to TurboSparse-SmolLM2-135M: convert, chat set, control, dReLU model. Steps that are done are skipped.
#
#     recipes/smollm2-135m/run.sh SMOLLM2 CORPUS WORK
#
# SMOLLM2: a Hugging Face folder, hub id or GGUF file; CORPUS: web/, code/, math/, validation/ as JSONL (.zst); WORK: output.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$1
export CORPUS=$2 WORK=$3
turbosparse=${TURBOSPARSE:-python3 -m turbosparse}

mkdir -p "$WORK"
[ -d "$WORK/smollm2-135m-dense" ] || $turbosparse convert "$source" "$WORK/smollm2-135m-dense" --activation keep
[ -d "$WORK/smollm2-135m-drelu" ] || $turbosparse convert "$WORK/smollm2-135m-dense" "$WORK/smollm2-135m-drelu"
[ -f "$WORK/chat.jsonl" ] || python3 "$here/make_chat.py" "$CORPUS" "$WORK/chat.jsonl"
for recipe in control drelu; do
    $turbosparse train "$here/$recipe.yaml" --resume
done
