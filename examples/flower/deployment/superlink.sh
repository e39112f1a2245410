#!/usr/bin/env bash
# The server: TLS, and no node without a registered key. It listens on this machine alone, since whoever reaches it can
# start a run; nodes elsewhere come in through gate.sh.
set -euo pipefail
if (($# < 1)); then
    echo "usage: [PORT=8000] superlink.sh CREDENTIALS [flower-superlink options]" >&2
    exit 2
fi
credentials=$1
shift
source "$(dirname "$0")/environment.sh"
exec flower-superlink --host 127.0.0.1 --port "${PORT:-8000}" --enable-supernode-auth \
    --ssl-ca-certfile "$credentials/ca.crt" --ssl-certfile "$credentials/server.crt" --ssl-keyfile "$credentials/server.key" "$@"
