"""Compile kernels for sm_80 and sm_90a without a GPU and look for what must not be in their machine code.

    python tests/compile_kernels.py FACTORY ...    # module.function
    python tests/compile_kernels.py --list         # import everything, print every factory

A factory's first example is compiled for both, the others for one in turn; for both with LYCORIS_COMPILE_ALL set.
One line a kernel and architecture: registers, instructions, bytes of stack, of shared memory and of the binary,
seconds. A fault is a line of its own that starts with FAULT, and makes the exit status 1.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cuda.pathfinder import find_nvidia_binary_utility

if TYPE_CHECKING:
    from kernels.target import Kernel

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ((8, 0), (9, 0, "a"))
REGISTERS = 65536
SHARED_BYTES = {8: 163 << 10, 9: 227 << 10}
# On sm_90 the first KiB of a block's shared memory is the system's; the binary counts it as the kernel's.
RESERVED_SHARED_BYTES = {8: 0, 9: 1 << 10}

# What must not be there, and what betrays it among the instructions (a call is followed by what it calls; ptxas
# also calls labels of its own function, to bring diverged threads together).
FORBIDDEN = {
    "local memory": r"LDL|STL",
    "fp64 arithmetic": r"DADD|DMUL|DFMA|DSETP|DMNMX|DMMA|.*\.F64|.*64H",
    "64-bit division": r"CALL.*_(?:div|rem)_[su]64",
    "a call of a function that was not inlined": r"CALL(?!.*__cuda_sm|.*\(\.L_x_)",
}

# Factory -> what is allowed in its kernels all the same, and why. A row that nothing needs is a fault.
_ANY_SHAPE = "the fallback for shapes and kinds that the tiled kernels refuse: coordinates of any layout, in 64 bits"
_WAVES = "sine and cosine of arguments above 10**5: libdevice's reduction modulo pi / 2"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "kernels.weight.contraction.contract": {
        "64-bit division": "two for an element's coordinates, beside a whole inner product over a small factor"
    },
    "kernels.pointwise.flat": {"fp64 arithmetic": _WAVES},
    "kernels.pointwise.strided": {"fp64 arithmetic": _WAVES},
    "kernels.weight.portable.merge": {"64-bit division": _ANY_SHAPE},
    "kernels.weight.portable.dora_gain": {"64-bit division": _ANY_SHAPE},
}

# Factory -> (which kernels, by a pattern found in their keys; what must be among their instructions) ...
EXPECTED: dict[str, tuple[tuple[str, str], ...]] = {
    "kernels.weight.tile.weight_tile": (
        (r"^(?!.*wgmma=True).*(low_rank|hadamard)", r"HMMA\.16816\.F32"),
        (r"^(?!.*wgmma=True).*(low_rank|hadamard)", r"LDSM\.16\.MT88\.4"),
        ("wgmma=True", r"HGMMA\.64x32x16\.F32\.BF16"),
        (r"\('(bf16|f16|f32)'", r"LDG\.E\..*128"),
        ("'(merge|dora .*)'", r"STG\.E\..*128"),
    ),
    "kernels.weight.tile.weight_tile_grouped": (
        ("low_rank", r"HMMA\.16816\.F32"),
        ("", r"LDG\.E\..*128"),
        ("", r"STG\.E\..*128"),
    ),
    "kernels.matmul.mma.matmul_mma": (
        ("bf16", r"HMMA\.16816\.F32\.BF16"),
        ("kind='f16'", r"HMMA\.16816\.F32\b"),
        ("layout='NT'", r"LDSM\.16\.M88\.4"),
        ("layout='(TN|TT|NN)'", r"LDSM\.16\.MT88\.4"),
        ("a_vector=8", r"LDGSTS\.E\..*128"),
        ("wide=True", r"STG\.E\..*128"),
    ),
    "kernels.matmul.mma.matmul_mma_grouped": (("", r"HMMA\.16816\.F32"), ("", r"LDGSTS\.E\..*128")),
    "kernels.convolution.mma.convolve_mma": (
        ("", r"HMMA\.16816\.F32"),
        ("gathered_vector=8", r"LDGSTS\.E\..*128"),
        ("wide=True", r"STG\.E\..*128"),
    ),
    "kernels.convolution.mma.weight_gradient_mma": (
        ("", r"HMMA\.16816\.F32"),
        ("", r"LDSM\.16\.MT88\.4"),
        ("gathered_vector=8", r"LDGSTS\.E\..*128"),
    ),
    "kernels.matmul.skinny.matmul_skinny": (
        ("", r"HMMA\.16816\.F32"),
        ("", r"LDG\.E\..*128"),
        ("wide=True", r"STG\.E\..*128"),
    ),
    **dict.fromkeys(
        ("kernels.matmul.low_rank_streamed.low_rank_streamed", "kernels.matmul.narrow_streamed.narrow_streamed"),
        (("'bf16'", r"HGMMA\.64x\d+x16\.F32\.BF16"), ("", r"UTMALDG\.3D"), ("parts=2", r"UCGABAR_ARV")),
    ),
    "kernels.adapter_gradient.low_rank_streamed.low_rank_gradient_streamed": (
        ("'bf16'", r"HGMMA\.64x\d+x16\.F32\.BF16"),
        ("", r"UTMALDG\.2D"),
        ("parts=[24]", r"UCGABAR_ARV"),
    ),
    "kernels.adapter_gradient.low_rank.low_rank_gradient": (
        ("'bf16'", r"HMMA\.16816\.F32\.BF16"),
        ("", r"LDSM\.16\.MT88\.4"),
        ("", r"LDGSTS\.E\..*128"),
        ("", r"STG\.E\..*128"),
    ),
    "kernels.adapter_gradient.kronecker_back.kronecker_back": (
        ("", r"HGMMA\.64x64x16\.F32.*"),
        ("", r"MOVM\.16\.MT88"),
    ),
    "kernels.adapter_gradient.blocks.block_mix_gradient": (("", r"HMMA\.16816\.F32"), ("", r"LDGSTS\.E\..*128")),
    "kernels.adapter_gradient.dense.contract_hadamard": (
        ("", r"HMMA\.16816\.F32\.BF16"),
        ("", r"MOVM\.16\.MT88"),
        ("", r"LDG\.E\..*128"),
    ),
    "kernels.adapter_gradient.hadamard.hadamard_gradient": (
        ("", r"HMMA\.16816\.F32\.BF16"),
        ("", r"LDSM\.16\.MT88\.4"),
        ("", r"LDGSTS\.E\..*128"),
    ),
    **dict.fromkeys(
        (
            "kernels.attention.forward.attention_forward",
            "kernels.attention.key_gradients.attention_key_gradients",
            "kernels.attention.query_gradient.attention_query_gradient",
        ),
        (
            ("'bf16'", r"HMMA\.16816\.F32\.BF16"),
            ("'f16'", r"HMMA\.16816\.F32\b"),
            ("", r"LDSM\.16\.M88\.4"),
            ("", r"LDSM\.16\.MT88\.4"),
            ("", r"LDGSTS\.E\..*128"),
            ("", r"STG\.E\..*128"),
            ("", r"MUFU\.EX2"),
        ),
    ),
    **dict.fromkeys(
        (
            "kernels.attention.forward_wgmma.attention_forward_wgmma",
            "kernels.attention.key_gradients_wgmma.attention_key_gradients_wgmma",
            "kernels.attention.query_gradient_wgmma.attention_query_gradient_wgmma",
        ),
        (
            ("'bf16'", r"HGMMA\.64x64x16\.F32\.BF16"),
            ("'f16'", r"HGMMA\.64x64x16\.F32\b"),
            ("", r"UTMALDG\.4D"),
            ("", r"STG\.E\..*128"),
            ("", r"MUFU\.EX2"),
        ),
    ),
    "kernels.weight.tile_cluster.dora_cluster": (
        ("", r"HMMA\.16816\.F32"),
        ("", r"LDSM\.16\.MT88\.4"),
        ("", r"LDGSTS\.E\..*128"),
        ("", r"STG\.E\..*128"),
        ("", r"UCGABAR_ARV"),
    ),
    "kernels.hyper_connection.spread_tile.spread_tile": (
        (r"\('\w+', '(bf16|f32)'", r"HMMA\.16816\.F32\.BF16"),
        (r"\('\w+', '(bf16|f32)'", r"LDSM\.16\.MT88\.4"),
        ("", r"LDGSTS\.E\..*128"),
        ("", r"STG\.E\..*128"),
    ),
    "kernels.hyper_connection.stream_shares.stream_shares": (("", r"LDGSTS\.E\..*128"),),
    "kernels.weight.kronecker.kronecker_merge": (
        ("", r"LDG\.E\..*128"),
        ("", r"STG\.E\..*128"),
        (r"Product\(", r"HMMA\.16816\.F32"),
    ),
    "kernels.weight.kronecker.kronecker_merge_grouped": (("", r"LDG\.E\..*128"), ("", r"STG\.E\..*128")),
}


class MachineCode:
    """What nvdisasm says about the cubin of one kernel."""

    def __init__(self, cubin: bytes, entry: str) -> None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            command = [find_nvidia_binary_utility("nvdisasm"), file.name]
            self._text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        entry_row = rf"\n(?:(?!.*EIATTR_).*\n)*?.*index@\({re.escape(entry)}\)\n.*\.word\s+(\w+)"
        self.registers = self._number("EIATTR_REGCOUNT" + entry_row)
        self.stack = self._number("EIATTR_FRAME_SIZE" + entry_row)
        self.max_threads = self._number(r"EIATTR_MAX_THREADS\n(?:(?!.*EIATTR_).*\n)*?.*\.word\s+(\w+)")
        shared = re.search(rf"^\.nv\.shared\.{re.escape(entry)}:\n\s+\.zero\s+(\d+)", self._text, re.M)
        self.static_shared = int(shared[1]) if shared else 0
        opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?((?:CALL.*)|[A-Z][\w.]*)"
        self.instructions = Counter(re.findall(opcode, self._text, re.M))
        products = re.findall(r"\sHGMMA\..*", self._text)
        # Of a group of products only the last is waited for, unless ptxas, who says so to nobody, made each wait.
        self.serialized = bool(products) and all("gsb0" in product for product in products)

    def _number(self, pattern: str) -> int:
        found = re.search(pattern, self._text)
        assert found, f"nvdisasm prints no {pattern}"
        return int(found[1], 0)

    def count(self, pattern: str) -> int:
        """How many instructions match from their start."""
        return sum(n for name, n in self.instructions.items() if re.match(rf"(?:{pattern})\b", name))


def import_all(*packages: str) -> None:
    """Import every module of the packages."""
    for package in packages:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            importlib.import_module(module.name)


def name_of(factory: Callable) -> str:
    """The name that the tables above and the command line use."""
    return f"{factory.__module__}.{factory.__qualname__}"


def limits_exceeded(kernel: Kernel, cc: tuple, code: MachineCode, log: str) -> Iterator[str]:
    """What would keep the kernel from running as it was declared."""
    if code.max_threads != kernel.threads:
        yield f"compiled for {code.max_threads} threads, launched with {kernel.threads}"
    registers = -(-code.registers // 8) * 8 * -(-kernel.threads // 32) * 32 * kernel.min_blocks
    if registers > REGISTERS:
        yield f"{code.registers} registers do not fit {kernel.min_blocks} blocks of {kernel.threads} threads"
    shared = (code.static_shared + kernel.shared_bytes) * kernel.min_blocks
    if shared > SHARED_BYTES[cc[0]]:
        yield f"{shared} bytes of shared memory for {kernel.min_blocks} blocks, there are {SHARED_BYTES[cc[0]]}"
    if code.serialized:
        yield "ptxas makes every wgmma wait for the one before"
    if warning := re.search(r".*(?:\bwarning\b|\bC75\d\d\b).*", log, re.I):
        yield f"the linker says: {warning[0].strip()}"


def check_kernel(kernel: Kernel, cc: tuple, name: str, needed: Counter) -> list[str]:
    """Compile, print the line, give the faults; count in `needed` which rows of the tables had a use."""
    start = time.perf_counter()
    binary = kernel.compile(cc)
    seconds = time.perf_counter() - start
    code = MachineCode(binary.cubin, binary.entry)
    arch = "sm_" + "".join(map(str, cc))
    shared = max(0, code.static_shared - RESERVED_SHARED_BYTES[cc[0]]) + kernel.shared_bytes
    print(
        f"{arch:6} {code.registers:3} registers {code.instructions.total():5} instructions {code.stack:4} stack "
        f"{shared:6} shared {len(binary.cubin):6} bytes {seconds:5.2f} s  {kernel.key}"
    )
    faults = list(limits_exceeded(kernel, cc, code, binary.log))
    for what, pattern in FORBIDDEN.items():
        if count := code.count(pattern):
            needed[what] += 1
            if what not in EXCEPTIONS.get(name, {}):
                faults.append(f"{what}, {count}x")
    for row in EXPECTED.get(name, ()):
        if re.search(row[0], kernel.key):
            needed[row] += 1
            if not code.count(row[1]):
                faults.append(f"no {row[1]} among its instructions")
    return [f"{arch} {kernel.key}: {fault}" for fault in faults]


def check_factory(factory: Callable) -> int:
    """Check a factory's examples, print the faults, count them."""
    name, needed = name_of(factory), Counter()
    faults = [] if factory.examples else [f"{name}: no examples to compile"]
    for number, choices in enumerate(factory.examples):
        kernel = factory(*choices)
        wanted = ARCHITECTURES if number == 0 or "LYCORIS_COMPILE_ALL" in os.environ else (ARCHITECTURES[number % 2],)
        for cc in wanted if len(kernel.architectures) == 2 else (kernel.architectures,):
            faults += check_kernel(kernel, cc, name, needed)
    rows = (*EXCEPTIONS.get(name, {}), *EXPECTED.get(name, ()))
    faults += [f"{name}: nothing needs the row {row!r}, drop it" for row in rows if not needed[row]]
    for fault in faults:
        print("FAULT", fault)
    return len(faults)


def main(arguments: list[str]) -> int:
    os.environ["NUMBA_ENABLE_CUDASIM"] = "0"
    sys.path.insert(0, str(ROOT))
    target = importlib.import_module("kernels.target")
    if arguments == ["--list"]:
        import_all("kernels", "plans")
        print(*map(name_of, target.FACTORIES), sep="\n")
        return 0
    for name in arguments:
        importlib.import_module(name.rpartition(".")[0])
    factories = {name_of(factory): factory for factory in target.FACTORIES}
    return min(1, sum(check_factory(factories[name]) for name in arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
