"""A real browser without a window, where the machine has one."""

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def page_after_scripts(address: str, profile: Path, milliseconds: int) -> str:
    """The HTML of a page once its scripts have run for so long by the browser's own clock; a skip where there is no browser."""
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    dump = [f"--virtual-time-budget={milliseconds}", "--dump-dom", address]
    done = subprocess.run([browser, *flags, *dump], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
