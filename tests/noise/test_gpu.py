"""The GPU backend beyond the contract table: its machine code, its launches, and what is said where it cannot run.

The bits are held by the contract table (test_backend.py, test_pool.py, test_box_muller.py, models/test_binding.py), in Triton's
interpreter or on a GPU.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import laws
from tests.support.rows import families, kinds

import fedkseed as fk
from fedkseed.errors import BackendError
from fedkseed.noise import Slot, Source, get_backend, tensor_id

KEY = 0xFEDCBA9876543210
needs_triton = pytest.mark.skipif("gpu" not in laws.BACKENDS, reason="needs Triton")
TYPES = ("float32", "float16", "bfloat16")
ALL_PAIRS = [(out, base) for out in TYPES for base in (*TYPES, "none")]
PAIRS = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "none")]
ARCHITECTURES = (80, 90)
# each pair on one architecture and each architecture with half of them: the slow test has all pairs on all
EVERY_DAY = [(*pair, arch) for pair, arch in zip(PAIRS, itertools.cycle(ARCHITECTURES), strict=False)]
THREADS, WIDEST = 128, 16  # a program's threads; bytes per access

# --- machine code ---


def compiled(cache: Path, *variants: str) -> dict[str, dict]:
    """Facts about each variant; see gpu_machine_code.py."""
    script = Path(__file__).parents[1] / "support" / "gpu_machine_code.py"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(script), *variants]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


CONTROLS = {
    "fused": "gaussian,float32,float32,90,enable_fp_fusion=1",
    "starved": "gaussian,float32,float32,90,maxnreg=24",
    "unaligned": "hadamard,bfloat16,bfloat16,90,ALIGNED=0",
}
FOLDS = [f"fold-{kind},90" for kind in ("hadamard,float32,", "hadamard,bfloat16,", "gaussian,float32,")]
FOLDS += [f"{FOLDS[0]},SMALL=1", f"{FOLDS[1]},SMALL=1"]
SEVERAL = [f"{family},bfloat16,bfloat16,90,SEVERAL=1" for family in laws.FAMILIES]


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    variants = [f"{f},{out},{base},{arch}" for f in laws.FAMILIES for out, base, arch in EVERY_DAY]
    roots = [f"roots,,,{arch}" for arch in ARCHITECTURES]
    return compiled(tmp_path_factory.mktemp("triton"), *variants, *roots, *FOLDS, *SEVERAL, *CONTROLS.values())


def count(facts: dict, *names: str) -> int:
    """How many of these operations there are, whatever follows their names."""
    return sum(n for operation, n in facts["operations"].items() if operation.startswith(names))


def check_arithmetic(facts: dict, family: str, roots: dict) -> None:
    """No fused operation but a square root's own, no flushed subnormals."""
    assert facts["ptx_fma"] == facts["ptx_ftz"] == 0
    if family == "hadamard":
        assert count(facts, "FFMA", "FMUL") == 0
        assert count(facts, "FADD") <= 32  # one an element
    else:
        assert count(facts, "MUFU.RSQ") == count(roots, "MUFU.RSQ")  # as many roots, hence as many
        assert count(facts, "FFMA") == count(roots, "FFMA")
        assert count(facts, "FMUL.FTZ", "FADD.FTZ") == count(roots, "FMUL.FTZ", "FADD.FTZ")


def check_registers(facts: dict, aligned: bool = True) -> None:
    """Nothing is spilled to memory, and enough programs run at a time on a multiprocessor: four, or three where unaligned."""
    assert facts["stack"] == count(facts, "STL", "LDL") == 0
    assert facts["registers"] <= (128 if aligned else 168)


def wide_accesses(elements: int, kind: str) -> int:
    """Accesses of full width that a thread needs for its part of a tile."""
    return 0 if kind == "none" else elements * getattr(torch, kind).itemsize // THREADS // WIDEST


@needs_triton
@pytest.mark.parametrize(("out", "base", "arch"), EVERY_DAY)
@families
def test_machine_code_has_no_fused_operations_no_spills_and_accesses_of_full_width(machine_code, family, out, base, arch):
    facts, roots = machine_code[f"{family},{out},{base},{arch}"], machine_code[f"roots,,,{arch}"]
    check_arithmetic(facts, family, roots)
    check_registers(facts)
    elements = 4096 if family == "hadamard" else 2048
    table = wide_accesses(elements, "float32") if family == "hadamard" else 0
    assert count(facts, "LDG.E.128") == table
    assert count(facts, "LDG.E.EF.128") == wide_accesses(elements, base)  # evict first
    assert count(facts, "STG.E.128") == wide_accesses(elements, out)


