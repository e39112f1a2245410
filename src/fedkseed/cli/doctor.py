"""`fedkseed doctor`: is this machine fit, and are its bits right?"""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from fedkseed.cli.console import say
from fedkseed.errors import BackendError, RunError
from fedkseed.noise import get_backend
from fedkseed.noise.backend import MODULES
from fedkseed.noise.pool import SeedPool
from fedkseed.text import one_line

EXPECTED = {
    "hadamard": "1eb09eb38c60b6dec7a10c8aa3dc0b2257e462b76f3518ebea9ff7bb886f2129",
    "gaussian": "c38e098e860ff5ce664659d5f78692012416fce0660b34e4c98f3250abd1a7b4",
}
"""SHA-256 of a combination of all seeds, float32 little-endian: the same on every machine."""


PACKAGES = ("fedkseed", "torch", "transformers", "numpy", "numba", "safetensors")


def noise_digest(family: str, backend: str) -> str:
    """SHA-256 of `sum_k a_k z_k` on 1,000 elements for one pool and fixed coefficients."""
    pool = SeedPool(0x0123456789ABCDEF, 64, family)
    coefficients = (np.arange(64, dtype=np.float32) - 31) * np.float32(0.001)
    return hashlib.sha256(pool.combine("model.norm.weight", 1000, coefficients, backend).astype("<f4").tobytes()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not here"


def doctor() -> None:
    """Print what is here, and check every noise backend against bits that were computed elsewhere.

    Raises:
        RunError: a backend computes other bits, or torch is not here.
    """
    say(f"python {platform.python_version()} on {platform.platform()}")
    say(", ".join(f"{package} {_version(package)}" for package in PACKAGES))
    try:
        import torch
    except ImportError as error:
        raise RunError(
            f"torch is not here, or does not load ({one_line(error)}); nothing else runs without it: pip install torch"
        ) from error

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"threads: {torch.get_num_threads()}; CUDA devices: {', '.join(gpus) or 'none'}")
    wrong = []
    for name in MODULES:
        try:
            get_backend(name)
        except BackendError as error:
            say(f"noise backend {name}: not here ({error})")
            continue
        for family, expected in EXPECTED.items():
            right = noise_digest(family, name) == expected
            say(f"noise backend {name}, {family}: {'bits are right' if right else 'BITS ARE WRONG'}")
            wrong += [] if right else [f"{name}/{family}"]
    if wrong:
        raise RunError(f"{', '.join(wrong)} compute other bits than every other machine; do not train here, report it")
    say("all is well")
