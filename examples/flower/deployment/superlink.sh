#!/usr/bin/env bash
# The server: TLS, and no node without a registered key. Listens on this machine alone unless HOST says otherwise.
set -euo pipefail
if (($# < 1)); then
    echo "usage: [HOST=0.0.0.0] [PORT=8000] superlink.sh CREDENTIALS [flower-superlink options]" >&2
    exit 2
fi
credentials=$1
shift
source "$(dirname "$0")/environment.sh"
exec flower-superlink --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" --enable-supernode-auth \
    --ssl-ca-certfile "$credentials/ca.crt" --ssl-certfile "$credentials/server.crt" --ssl-keyfile "$credentials/server.key" "$@"
