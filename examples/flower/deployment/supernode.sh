#!/usr/bin/env bash
# A node: its name, its records, its copy of the base model. NODE_PORT is for its own processes; two nodes on one machine
# need different ones. EVAL_DATA, STATE and BACKPROPAGATION are optional (docs/deploy.md).
set -euo pipefail
if (($# < 5)); then
    echo "usage: [NODE_PORT=9094] [EVAL_DATA=FILE] [STATE=FOLDER] [BACKPROPAGATION=yes|no] supernode.sh CREDENTIALS SERVER:PORT NAME DATA.jsonl MODEL [flower-supernode options]" >&2
    exit 2
fi
credentials=$1 server=$2 name=$3 data=$4 model=$5
shift 5
source "$(dirname "$0")/environment.sh"
exec flower-supernode --superlink "$server" --root-certificates "$credentials/ca.crt" \
    --auth-supernode-private-key "$credentials/$name" --port "${NODE_PORT:-9094}" \
    --node-config "name=\"$name\" data=\"$data\" model=\"$model\" eval-data=\"${EVAL_DATA:-}\" \
state=\"${STATE:-}\" backpropagation=\"${BACKPROPAGATION:-yes}\"" "$@"
