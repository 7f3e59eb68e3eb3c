"""Compile every Triton kernel for an H100, which takes no device: ``python tests/compile_kernels.py``.

Not in the interpreter's process, which has other definitions of Triton's own functions; without PyTorch.
"""

import importlib.util
import re
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPS = Path(__file__).parents[1] / "lvsoftmax" / "ops"
TARGET = GPUTarget("cuda", 90, 32)

IDS = {"row", "token", "begin", "end", "place", "pieces", "node_branch", "word_branch", "target", "ids", "order"}
IDS |= {"first_token", "last_token", "first_word", "last_word", "group_word"}
SIZES = {"N", "D", "K", "M", "V", "Q", "U", "S", "first", "words"}
PAIRS = {"SUM": tl.float32, "BT": 4, "BQ": 8, "BK": 16, "BD": 128, "BIASED": True}
TILES = {"SOFTCAP": 30.0, "BIASED": True, "SUMMED": True, "DOT": tl.bfloat16, "SUM": tl.float32, "PRECISION": "ieee"}
TILES |= {"BN": 128, "BV": 128, "BD": 64}
GROUPS = {"SUM": tl.float32, "PRECISION": "tf32x3", "BN": 32, "BV": 64, "BD": 64}

KERNELS = {
    "linear_cross_entropy/kernel.py": {"sums": TILES, "slopes": TILES},
    "path_nll/kernel.py": {"walk": PAIRS},
    "gather_dot/kernel.py": {"products": PAIRS},
    "grouped_nll/kernel.py": {"scores": GROUPS, "to_hidden": GROUPS, "to_table": GROUPS},
    "pairs_kernel.py": {"token_sums": PAIRS, "piece_sums": PAIRS, "join_pieces": PAIRS},
}


def type_of(argument: str, constants: dict) -> str:
    if argument in constants:
        return "constexpr"
    if argument in SIZES or argument.endswith("stride"):
        return "i32"
    if argument == "met":
        return "*i32"
    if argument in ("hidden", "weight", "slope") and "DOT" in constants:
        return "*bf16"
    return "*i64" if argument in IDS else "*fp32"


def compile_for_the_target(kernel, options: dict) -> str:
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    types = {name: type_of(name, constants) for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, types, places), target=TARGET).asm["ptx"]


if __name__ == "__main__":
    for path, kernels in KERNELS.items():
        spec = importlib.util.spec_from_file_location(Path(path).stem, OPS / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, options in kernels.items():
            code = compile_for_the_target(getattr(module, name), options)
            assert "DOT" not in options or "wgmma.mma" in code, f"{name} multiplies without tensor cores"
            assert not re.search(r"\b(atom|red)\.", code), f"{name} has atomic operations"
            print(path, name, len(code))
