"""Lets nodes reach the SuperLink's Fleet API, and nothing else.

Flower 1.41 serves three interfaces on one port: Fleet (for nodes), Control (start a run, register a key) and Runtime (for
its own processes). Control asks for no password unless one sets up accounts, and whoever starts a run runs code on every
node. So the SuperLink listens on its own machine alone, and this is what listens to the world.

    fleet_gate.py CREDENTIALS LISTEN-HOST LISTEN-PORT SUPERLINK-PORT
"""

import re
import ssl
import sys
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

MAX_BODY = 4 << 20
"""No message of ours is larger than 1 MiB; a node cannot fill the server's memory."""
NOT_FORWARDED = {"host", "content-length", "connection", "transfer-encoding"}


def gate(superlink: str, authority: Path) -> Starlette:
    """An application that hands POST /v1/fleet/<call> on to a SuperLink, and answers 404 to all else."""
    client = httpx.AsyncClient(verify=ssl.create_default_context(cafile=authority), timeout=60)

    async def forward(request: Request) -> Response:
        call = request.path_params["call"]
        if not re.fullmatch("[a-z-]+", call):
            return Response(status_code=404)
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:
                return Response(status_code=413)
        headers = {name: value for name, value in request.headers.items() if name not in NOT_FORWARDED}
        try:
            reply = await client.post(f"{superlink}/v1/fleet/{call}", content=body, headers=headers)
        except httpx.TransportError:
            return Response(status_code=503)  # nodes try again
        kept = {n: v for n, v in reply.headers.items() if n not in NOT_FORWARDED | {"content-encoding"}}
        return Response(reply.content, reply.status_code, kept)

    return Starlette(routes=[Route("/v1/fleet/{call}", forward, methods=["POST"])])


def main() -> None:
    """Serve until ended."""
    if len(sys.argv) != 5:
        sys.exit("usage: fleet_gate.py CREDENTIALS LISTEN-HOST LISTEN-PORT SUPERLINK-PORT")
    credentials, host, port, superlink_port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    uvicorn.run(
        gate(f"https://127.0.0.1:{superlink_port}", credentials / "ca.crt"),
        host=host,
        port=port,
        ssl_certfile=credentials / "server.crt",
        ssl_keyfile=credentials / "server.key",
        log_level="warning",
    )


if __name__ == "__main__":
    main()
