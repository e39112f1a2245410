"""`fedkseed doctor`: right bits and wrong ones are told, by the oracle's own digests."""

import numpy as np
import pytest
from tests.support import laws
from tests.support.command_line import CommandLine


def test_doctor_finds_the_bits_right(fedkseed: CommandLine) -> None:
    result = fedkseed("doctor")
    assert (result.code, result.stderr) == (0, "")
    for backend in laws.BACKENDS:
        for family in ("hadamard", "gaussian"):
            assert f"noise backend {backend}, {family}: bits are right" in result.stdout
    assert result.stdout.endswith("all is well\n")


def test_doctor_finds_wrong_bits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fedkseed.cli import doctor
    from fedkseed.errors import RunError

    monkeypatch.setitem(doctor.EXPECTED, "gaussian", "0" * 64)
    with pytest.raises(RunError, match=r"reference/gaussian, cpu/gaussian.* compute other bits"):
        doctor.doctor()
    assert "reference, gaussian: BITS ARE WRONG" in capsys.readouterr().out


def test_the_doctors_expectation_is_the_oracles() -> None:
    from fedkseed.cli.doctor import EXPECTED

    a = (np.arange(64, dtype=np.float32) - 31) * np.float32(0.001)
    for family in laws.FAMILIES:
        assert laws.sha256(laws.noise_sum(family, 0x0123456789ABCDEF, "model.norm.weight", 1000, a)) == EXPECTED[family]
