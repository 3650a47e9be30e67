#!/usr/bin/env bash
# Run the main job on a real model, from end to end. `make demo` runs this script. All its results are in demo/.
# Larger values of DEMO_SAMPLES and DEMO_CHUNKS take longer and give surer figures (the defaults of llmc are 128 and 40).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$root/demo"
cd "$root/demo"
export TQDM_DISABLE=1

step() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# Make a fair base model. The packaged weights have a 4-bit type already and would make 4 bits look free (see make_base.py).
if [ ! -f base/model.safetensors ]; then
    step python ../examples/make_base.py base
fi

step llmc quantize base --bits 4 --samples "${DEMO_SAMPLES:-64}" -o small-4bit
step llmc export --format gguf -o small.gguf
step llmc export base --format gguf -o base-f16.gguf

step llmc eval base-f16.gguf --base base --chunks "${DEMO_CHUNKS:-20}" -o base.json
step llmc eval small.gguf --base base --chunks "${DEMO_CHUNKS:-20}" -o small.json
step llmc bench base-f16.gguf small.gguf -o base.json -o small.json

step llmc generate small.gguf "Why is the sky blue?" --chat
step llmc verify small.gguf
step llmc compare base.json small.json --page compare.html

# Run the same kind of chain from one file: 8 bits, with gates (llmc recipe show int8-safe).
step llmc run int8-safe --model base --set eval.chunks=4 -o int8-safe
printf '\nThe pages with the charts: %s\n' "$PWD/compare.html, $PWD/int8-safe/int8-safe.html"
