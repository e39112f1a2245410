#!/usr/bin/env bash
# Test credentials: a certificate authority, the SuperLink's certificate, and a key pair for each node.
# In earnest, take the certificate from your own authority and let each site make its own key: only site.pub travels.
set -euo pipefail
if (($# < 2)); then
    echo "usage: make-credentials.sh FOLDER SERVER-ADDRESS [NODE-NAME...]" >&2
    exit 2
fi
folder=$1 server=$2
shift 2
if [[ $server == */* || $server =~ ^[^:]*:[0-9]*$ ]]; then
    echo "make-credentials.sh: $server is no name or address; give that of the server alone, without a port" >&2
    exit 2
fi
umask 077
mkdir -p "$folder"
cd "$folder"
if [[ $server =~ ^[0-9.]+$ || $server == *:* ]]; then address="IP:$server"; else address="DNS:$server"; fi
log=$(mktemp)
trap 'status=$?; ((status == 0)) || cat "$log" >&2; rm -f "$log"' EXIT
if [[ ! -e ca.crt ]]; then
    rm -f server.crt # which another authority has signed
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -days 365 -subj "/CN=fedkseed test authority" \
        -keyout ca.key -out new.crt 2>"$log"
    mv new.crt ca.crt
fi
if [[ ! -e server.crt ]]; then
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj "/CN=fedkseed SuperLink" \
        -keyout server.key -out server.csr 2>"$log"
    printf 'subjectAltName=DNS:localhost,IP:127.0.0.1,%s\n' "$address" >server.ext
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -extfile server.ext \
        -out new.crt 2>"$log"
    mv new.crt server.crt
    rm server.csr server.ext
fi
for name in "$@"; do
    [[ -e $name ]] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "$name" -f "$name"
done
echo "$folder: ca.crt (for every node and for flwr), server.crt, server.key, and for each node its key and key.pub"