def check_several(facts: dict) -> None:
    """Nothing is fused or spilled, and at least three programs run at a time on a multiprocessor."""
    assert facts["ptx_fma"] == facts["ptx_ftz"] == 0
    check_registers(facts, aligned=False)


@needs_triton
@pytest.mark.parametrize("variant", SEVERAL)
def test_machine_code_of_several_pages_has_no_spills_and_reads_and_writes_a_weight_once(machine_code, variant):
    facts, (family, out, base) = machine_code[variant], variant.split(",")[:3]
    check_several(facts)
    elements = 4096 if family == "hadamard" else 2048
    assert count(facts, "LDG.E.EF.128") == wide_accesses(elements, base)
    assert count(facts, "STG.E.128") == wide_accesses(elements, out)


@needs_triton
@pytest.mark.parametrize("variant", FOLDS)
def test_machine_code_of_folds_has_no_atomics_no_spills_and_reads_of_full_width(machine_code, variant):
    facts, (family, kind) = machine_code[variant], variant.removeprefix("fold-").split(",")[:2]
    assert facts["ptx_fma"] == facts["ptx_ftz"] == 0
    assert count(facts, "RED", "ATOM") == 0  # the order of the additions is fixed
    assert count(facts, "DADD") <= 32  # one an element of a tile, and one more where it joins the partial sums
    check_registers(facts)
    partial = wide_accesses(2048, "float64") if family == "hadamard" else 0
    assert count(facts, "LDG.E.128") == partial
    assert count(facts, "LDG.E.EF.128") == wide_accesses(2048, kind)
    assert count(facts, "STG.E.128") == partial


@needs_triton
def test_the_checks_of_machine_code_notice_what_they_look_for(machine_code):
    """Negative controls: fusion allowed, too few registers, tensors at any address."""
    roots = machine_code["roots,,,90"]
    fused = machine_code[CONTROLS["fused"]]
    assert count(fused, "FFMA") > 5 * count(roots, "FFMA")
    with pytest.raises(AssertionError):
        check_arithmetic(fused, "gaussian", roots)
    with pytest.raises(AssertionError):
        check_registers(machine_code[CONTROLS["starved"]])
    unaligned = machine_code[CONTROLS["unaligned"]]
    assert count(unaligned, "STG.E.128") == 0
    assert count(unaligned, "LDG.E.128") == wide_accesses(4096, "float32")  # the table's
    assert count(unaligned, "LDG.E.EF.128") == 0


@needs_triton
@pytest.mark.slow
@families
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_pair_of_types_compiles_without_fused_operations_and_spills(family, arch, tmp_path):
    variants = {f"{family},{o},{b},{arch},ALIGNED={aligned}": aligned for o, b in ALL_PAIRS for aligned in (0, 1)}
    several = [f"{variant},SEVERAL=1" for variant in variants]
    found = compiled(tmp_path, f"roots,,,{arch}", *variants, *several)
    for variant, aligned in variants.items():
        check_arithmetic(found[variant], family, found[f"roots,,,{arch}"])
        check_registers(found[variant], bool(aligned))
    for variant in several:
        check_several(found[variant])


# --- launches ---


@pytest.fixture
def gpu():
    if "gpu" not in laws.BACKENDS:
        pytest.skip("needs Triton")
    from fedkseed.noise import gpu

    return gpu


@pytest.fixture
def launches(gpu, monkeypatch):
    """Numbers of slots and of programs of each launch."""
    seen = []

    def recording(kernel):
        class Kernel:
            def __getitem__(self, grid):
                def launch(work, *arguments, **constants):
                    seen.append((len(work), grid[0]))
                    return kernel[grid](work, *arguments, **constants)

                return launch

        return Kernel()

    for name in ("hadamard_sweep", "gaussian_sweep", "hadamard_fold", "gaussian_fold"):
        monkeypatch.setattr(gpu.kernels, name, recording(getattr(gpu.kernels, name)))
    return seen


def mixture(family: str, size: int = 3):
    return fk.SeedPool(KEY, size, family).mixture_of(laws.some_coefficients(size, 1))


@families
def test_many_small_tensors_are_one_launch(gpu, launches, family):
    device = laws.device_of("gpu")
    sizes = [1, 5, 0, 128, 300, 1000] * 3
    tensors = {f"t{i}": laws.some_weights((n,), torch.bfloat16, i).to(device) for i, n in enumerate(sizes)}
    on_cpu = {name: x.cpu().clone() for name, x in tensors.items()}
    gpu.BACKEND.prepare([Slot(x, x, tensor_id(name)) for name, x in tensors.items()])(mixture(family))
    assert launches == [(15, 15)]
    get_backend("cpu").prepare([Slot(x, x, tensor_id(name)) for name, x in on_cpu.items()])(mixture(family))
    for name, x in tensors.items():
        np.testing.assert_array_equal(laws.bits(x), laws.bits(on_cpu[name]))


