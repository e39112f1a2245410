"""The peak of a process's memory: in bytes, of this process alone, and it never falls."""

import json
import os
import subprocess
import sys


def test_the_peak_is_in_bytes_and_grows_by_what_is_allocated() -> None:
    """In a process of its own: this one may have held more before than it holds now."""
    # a parent that holds much hands nothing of it on, as Linux's ru_maxrss would
    parent = (
        "import subprocess, sys\n"
        "held = b'x' * 1_000_000_000\n"
        "done = subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True, check=True)\n"
        "print(done.stdout)\n"
    )
    code = (
        "import json, numpy as np\n"
        "from fedkseed.runs.memory import peak_memory\n"
        "found = [peak_memory('cpu')]\n"
        "held = np.ones(200_000_000, np.uint8)\n"
        "found.append(peak_memory('cpu'))\n"
        "del held\n"
        "found.append(peak_memory('cpu'))\n"
        "print(json.dumps(found))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", parent, code], capture_output=True, text=True, check=True, env=environment)
    before, holding, after = json.loads(done.stdout)
    assert 10_000_000 < before < 900_000_000  # a Python with torch; in kilobytes it would be less, with the parent's more
    assert 150_000_000 < holding - before < 300_000_000
    assert after > holding - 20_000_000  # the kernel counts pages by batches


def test_what_is_freed_is_given_back() -> None:
    """Blocks of 20 MiB, which glibc keeps once it has seen one freed; the control is a process that does not ask."""
    code = (
        "import os, torch\n"
        "from fedkseed.runs.memory import give_back_at_once\n"
        "asks = os.fork() == 0\n"
        "if asks:\n"
        "    give_back_at_once()\n"
        "else:\n"
        "    os.wait()\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "torch.ones(5 << 20)\n"
        "before, held = resident(), [torch.ones(5 << 20) for _ in range(4)]\n"
        "last = torch.ones(1 << 10)\n"  # which keeps the heap from shrinking
        "del held\n"
        "print(resident() - before, flush=True)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    asked, unasked = map(int, done.stdout.split())
    assert unasked > 40 << 20
    assert asked < 10 << 20
