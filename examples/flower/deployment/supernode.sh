#!/usr/bin/env bash
# A node: its name, its records, its copy of the base model. NODE_PORT is for its own processes; two nodes on one machine
# need different ones. EVAL_DATA, STATE, BACKPROPAGATION, SECURE_SUMS and KEYS are optional (docs/deploy.md,
# docs/secure-sums.md), as are DP, CLIP_NORM, NOISE_MULTIPLIER, EPSILON and DELTA (docs/privacy.md). With WARM=no nothing stays in memory between messages: Flower starts a process for each.
set -euo pipefail
if (($# < 5)); then
    echo "usage: [NODE_PORT=9094] [EVAL_DATA=FILE] [STATE=FOLDER] [BACKPROPAGATION=yes|no] [SECURE_SUMS=allowed|required] [KEYS=FOLDER] [WARM=yes|no] supernode.sh CREDENTIALS SERVER:PORT NAME DATA.jsonl MODEL [flower-supernode options]" >&2
    exit 2
fi
credentials=$1 server=$2 name=$3 data=$4 model=$5
shift 5
source "$(dirname "$0")/environment.sh"
port=${NODE_PORT:-9094} isolation=subprocess
if [[ ${WARM:-yes} == yes ]]; then
    isolation=process
    to=(--runtime-api-address "127.0.0.1:$port" --parent-pid $$)
    {
        python -m fedkseed.flower.launcher "${to[@]}" || {
            echo "the node's launcher failed; Flower's own takes its place, and nothing stays in memory between messages" >&2
            exec flower-superexec --insecure "${to[@]}"
        }
    } &
fi
exec flower-supernode --superlink "$server" --root-certificates "$credentials/ca.crt" \
    --auth-supernode-private-key "$credentials/$name" --port "$port" --isolation "$isolation" \
    --node-config "name=\"$name\" data=\"$data\" model=\"$model\" eval-data=\"${EVAL_DATA:-}\" \
state=\"${STATE:-}\" backpropagation=\"${BACKPROPAGATION:-yes}\" secure-sums=\"${SECURE_SUMS:-allowed}\" \
key=\"${KEYS:+$credentials/$name}\" keys=\"${KEYS:-}\" dp=\"${DP:-}\" clip-norm=\"${CLIP_NORM:-}\" \
noise-multiplier=\"${NOISE_MULTIPLIER:-}\" epsilon=\"${EPSILON:-}\" delta=\"${DELTA:-}\"" "$@"
