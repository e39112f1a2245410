#!/usr/bin/env bash
# What listens to the world: nodes reach the SuperLink through it, and nobody reaches anything else.
set -euo pipefail
if (($# != 1)); then
    echo "usage: [HOST=0.0.0.0] [GATE_PORT=8443] [PORT=8000] gate.sh CREDENTIALS" >&2
    exit 2
fi
exec python "$(dirname "$0")/fleet_gate.py" "$1" "${HOST:-0.0.0.0}" "${GATE_PORT:-8443}" "${PORT:-8000}"
