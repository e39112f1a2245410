"""The real thing: a SuperLink with TLS and authenticated SuperNodes, brought up on loopback by the example's scripts."""

import contextlib
import json
import os
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from tests.support.flower_deployment import EXAMPLE, Deployment, answers, free_port
from tests.support.flower_sites import CORRUPTIONS, RUN, SITES, simulated
from tests.support.runs import read_metrics

from fedkseed.kseed.ledger import Ledger

LONG = {"deadline": 240.0}


@pytest.fixture
def one_thread(torch_threads: None) -> None:
    """As the processes have it."""
    torch.set_num_threads(1)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "deployment") as made:
        yield made
        started = list(made.processes.values())
    assert all(process.returncode is not None for process in started)


def settings(deployment: Deployment, sites: Path, **changes: Any) -> dict[str, Any]:
    files = {"run": deployment.run, "model": sites / "model", "eval-data": sites / "held-out.jsonl"}
    app = {"algorithm": "fedkseed", "schedule": "constant"}  # the example's own are others
    return {**RUN, **LONG, **app, **files, **{key.replace("_", "-"): value for key, value in changes.items()}}


def bring_up(
    deployment: Deployment,
    sites: Path,
    names: tuple[str, ...] = SITES,
    options: tuple[str, ...] = (),
    registered: tuple[str, ...] = SITES,
) -> None:
    deployment.make_credentials(*registered)
    deployment.start_superlink(*options)
    deployment.start_gate()
    deployment.register(*registered)
    for name in names:
        deployment.start_node(name, sites / f"{name}.jsonl", sites / "model")


def rounds(deployment: Deployment) -> list[dict[str, Any]]:
    return [event for event in read_metrics(deployment.run) if event["event"] == "round"]


