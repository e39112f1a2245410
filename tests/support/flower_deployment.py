"""Flower's own processes on loopback, through the scripts of examples/flower/deployment; `close` ends every one of them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from fedkseed.kseed.ledger import Ledger

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower"
SCRIPTS = EXAMPLE / "deployment"
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "PYTHONDONTWRITEBYTECODE": "",  # a process starts for each message: without bytecode each compiles torch anew
}
PATIENCE = 300.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Deployment:
    """A SuperLink with TLS and node authentication behind its gate, and its nodes, each with a Flower home of its own.

    Args:
        folder: for credentials, logs, homes and the run.
        app: the app that nodes and server run.
    """

    def __init__(self, folder: Path, app: Path = EXAMPLE) -> None:
        self.folder, self.app, self.run = folder, app, folder / "run"
        self.credentials = folder / "credentials"
        self.port, self.gate_port = free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "log").mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def environment(self, home: str, **more: str) -> dict[str, str]:
        path = self.folder / "home" / home
        if not path.exists():
            path.mkdir(parents=True)
            (path / "config.toml").write_text(
                f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
                f'root-certificates = "{self.credentials / "ca.crt"}"\n'
            )
        return {**ENVIRONMENT, "FLWR_HOME": str(path), **more}

    def make_credentials(self, *names: str) -> None:
        command = [SCRIPTS / "make-credentials.sh", self.credentials, "127.0.0.1", *names]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def start(self, name: str, command: list[str | Path], **more: str) -> None:
        """A process group of its own, so that it ends with all that it has started."""
        with (self.folder / "log" / name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment(name, **more), start_new_session=True, cwd=self.folder
            )

    def start_superlink(self, *options: str) -> None:
        self.start("superlink", [SCRIPTS / "superlink.sh", self.credentials, *options], PORT=str(self.port))
        self.wait(lambda: answers(self.port), "the SuperLink's port")

    def start_gate(self) -> None:
        ports = {"HOST": "127.0.0.1", "GATE_PORT": str(self.gate_port), "PORT": str(self.port)}
        self.start("gate", [SCRIPTS / "gate.sh", self.credentials], **ports)
        self.wait(lambda: answers(self.gate_port), "the gate's port")

    def register(self, *names: str) -> None:
        command = ["flwr", "supernode", "register"]
        registering = [
            subprocess.Popen(
                [*command, str(self.credentials / f"{name}.pub"), "here", "--name", name],
                env=self.environment("operator"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for name in names
        ]
        for process in registering:
            out = process.communicate(timeout=PATIENCE)[0]
            assert process.returncode == 0, out

    def start_node(self, name: str, data: Path, model: Path, key: str | None = None, **more: str) -> None:
        address = f"127.0.0.1:{self.gate_port}"
        command = [SCRIPTS / "supernode.sh", self.credentials, address, key or name, data, model]
        self.start(name, command, NODE_PORT=str(free_port()), **more)

    def submit(self, config: dict[str, Any]) -> None:
        texts = [f"{key}={value!r}" if isinstance(value, (int, float)) else f'{key}="{value}"' for key, value in config.items()]
        command = ["flwr", "run", str(self.app), "here", "--run-config", " ".join(texts)]
        done = subprocess.run(command, env=self.environment("operator"), capture_output=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def end(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        process = self.processes.pop(name)
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=20)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for name in list(self.processes):
            self.end(name)

    def log(self, name: str) -> str:
        return (self.folder / "log" / name).read_text(errors="replace")

    def round(self) -> int:
        path = self.run / "ledger.safetensors"
        return Ledger.load(path).round if path.exists() else 0

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():
            if time.monotonic() > end:
                tails = [f"== {path.name}\n{self.log(path.name)[-3000:]}" for path in (self.folder / "log").iterdir()]
                raise AssertionError("\n".join([f"waited in vain for {what}", *tails]))
            time.sleep(0.2)

    def wait_for_round(self, number: int) -> None:
        self.wait(lambda: self.round() >= number, f"round {number}")
