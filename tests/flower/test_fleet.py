"""A fleet on one machine: twenty nodes, and two hundred rounds of nodes that come and go."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from tests.support import flower_deployment
from tests.support.flower_deployment import Deployment
from tests.support.flower_sites import RUN, simulated
from tests.support.runs import read_metrics
from tests.support.tiny import tiny_model, tiny_records

from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.audit import audit

pytestmark = pytest.mark.slow
EARLY, ROUNDS = 40, 200


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_threads: None) -> Iterator[Deployment]:
    torch.set_num_threads(1)  # as the processes have it
    monkeypatch.setattr(flower_deployment, "PATIENCE", 1800.0)
    with Deployment(tmp_path / "deployment") as made:
        yield made


def sites(folder: Path, count: int) -> list[str]:
    """A model, a file of six records for each site, all of them in one file with the sites' names, and held-out ones."""
    tiny_model(folder / "model")
    lines = tiny_records(folder / "all.jsonl", 6 * count + 6).read_text().splitlines()
    names = [f"site-{i:02}" for i in range(count)]
    (folder / "held-out.jsonl").write_text("".join(line + "\n" for line in lines[-6:]))
    with (folder / "joint.jsonl").open("w") as joint:
        for i, name in enumerate(names):
            own = lines[6 * i : 6 * i + 6]
            (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in own))
            joint.writelines(json.dumps({**json.loads(line), "client": name}) + "\n" for line in own)
    return names


def bring_up(fleet: Deployment, folder: Path, names: list[str], **config: object) -> Callable[[str], None]:
    fleet.make_credentials(*names)
    fleet.start_superlink()
    fleet.start_gate()
    fleet.register(*names)

    def start(name: str) -> None:
        fleet.start_node(name, folder / f"{name}.jsonl", folder / "model")

    for name in names:
        start(name)
    files = {"run": fleet.run, "model": folder / "model", "eval-data": folder / "held-out.jsonl"}
    fleet.submit({**RUN, "algorithm": "fedkseed", "schedule": "constant", "deadline": 600.0, **files, **config})
    return start


def test_twenty_nodes_end_in_the_ledger_of_a_simulation(fleet: Deployment, tmp_path: Path) -> None:
    names = sites(tmp_path, 20)
    bring_up(fleet, tmp_path, names, **{"min-clients": 20, "min-replies": 20, "num-rounds": 3})
    fleet.wait_for_round(3)
    expected = simulated(tmp_path, tmp_path / "simulated", min_replies=20, num_rounds=3).train()
    assert Ledger.load(fleet.run / "ledger.safetensors").digest() == expected.digest()
    rounds = [event for event in read_metrics(fleet.run) if event["event"] == "round"]
    assert [len(event["clients"]) for event in rounds] == [20] * 3
    print("seconds of the rounds:", [round(event["seconds"], 1) for event in rounds])


KINDS = ("worker", "launcher", "supernode", "superlink", "serverapp", "gate")


def held(fleet: Deployment) -> dict[str, tuple[float, int]]:
    """What each process that lives as long as the run holds: MiB of its own, and open files."""
    found = {}
    for name, process in fleet.processes.items():
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # a launcher's fork ends with its message
                words = " ".join(one.cmdline())
                held_now = one.memory_full_info().uss / 2**20, one.num_fds()
                kind = next((kind for kind in KINDS if kind in words), None)
                if kind:
                    mib, files = found.get(f"{name}: {kind}", (0.0, 0))
                    found[f"{name}: {kind}"] = max(mib, held_now[0]), max(files, held_now[1])
    return found


def test_two_hundred_rounds_of_nodes_that_come_and_go_leak_nothing(fleet: Deployment, tmp_path: Path) -> None:
    names = sites(tmp_path, 4)
    settings = {"min-clients": 2, "min-replies": 1, "num-rounds": ROUNDS, "eval-every": 50, "deadline": 30.0, "audit-log": "on"}
    start = bring_up(fleet, tmp_path, names, **settings)
    fleet.wait_for_round(EARLY)
    early = held(fleet)
    for done in range(EARLY, ROUNDS, 40):  # the last node goes and comes back; the others stay
        fleet.wait_for_round(done)
        fleet.end(names[-1])
        fleet.wait_for_round(done + 5)
        start(names[-1])
    fleet.wait_for_round(ROUNDS - 1)
    late = held(fleet)
    for kind, (mib, files) in early.items():
        if kind in late:
            print(f"{kind}: {mib:.0f} MiB, {files} files after {EARLY} rounds; {late[kind][0]:.0f}, {late[kind][1]} at the end")
            assert late[kind][0] < 1.2 * mib + 16, kind
            assert late[kind][1] <= files + 8, kind
    fleet.wait_for_round(ROUNDS)
    rounds = [event for event in read_metrics(fleet.run) if event["event"] == "round"]
    assert max(event["seconds"] for event in rounds) < 2 * settings["deadline"]  # type: ignore[operator]
    found = audit(fleet.run)  # the same replies through a server of this process
    assert found.ledger.digest() == Ledger.load(fleet.run / "ledger.safetensors").digest()
    assert set(found.rounds) == set(names)
