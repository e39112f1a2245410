"""A hub on this machine that speaks what `huggingface_hub` needs to push a folder of small files and to fetch it again."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_api

Files = dict[str, bytes]


class Hub:
    """Repositories by name, each a list of commits, the last one `main`; and what was asked."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, Files]]] = {}
        self.asked: list[str] = []

    def commit(self, repo: str, files: Files) -> str:
        known = self.commits[repo]
        whole = {**(known[-1][1] if known else {}), **files}
        name = hashlib.sha1(repr((len(known), sorted(whole.items()))).encode()).hexdigest()
        known.append((name, whole))
        return name

    def at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        known = self.commits.get(repo, [])
        return known[-1] if known and revision == "main" else next((one for one in known if one[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, value: Any, code: int = 200) -> None:
        self.answer(code, json.dumps(value).encode(), Content_Type="application/json")

    def not_found(self, what: str = "Repo") -> None:
        self.answer(404, b"{}", X_Error_Code=f"{what}NotFound", X_Error_Message=f"{what} not found")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"POST {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            given = json.loads(body)
            repo = f"{given['organization']}/{given['name']}"
            self.hub.commits.setdefault(repo, [])
            self.say({"url": f"http://{self.headers['Host']}/{repo}"})
        elif parts == ["api", "validate-yaml"]:
            self.say({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.say({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif parts[4] == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            given = [line["value"] for line in lines if line["key"] == "file"]
            files = {file["path"]: base64.b64decode(file["content"]) for file in given}
            repo = "/".join(parts[2:4])
            name = self.hub.commit(repo, files)
            self.say({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{name}", "commitOid": name, "success": True})

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        path, _, _ = self.path.partition("?")
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            found = self.hub.at("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            if found is None:
                return self.not_found()
            if parts[4:5] == ["tree"]:
                files = found[1].items()
                return self.say([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files])
            siblings = [{"rfilename": name, "size": len(data)} for name, data in found[1].items()]
            return self.say({"id": "/".join(parts[2:4]), "sha": found[0], "siblings": siblings})
        found = self.hub.at("/".join(parts[:2]), parts[3])
        if found is None or "/".join(parts[4:]) not in found[1]:
            return self.not_found("Repo" if found is None else "Entry")
        data = found[1]["/".join(parts[4:])]
        return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=found[0])

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def running(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that is the only one for this process, and an empty cache."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(hf_api.api, "endpoint", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