def test_authenticated_nodes_end_in_the_ledger_of_a_simulation(
    deployment: Deployment, sites: Path, tmp_path: Path, one_thread: None
) -> None:
    """Two of them; three are among the slow ones. What they have loaded for the first round they have in the second."""
    bring_up(deployment, sites, SITES[:2], registered=SITES[:2])
    deployment.submit(settings(deployment, sites, num_rounds=2, min_clients=2))
    deployment.wait_for_round(2)
    lines = (sites / "joint.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(line for line in lines if json.loads(line)["client"] in SITES[:2]))
    expected = simulated(sites, tmp_path / "simulated", num_rounds=2, data=tmp_path / "two.jsonl").train()
    assert Ledger.load(deployment.run / "ledger.safetensors").digest() == expected.digest()
    assert [sorted(event["clients"]) for event in rounds(deployment)] == [list(SITES[:2])] * 2
    for name in SITES[:2]:
        assert "round 2, 6 steps in" in deployment.log(name)
        assert "after 0.00 s of loading" in deployment.log(name)


def test_the_gate_lets_through_the_fleet_and_nothing_else(deployment: Deployment) -> None:
    """Who reaches the SuperLink itself can list runs, and start one."""
    deployment.make_credentials("site-a")
    deployment.start_superlink()
    deployment.start_gate()
    verify = ssl.create_default_context(cafile=deployment.credentials / "ca.crt")
    inside, outside = (f"https://127.0.0.1:{port}" for port in (deployment.port, deployment.gate_port))
    with httpx.Client(verify=verify) as client:
        call = {"content": b"", "headers": {"content-type": "application/protobuf"}}
        for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/v1/fleet/..%2fcontrol"):
            assert client.post(outside + path, **call).status_code == 404  # type: ignore[arg-type]
        assert client.post(inside + "/v1/control/list-runs", **call).status_code != 404  # type: ignore[arg-type]
        assert client.post(outside + "/v1/fleet/get-run", **call).status_code == 401  # type: ignore[arg-type]
        assert client.post(outside + "/v1/fleet/push-object", content=bytes(5 << 20)).status_code == 413
        assert client.get(outside + "/v1/fleet/get-run").status_code == 405
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(outside + "/v1/fleet/get-run")


@pytest.mark.slow
def test_a_node_killed_in_a_round_and_another_that_starts_late(deployment: Deployment, sites: Path) -> None:
    """site-b dies while it trains: the round closes without it. site-c comes then, and is asked from the next round on."""
    bring_up(deployment, sites, ("site-a", "site-b"))
    deployment.submit(settings(deployment, sites, num_rounds=4, min_clients=2, min_replies=1, deadline=60.0))
    deployment.wait(lambda: deployment.log("site-b").count("train message") >= 1, "site-b's first request")
    deployment.end("site-b")
    deployment.start_node("site-c", sites / "site-c.jsonl", sites / "model")
    deployment.wait_for_round(4)
    asked = [(sorted(event["clients"]), event["missing"] + sorted(event["refused"])) for event in rounds(deployment)]
    assert asked[0] == (["site-a"], ["site-b"])
    assert asked[-1] == (["site-a", "site-c"], [])


def of_a_node(deployment: Deployment, name: str, module: str) -> list[psutil.Process]:
    """Those of a node's processes that run a module of ours."""
    family = psutil.Process(deployment.processes[name].pid).children(recursive=True)
    return [process for process in family if module in " ".join(process.cmdline())]


@pytest.mark.slow
def test_a_node_goes_on_when_its_worker_or_its_launcher_is_killed(
    deployment: Deployment, sites: Path, tmp_path: Path, one_thread: None
) -> None:
    """Another worker takes the worker's place, and Flower's own launcher, which starts a process for each message, ours."""
    bring_up(deployment, sites, ())
    for name, warm in zip(SITES, ("yes", "yes", "no"), strict=True):
        deployment.start_node(name, sites / f"{name}.jsonl", sites / "model", WARM=warm)
    deployment.submit(settings(deployment, sites, num_rounds=4))
    deployment.wait_for_round(1)
    for process in of_a_node(deployment, "site-a", "fedkseed.flower.worker"):
        process.kill()
    for process in of_a_node(deployment, "site-b", "fedkseed.flower.launcher"):
        process.kill()
    deployment.wait_for_round(4)
    assert list(rounds(deployment)[-1]["clients"]) == list(SITES)
    assert "another one starts" in deployment.log("site-a")
    assert "after 0.00 s of loading" in deployment.log("site-a")
    assert "Flower's own takes its place" in deployment.log("site-b")
    assert "after 0.00 s of loading" not in deployment.log("site-c")


@pytest.mark.slow
def test_nodes_keep_their_pages_from_process_to_process(
    deployment: Deployment, sites: Path, tmp_path: Path, one_thread: None
) -> None:
    changes = {"algorithm": "fedkseed-grad", "num_seeds": 128, "rounds_per_page": 1, "num_rounds": 3, "local_steps": 2}
    bring_up(deployment, sites, ())
    for name in SITES:
        deployment.start_node(name, sites / f"{name}.jsonl", sites / "model", STATE=str(tmp_path / name))
    deployment.submit(settings(deployment, sites, **changes))
    deployment.wait_for_round(3)
    expected = simulated(sites, tmp_path / "simulated", **changes).train()
    assert Ledger.load(deployment.run / "ledger.safetensors").digest() == expected.digest()
    for name in SITES:
        (path,) = (tmp_path / name).glob("*.safetensors")
        assert [len(page.parts) for page in Ledger.load(path).pages] == [1, 1, 0]
        assert "asking for all" not in deployment.log(name)


@pytest.mark.slow
def test_secure_sums_end_in_the_ledger_of_a_simulation(
    deployment: Deployment, sites: Path, tmp_path: Path, one_thread: None
) -> None:
    """What a node keeps from phase to phase is in its SuperNode; its node key signs for it."""
    bring_up(deployment, sites, ())
    for name in SITES:
        own = {"SECURE_SUMS": "required", "KEYS": str(deployment.credentials)}
        deployment.start_node(name, sites / f"{name}.jsonl", sites / "model", **own)
    deployment.submit(settings(deployment, sites, num_rounds=2, secure_sums="on"))
    deployment.wait_for_round(2)
    expected = simulated(sites, tmp_path / "simulated", num_rounds=2, secure_sums="on").train()
    assert Ledger.load(deployment.run / "ledger.safetensors").digest() == expected.digest()
    assert [(event["refused"], event["missing"]) for event in rounds(deployment)] == [({}, [])] * 2


@pytest.mark.slow
def test_a_node_without_a_registered_key_is_turned_away(deployment: Deployment, sites: Path) -> None:
    deployment.make_credentials(*SITES, "stranger")
    deployment.start_superlink()
    deployment.start_gate()
    deployment.register("site-a")
    deployment.start_node("stranger", sites / "site-a.jsonl", sites / "model")
    deployment.start_node("site-a", sites / "site-a.jsonl", sites / "model")
    deployment.submit(settings(deployment, sites, num_rounds=1, min_clients=1, min_replies=1))
    deployment.wait_for_round(1)
    assert list(rounds(deployment)[0]["clients"]) == ["site-a"]
    assert "SuperNode ID" not in deployment.log("stranger")
    assert "SuperNode ID" in deployment.log("site-a")


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_server_goes_on_to_the_digest_of_an_uninterrupted_run(
    deployment: Deployment, sites: Path, tmp_path: Path, one_thread: None, moment: int
) -> None:
    """The nodes stay up and come back to the new SuperLink; its keys are in the database, or are registered again."""
    database = ("--database", str(tmp_path / "state.db")) if moment == 1 else ()
    bring_up(deployment, sites, options=database)
    deployment.submit(settings(deployment, sites))
    deployment.wait_for_round(moment)
    deployment.end("superlink")
    assert deployment.round() < 3
    deployment.start_superlink(*database)
    if not database:
        deployment.register(*SITES)
        for name in SITES:  # a node that the new SuperLink does not know has to start again
            deployment.end(name)
            deployment.start_node(name, sites / f"{name}.jsonl", sites / "model")
    deployment.submit(settings(deployment, sites))
    deployment.wait_for_round(3)
    expected = simulated(sites, tmp_path / "simulated").train()
    assert Ledger.load(deployment.run / "ledger.safetensors").digest() == expected.digest()


HOSTILE = '''
"""An app whose site-b and site-c answer each round with two more of the corruptions in tests/support/flower_sites.py."""
import sys
sys.path[:0] = [{root!r}]
from fedkseed.flower import client_app
from fedkseed.flower.envelope import unwrap
from tests.support.flower_sites import CORRUPTIONS

app = client_app()
honest = app._registered_funcs["train.default"]


def train(message, context):
    reply = honest(message, context)
    place = ["site-b", "site-c", "site-a"].index(context.node_config["name"])
    if place == 2:
        return reply
    corruptions = list(CORRUPTIONS.values())
    make = corruptions[(2 * int(message.metadata.group_id) - 2 + place) % len(corruptions)][0]
    return make(message, unwrap(reply))


app._registered_funcs["train.default"] = train
'''


@pytest.mark.slow
def test_hostile_nodes_cost_a_round_nothing_but_their_replies(deployment: Deployment, sites: Path, tmp_path: Path) -> None:
    app = tmp_path / "hostile"
    app.mkdir()
    for name in ("pyproject.toml", "server_app.py"):
        (app / name).write_text((EXAMPLE / name).read_text())
    (app / "client_app.py").write_text(HOSTILE.format(root=str(Path(__file__).parents[2])))
    deployment.app = app
    bring_up(deployment, sites)
    reasons = [reason for _, reason in CORRUPTIONS.values()]
    count = (len(reasons) + 1) // 2
    deployment.submit(settings(deployment, sites, num_rounds=count, min_replies=1))
    for done in range(1, count + 1):
        deployment.wait_for_round(done)
    for i, event in enumerate(rounds(deployment)):
        assert list(event["clients"]) == ["site-a"]
        for place, name in enumerate(("site-b", "site-c")):
            assert reasons[(2 * i + place) % len(reasons)] in event["refused"][name]


@pytest.mark.slow
def test_flwr_run_on_the_simulation_engine(sites: Path, tmp_path: Path, one_thread: None) -> None:
    """`flwr run` starts a local SuperLink, which stays up: it is found by its Flower home and ended here."""
    pytest.importorskip("ray", reason="the simulation engine needs ray: pip install -e '.[flower]'")
    home = tmp_path / "home"
    deployment = Deployment(tmp_path / "deployment")
    environment = {**deployment.environment("unused"), "FLWR_HOME": str(home), "RAY_TMPDIR": "/tmp"}
    port = free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "own"\n[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    deployment.port = port
    with (tmp_path / "log").open("wb") as log:
        deployment.processes["superlink"] = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=tmp_path
        )
    try:
        deployment.wait(lambda: answers(port), "the SuperLink")
        changes = {"data": sites / "joint.jsonl", "num-clients": 3, "partition": "client", "num-rounds": 2}
        texts = {**settings(deployment, sites), **changes}
        config = " ".join(f"{k}={v!r}" if isinstance(v, (int, float)) else f'{k}="{v}"' for k, v in texts.items())
        federation = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
        done = subprocess.run(
            ["flwr", "run", str(EXAMPLE), "--run-config", config, "--federation-config", federation],
            env=environment,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        deployment.wait_for_round(2)
        expected = simulated(sites, tmp_path / "simulated", num_rounds=2).train()
        assert Ledger.load(deployment.run / "ledger.safetensors").digest() == expected.digest()
    finally:
        family = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("FLWR_HOME") == str(home)]
        deployment.close()
        for process in family:  # Ray's daemons leave the process group
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
