"""What the GPU kernels become for a processor that need not be there: `python gpu_machine_code.py VARIANT ...` prints JSON.

A process of its own, because Triton's interpreter, in which the tests run, is chosen when Triton is imported. A variant is
family,out,base,arch[,name=value ...]; further names are compile options, ALIGNED=0, or SEVERAL=1 for several pages. A fold is
fold-family,base,,arch, for a table as large as its tile or larger, or, with SMALL=1, smaller.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fedkseed.noise import gpu_kernels as kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16, "none": None}
TILES = {"hadamard": kernels.HADAMARD_TILE, "gaussian": kernels.GAUSSIAN_TILE}
SWEEPS = {"hadamard": kernels.hadamard_sweep, "gaussian": kernels.gaussian_sweep}


@triton.jit
def roots(x, TILE: tl.constexpr):
    """Square roots and nothing else: the machine code of a correctly rounded one has fused operations of its own."""
    at = x + tl.arange(0, TILE)
    tl.store(at, tl.sqrt_rn(tl.load(at)))


FOLDS = {
    "fold-hadamard": (kernels.hadamard_fold, kernels.FOLD_TILE, {"key_low": "i32", "key_high": "i32", "block_bits": "i32"}),
    "fold-gaussian": (kernels.gaussian_fold, kernels.GAUSSIAN_TILE, {"seeds": "*i64"}),
}


def source(family: str, out: str, base: str, aligned: bool, small: bool, several: bool) -> ASTSource:
    if family in FOLDS:
        kernel, tile, directions = FOLDS[family]
        constants = {"KIND": TYPES[out], "ALIGNED": aligned, "TILE": tile}
        if family == "fold-hadamard":
            constants["SMALL"] = small
        counts = {"rows": "i32", "steps": "i32", "lanes": "i32"}
        signature = {"work": "*i64", **counts, "partial": "*fp64", **directions, **dict.fromkeys(constants, "constexpr")}
    elif family == "roots":
        signature, constants, kernel = {"x": "*fp32", "TILE": "constexpr"}, {"TILE": kernels.GAUSSIAN_TILE // 2}, roots
    else:
        kernel = SWEEPS[family]
        constants = {"OUT": TYPES[out], "BASE": TYPES[base], "ALIGNED": aligned, "SEVERAL": several, "TILE": TILES[family]}
        arguments = {"work": "*i64", "rows": "*i32", "mixtures": "*i64", "pages": "i32"}
        signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    return ASTSource(kernel, signature, constants, attributes)


def facts(variant: str) -> dict[str, object]:
    family, out, base, arch, *rest = variant.split(",")
    options = {name: int(value) for name, value in (option.split("=") for option in rest)}
    aligned, small = bool(options.pop("ALIGNED", 1)), bool(options.pop("SMALL", 0))
    several = bool(options.pop("SEVERAL", 0))
    options = {**kernels.OPTIONS, **options, "enable_fp_fusion": bool(options.get("enable_fp_fusion", 0))}
    compiled = triton.compile(
        source(family, out, base, aligned, small, several), target=GPUTarget("cuda", int(arch), 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        resources = subprocess.run(usage, capture_output=True, text=True, check=True).stdout
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?PT?\w*\s+)?([A-Z][A-Z0-9_.]+)", code, re.M)
    return {
        "operations": collections.Counter(operations),
        "registers": int(re.search(r"REG:(\d+)", resources)[1]),
        "stack": int(re.search(r"STACK:(\d+)", resources)[1]) + int(re.search(r"LOCAL:(\d+)", resources)[1]),
        "ptx_fma": len(re.findall(r"\bfma\.", compiled.asm["ptx"])),
        "ptx_ftz": compiled.asm["ptx"].count(".ftz"),
    }


if __name__ == "__main__":
    print(json.dumps({variant: facts(variant) for variant in sys.argv[1:]}))