@families
def test_one_launch_for_each_pair_of_types(gpu, launches, family):
    pairs = [(torch.float32, torch.bfloat16), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.float32, None)]
    slots = []
    for i, (out, base) in enumerate(pairs):
        source = None if base is None else torch.ones(100, dtype=base, device=laws.device_of("gpu"))
        slots.append(Slot(torch.zeros(100, dtype=out, device=laws.device_of("gpu")), source, i))
    gpu.BACKEND.prepare(slots)(mixture(family))
    assert launches == [(2, 2), (1, 1), (1, 1)]


@families
@kinds
def test_tiles_as_small_as_a_gpus_give_the_same_bits(gpu, monkeypatch, family, kind):
    """The interpreter's are larger, since it takes its time for each program."""
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    weights = laws.some_weights((3 * 4096 + 1001,), kind, 1)
    model, right = laws.module_of({"w": weights}, backend="gpu"), laws.module_of({"w": weights})
    coefficients = laws.some_coefficients(300 if family == "hadamard" else 2, 2)
    pool = fk.SeedPool(KEY, len(coefficients), family)
    fk.bind(model, pool, backend="gpu").rebuild(coefficients)
    fk.bind(right, pool, backend="cpu").rebuild(coefficients)
    assert laws.all_bits(model) == laws.all_bits(right)


@families
def test_a_call_of_a_fold_is_one_launch_for_each_type(gpu, launches, family):
    device = laws.device_of("gpu")
    folded = [(100, torch.float32), (0, torch.float16), (5000, torch.float32), (300, torch.bfloat16)]
    sources = [Source(torch.ones(n, dtype=kind, device=device), i) for i, (n, kind) in enumerate(folded)]
    fold = gpu.BACKEND.fold(fk.SeedPool(KEY, 3, family).directions())
    fold.add(sources)
    columns = 1 if family == "hadamard" else 3
    assert launches == [(2, columns), (1, columns)]
    fold.add(sources[:1])
    assert launches[2:] == [(1, columns)]


@families
def test_lanes_share_the_steps_of_a_fold(gpu, monkeypatch, family):
    """More lanes than the few that a small tensor gets, and a GPU's own tiles: within the bound, and the same bits again."""
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "STEPS_PER_LANE", 1)
    pool, found = fk.SeedPool(KEY, 3, family), []
    sources = [Source(torch.randn(n, generator=torch.Generator().manual_seed(n)), i) for i, n in enumerate((9001, 5, 4097))]
    for backend in ("gpu", "gpu", "reference"):
        fold = get_backend(backend).fold(pool.directions())
        there = [Source(s.values.to(laws.device_of(backend)), s.tensor_id) for s in sources]
        fold.add(there)
        fold.add(there[1:])
        found.append(pool.numbers(fold.sums()))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=0, atol=1e-12 * 13000)


# --- the benchmark ---


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="make bench-gpu runs it in full")
def test_the_gpu_benchmark_runs_at_toy_sizes():
    """So that it works on the day that there is a GPU."""
    root = Path(__file__).parents[2]
    before = sorted((root / "benchmarks" / "results").iterdir())
    run = subprocess.run([sys.executable, "-m", "benchmarks", "gpu"], capture_output=True, text=True, cwd=root, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("bits equal the reference's; measured in ")
    assert sorted((root / "benchmarks" / "results").iterdir()) == before


# --- where it cannot run ---


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_backend_says_so_in_one_line():
    code = """
import torch, fedkseed as fk
from fedkseed.errors import BackendError
pool, model = fk.SeedPool(1, 4), torch.nn.Linear(2, 2)
before = model.weight.clone()
for call in (lambda: fk.bind(model, pool, backend="gpu"), lambda: pool.perturbation("w", 10, 1, backend="gpu")):
    try:
        call()
    except BackendError as error:
        print(error)
assert torch.equal(model.weight, before)
"""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    line = (
        "backend 'gpu' cannot run here (torch finds no CUDA device); "
        "it needs a CUDA GPU, a torch built for CUDA, and Triton: pip install -e '.[gpu]' in fedkseed's clone"
    )
    assert run.stdout.splitlines() == [line, line]


def test_without_triton_the_backend_says_what_to_install(monkeypatch):
    for module in ("fedkseed.noise.gpu", "fedkseed.noise.gpu_kernels"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    for call in (lambda: get_backend("gpu"), lambda: get_backend("auto", "cuda")):
        with pytest.raises(BackendError, match=r"backend 'gpu' cannot run here .*triton.*pip install -e '.\[gpu\]' in"):
            call()
