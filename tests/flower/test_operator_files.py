"""What an operator is given: units that systemd accepts, and that start scripts which are there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.flower_deployment import SCRIPTS

UNITS = sorted((SCRIPTS / "systemd").iterdir())


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_a_script_of_the_example_as_a_user_of_its_own(unit: Path) -> None:
    text = unit.read_text()
    script = re.search(r"^ExecStart=/opt/app/deployment/(\S+)", text, re.M)
    assert script is not None
    assert (SCRIPTS / script[1]).exists()
    for line in ("User=fedkseed", "NoNewPrivileges=yes", "ProtectSystem=strict", "CapabilityBoundingSet="):
        assert f"\n{line}\n" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text().replace("/opt/app/deployment", str(SCRIPTS)).replace("User=fedkseed", "User=root")
        (tmp_path / unit.name.replace("@", "@site")).write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", *sorted(map(str, tmp_path.iterdir()))], capture_output=True, text=True, check=False
    )
    assert (found.returncode, [line for line in found.stderr.splitlines() if str(tmp_path) in line]) == (0, [])
