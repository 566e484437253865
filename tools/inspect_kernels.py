"""Compile every Triton kernel without a GPU and check the binaries: registers, shared memory, loads, barriers.

    python tools/inspect_kernels.py                               # some variants of each kernel, four architectures
    python tools/inspect_kernels.py --arch sm_90 --kernel append_kernel
    python tools/inspect_kernels.py --all --json facts.json       # every head dimension, group and dtype (slow)
    python tools/inspect_kernels.py --file my.py                  # a changed copy of a kernels/*_triton.py

One row per variant and architecture:

    M        query rows per tile                 wide     loads of K and V of 16 bytes or more per thread
    regs     registers per thread                narrow   loads of K and V below 16 bytes per thread
    shared   bytes per program                   matrix   matrix-unit instructions
    stack    bytes per thread                    barrier  between append_kernel's partial results and its ticket
    spills   instructions that access the stack  chain    loads that wait for each other, the first of K included

The verdict is ok, compile (compilation failed), or the failed gates with the value found and the limit:

    stack, registers, shared  too much of it: a register spilled to the stack, or too few programs fit beside each other
    loads     K or V is not loaded 16 bytes at a time (V in 8 bits and D = 32: 8), or fewer loads than its tiles have
    pipeline  not all loads of K and V in the loop are asynchronous copies
    matrix    no matrix-unit instruction
    chain     the first tile of K is requested after more than two other loads that wait for each other (NVIDIA)
    int64     an offset into K or V is not computed with 64-bit products, so it overflows in large arenas
    barrier   none before the ticket ("no"); only one that Triton inserted by chance ("chance"). "weak" passes: AMD's
              barrier does not wait for the stores of other waves, which only a run can judge

Launches are specialised as Triton does on a GPU; for AMD this means arenas below 2 GB, with buffer instructions. The
loads of K and V are found by the names `keys` and `values` in a kernel's module. This does not replace a run on a
GPU: it cannot show races, times or wrong results. Exit codes: 0 all variants pass; 1 one fails; 2 wrong arguments.
"""

import importlib
import importlib.util
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kernels import decode_plan  # noqa: E402
from kernels.tiles import ROOMY  # noqa: E402
from tools.command import as_command, flags, imported, number, one_line, one_of, unwritable, write_json  # noqa: E402

ARCHS = {  # arguments of Triton's GPUTarget: backend, architecture, threads per warp
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64),
}  # fmt: skip
E4M3 = ("sm_90", "sm_100")  # elsewhere fp8 is refused, see kernels.quantise.has_e4m3
HEAD_DIMS, GROUPS = (32, 64, 72, 80, 96, 128, 256), (1, 2, 4, 7, 8, 16)
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "fp8": 1}
# head dimension, group, dtype: covers every head dimension, every dtype, and M = 2, 4, 8 and 16
COVER = (
    (32, 4, "fp16"), (64, 2, "bf16"), (72, 16, "bf16"), (80, 7, "bf16"), (128, 4, "bf16"), (96, 8, "fp16"),
    (256, 16, "fp32"),
)  # fmt: skip
QWEN2 = ((64, 7), (128, 7))  # head dimension and group of Qwen2-0.5B and 7B, which LLaVA-OneVision has

# ---------------------------------------------------------------- limits of the gates

# Per thread. A multiprocessor has 65,536 registers. At 128 per thread four programs of 128 threads fit, at 168 three,
# at 200 two; several are needed to hide the latency of loads. The compiler spills at 255.
# (K and V in 8 bits need more registers, for the conversion, but half of the shared memory.)
REGISTERS = {
    "16 bit": 128,
    "16 bit, D > 128 or M > 16": 168,
    "8 bit": 168,
    "8 bit, M > 16": 224,
    "fp32": 200,
    "AMD": 512,
}
# Bytes, instructions. ptxas may park two registers on the stack while the loop runs, to reach a rounder register count
# (append_kernel on sm_80 with G = 1 and D = 72, 80, 96). Real spilling takes hundreds.
STACK, SPILLS = 8, 4
# Bytes per program. On sm_80 (164 KB per multiprocessor) three programs of 48 KB fit. sm_90 and sm_100 (227 KB) keep
# one more tile in flight; three programs of 75 KB fit, or two of 80 KB. AMD has 64 KB: a larger program cannot start.
SHARED = {"16 bit": 48 << 10, "fp32": 56 << 10, "16 bit, roomy": 80 << 10, "fp32, roomy": 90 << 10, "AMD": 64 << 10}


# ---------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    kernel: str
    dtype: str
    d: int
    group: int  # query heads per KV head
    tokens: int  # new query tokens (split, merge), or rows of the window (lse, mass)
    codes: str = ""  # K and V in 8 bits: int8 or fp8


def variants(kernel, everything):
    """The variants of a kernel to compile: everything that ships, or a selection."""
    plain = Variant(kernel, "bf16", 128, 4, 16 if kernel in ("lse_kernel", "mass_kernel") else 1)
    decodes = kernel in ("split_kernel", "append_kernel", "score_kernel")
    cover = COVER if decodes else COVER[::2]  # fewer, to stay below 90 s
    if everything:
        cover = itertools.product(HEAD_DIMS, GROUPS if kernel != "pack_kernel" else (1,), BYTES)
    chosen = [replace(plain, d=d, group=group, dtype=dtype) for d, group, dtype in cover]
    if kernel not in ("pack_kernel", "evict_kernel"):
        chosen += [replace(plain, d=d, group=group) for d, group in QWEN2]
    if decodes:
        chosen += [replace(plain, d=d, group=group) for d, group in ((128, 1), (128, 8), (256, 4))]
        coded = chosen if everything else [v for v in chosen if v.d in (32, 72, 128) and v.group < 8]
        chosen += [replace(v, codes=codes) for v in coded for codes in ("int8", "fp8")]
    if kernel == "evict_kernel":
        chosen += [replace(plain, codes=codes) for codes in ("int8", "fp8")]
    if kernel in ("split_kernel", "merge_kernel"):  # 17 * 4 rows: more than one tile
        chosen += [replace(v, tokens=17) for v in chosen if v.group == 4 and (everything or v.d == 128)]
        chosen += [replace(plain, d=64, tokens=17), replace(plain, d=64, dtype="fp32", tokens=17)]
    if kernel == "lse_kernel":
        chosen += [replace(plain, tokens=1), replace(plain, d=64, dtype="fp32")]
    return list(dict.fromkeys(chosen))


# ---------------------------------------------------------------- launches, recorded from the launchers

HEADS = 4  # KV heads
SLOTS = 300  # per segment: several splits
PROMPT = 1500  # tokens: two splits of window_scores


def segments(variant, dtype):
    """K and V arenas of HEADS segments; first slot, length and capacity of each; keyword arguments for the scales."""
    start, cap = SLOTS * torch.arange(HEADS, dtype=torch.int32), torch.full((HEADS,), SLOTS, dtype=torch.int32)
    k, v = torch.empty(2, HEADS * SLOTS, variant.d, dtype=DTYPES[variant.codes] if variant.codes else dtype)
    scales = torch.empty(2, HEADS * SLOTS, dtype=torch.float16) if variant.codes else (None, None)
    return k, v, start, cap, dict(zip(("k_scale", "v_scale"), scales, strict=True))


def launch_decode(module, variant, dtype):
    k, v, start, cap, scales = segments(variant, dtype)
    q = torch.empty(1, variant.tokens, HEADS * variant.group, variant.d, dtype=dtype)
    module.attend(q, k, v, cap, decode_plan(start, cap), 1.0, **scales)


def launch_append(module, variant, dtype):
    k, v, start, cap, scales = segments(variant, dtype)
    q, new = (torch.empty(1, heads, variant.d, dtype=dtype) for heads in (HEADS * variant.group, HEADS))
    rope = torch.empty(2, 1, 1, variant.d, dtype=dtype).unbind()
    module.append_attend(q, new, new, k, v, cap, decode_plan(start, cap), 1.0, rope, **scales)


def launch_sums(module, variant, dtype):
    k, _, start, cap, scales = segments(variant, dtype)
    q, lse = torch.empty(1, HEADS * variant.group, variant.d, dtype=dtype), torch.empty(1, HEADS * variant.group)
    rope = torch.empty(2, 1, 1, variant.d, dtype=dtype).unbind()
    score, token, pos = torch.empty(len(k)), torch.empty(len(k), dtype=torch.int32), torch.empty(1, dtype=torch.int64)
    module.add(q, k, score, token, cap, pos, decode_plan(start, cap), lse, rope, 1.0, scales["k_scale"])


def launch_evict(module, variant, dtype):
    k, v, start, cap, scales = segments(variant, dtype)
    score, token = torch.empty(len(k)), torch.empty(len(k), dtype=torch.int32)
    module.evict((k, v, *scales.values()), score, token, cap, cap, cap, decode_plan(start, cap))


def launch_scores(module, variant, dtype):
    """q and k have the memory layout of a prefill, (T, H, D)."""
    q, k = (torch.empty(PROMPT, h, variant.d, dtype=dtype).transpose(0, 1) for h in (HEADS * variant.group, HEADS))
    positions = torch.arange(PROMPT - variant.tokens, PROMPT)
    module.scores(q[:, -variant.tokens :], k, positions, 1.0, "none")


def launch_pack(module, variant, dtype):
    """k and v have the memory layout of a prefill, (T, H, D)."""
    k, v = torch.empty(2, PROMPT, HEADS, variant.d, dtype=dtype).transpose(1, 2)
    module.pack(k, v, torch.ones(HEADS, PROMPT, dtype=torch.bool), 64, HEADS * PROMPT)


@dataclass(frozen=True)
class Kernel:
    module: str
    launch: Callable
    tiles: int = 0  # tiles of K and V that it loads
    rows: str = ""  # name of the constant with a tile's rows
    streams: bool = False  # loads tiles in a loop, which must be pipelined
    chain: int = 9  # longest chain of loads to the first tile
    multiplies: bool = False  # uses the matrix units


KERNELS = {
    "split_kernel": Kernel("ragged_decode_triton", launch_decode, 2, "BN", streams=True, multiplies=True, chain=3),
    "merge_kernel": Kernel("ragged_decode_triton", launch_decode),
    "append_kernel": Kernel("ragged_decode_triton", launch_append, 2, "BN", streams=True, multiplies=True, chain=3),
    "lse_kernel": Kernel("window_scores_triton", launch_scores, 1, "BN", streams=True, multiplies=True),
    "mass_kernel": Kernel("window_scores_triton", launch_scores, 1, "BN", multiplies=True),
    "score_kernel": Kernel("slot_scores_triton", launch_sums, 1, "BN", streams=True, multiplies=True, chain=3),
    "evict_kernel": Kernel("slot_scores_triton", launch_evict),
    "pack_kernel": Kernel("ragged_pack_triton", launch_pack, 2, "BT"),
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def module_of(kernel, file):
    """The module with this kernel: the shipped one, or a changed copy from a file. A copy's relative imports work."""
    if file is None:
        return importlib.import_module(f"kernels.{KERNELS[kernel].module}")
    return imported(f"kernels.own_{Path(file).stem}", file, "give --file FILE.py")


def compile_for(variant, arch, file=None):
    """(compiled kernel, {name: value} of its constants), specialised as the JIT does for the launcher's arguments.

    The launcher runs on the CPU with mocks in place of its kernels. Then Triton compiles for a mocked GPU. file: see
    `module_of`.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    module = module_of(variant.kernel, file)
    function = getattr(module, variant.kernel)
    stand_ins = {name: DEFAULT for name in KERNELS if hasattr(module, name)}
    if hasattr(module, "architecture"):
        stand_ins["architecture"] = lambda device: arch
    with patch.multiple(module, **stand_ins) as mocks:
        KERNELS[variant.kernel].launch(module, variant, DTYPES[variant.dtype])
    arguments, options = mocks[variant.kernel].__getitem__.return_value.call_args
    target = GPUTarget(*ARCHS[arch])
    gpu = SimpleNamespace(
        get_current_device=lambda: arch, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    driver.set_active(gpu)
    compiled = function.warmup(*arguments, grid=(1,), **options)
    return compiled, {function.arg_names[i]: value for (i,), value in compiled.src.constants.items()}


# ---------------------------------------------------------------- facts of a binary


@dataclass(frozen=True)
class Facts:
    """The columns of the table (see the module docstring). copies: asynchronous loads of K and V."""

    regs: int
    shared: int
    stack: int
    spills: int
    wide: int
    narrow: int
    copies: int
    matrix: int
    barrier: str
    int64: bool
    chain: int | None = None  # only of a CUDA binary that streams tiles


# Regular expressions for a disassembly: the source line (file, number) of the instructions that follow; an instruction
# without its predicate; the instructions that are counted
CUDA = {
    "line": r'//## File "(.*)", line (\d+)', "instruction": r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)",
    "load": r"LDG\.|LDGSTS\.", "wide": r".*\.(128|256)\b", "copy": r"LDGSTS\.", "spill": "LDL|STL",
    "matrix": r"HMMA|HGMMA|QGMMA|UTC\w*MMA",
}  # fmt: skip
AMD = {
    "line": r"^\s+\.loc\s+(\d+) (\d+)", "instruction": r"\s+([a-z]\w*)",
    "load": "(global|buffer)_load", "wide": ".*dwordx4", "copy": "(?!)", "spill": "scratch_", "matrix": "v_mfma",
}  # fmt: skip


def read_cuda(compiled, loads):
    """Facts of a CUDA binary; loads: the source lines that load K or V."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = nvidia_tool("nvdisasm", "-c", "-g", file.name)
    stack = int(re.search(r"STACK:(\d+)", resources)[1])  # LOCAL is 0 even where registers spill
    regs = int(re.search(r"REG:(\d+)", resources)[1])
    return facts_of(compiled, loads, parse(code, CUDA, {}), CUDA, regs, stack)


def nvidia_tool(name, *arguments):
    """Output of an NVIDIA tool that ships with Triton."""
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def read_amd(compiled, loads):
    """Facts of an AMD binary, from its assembly; loads: as for read_cuda."""
    text = compiled.asm["amdgcn"]
    files = dict(re.findall(r'^\s+\.file\s+(\d+) .*"(.*)"', text, re.M))
    regs, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return facts_of(compiled, loads, parse(text, AMD, files), AMD, regs, stack)


def parse(text, patterns, files):
    """A disassembly -> [(opcode, source line)], a line as in kv_lines. files: {number: name} if lines give numbers."""
    code, line = [], None
    for row in text.splitlines():
        if found := re.search(patterns["line"], row):
            line = Path(files.get(found[1], found[1])).name, int(found[2])
        elif found := re.match(patterns["instruction"], row):
            code.append((found[1], line))
    return code


def facts_of(compiled, loads, code, patterns, regs, stack):
    """The Facts of a binary from its instructions."""

    def count(what, ops):
        return sum(re.match(patterns[what], op) is not None for op in ops)

    ops = [op for op, _ in code]
    kv = [op for op, line in code if line in loads and count("load", [op])]
    wide = count("wide", kv)
    return Facts(
        regs=regs, shared=compiled.metadata.shared, stack=stack, spills=count("spill", ops), wide=wide,
        narrow=len(kv) - wide, copies=count("copy", kv), matrix=count("matrix", ops),
        barrier=ticket_barrier(compiled.asm), int64=offsets_are_64_bit(compiled.asm["ttir"]),
        chain=chain_to_first_tile(compiled.asm.get("ptx", "")),
    )  # fmt: skip


PTX = re.compile(r"\s*(?:@!?(%p\d+) )?(ld\.global|cp\.async\.c[ag]|bra|ret|st|red|bar|[a-z]\w*)[\w.:]*\s+(.*)")


def chain_to_first_tile(ptx):
    """Loads that wait for each other before the first tile of K, this tile included; None without asynchronous copies.

    A load waits for those that its address, its predicate, or a conditional branch before it depends on.
    """
    waits, branch = {}, 0  # per register: number of loads that its value waits for; the same for branches so far
    for guard, op, operands in PTX.findall(ptx):
        registers = re.findall(r"%\w+\d", operands)
        if op in ("bra", "ret"):
            branch = max(branch, waits.get(guard, 0))
        elif op.startswith("cp.async"):
            return 1 + max(branch, *(waits.get(name, 0) for name in [guard, *registers]))
        elif op not in ("st", "red", "bar"):
            results = re.findall(r"%\w+\d", re.match(r"\{.*?\}|[^,]*", operands)[0])
            inputs = max(waits.get(name, 0) for name in [guard, *registers[len(results) :]])
            waits |= dict.fromkeys(results, 1 + max(branch, inputs) if op == "ld.global" else inputs)
    return None


def last_before(lines, end, wanted, store):
    """Index of the last line before `end` that matches `wanted`, with no store between the two; else None."""
    for n in range(end - 1, -1, -1):
        if re.search(wanted, lines[n]):
            return n
        if re.search(store, lines[n]):
            return None


# patterns of stores, tickets and barriers in Triton IR, in PTX and in AMD assembly
MARKS = {
    "ttir": (r"\btt\.store", r"\btt\.atomic_rmw add", r"\b(gpu|ttg)\.\w*barrier"),
    "ptx": (r"\bst\.global", r"\batom\.global\.gpu\.acq_rel\.add", r"\bbar(rier)?\.(cta\.)?sync"),
    "amdgcn": (r"\b(global|flat|buffer)_store", r"\b(global|flat|buffer)_atomic_add", r"\bs_barrier\b"),
}


def barriers(asm, form):
    """For each ticket: line index of the barrier between it and all stores before it, or None."""
    store, ticket, barrier = MARKS[form]
    lines = asm[form].splitlines()
    return [last_before(lines, n, barrier, store) for n, line in enumerate(lines) if re.search(ticket, line)]


def ticket_barrier(asm):
    """Which barrier orders the stores of all threads before the ticket; "-" if there is no ticket.

    "yes"     the barrier in the kernel's source
    "chance"  only one that Triton happened to insert, to reuse shared memory
    "weak"    AMD: waves do not wait for their own stores before the barrier, so the ticket might overtake the stores of
              other waves. LLVM added the wait for GPUs newer than gfx942 (llvm-project, pull request 161638); only a
              run can show whether gfx942 needs it.
    "no"      none
    """
    form = "ptx" if "ptx" in asm else "amdgcn"
    asked, there = barriers(asm, "ttir"), barriers(asm, form)
    if not asked + there:
        return "-"
    if not there or None in there:
        return "no"
    if not asked or None in asked:
        return "chance"
    lines = asm[form].splitlines()
    waits = [last_before(lines, n, r"\bs_waitcnt .*vmcnt\(0\)", MARKS[form][0]) for n in there]
    return "weak" if form == "amdgcn" and None in waits else "yes"


# Triton IR operations through which a product reaches an offset
PASSING = {"arith.addi", "arith.subi", "arith.extsi", "arith.extui", "tt.splat", "tt.broadcast", "tt.expand_dims"}


def offsets_are_64_bit(ttir):
    """Whether the offsets into K and V are computed with 64-bit products. Read from a kernel's Triton IR.

    A 32-bit product may overflow, so none may be added to such an offset, even if widened afterwards. It may be a
    factor of a 64-bit product (a row number, a stride).
    """
    arenas, wide, narrow = set(), set(), set()  # names of pointers to K and V; of values from 64-, 32-bit products
    multiplied = False
    for line in ttir.splitlines():
        names, found = re.findall(r"%\w+", line), re.match(r'\s*%\w+ = "?([\w.]+)', line)
        if "tt.func" in line:
            arenas = {"%k", "%v", "%k_arena", "%v_arena"} & set(names)
        if not found or found[1] == "scf.for":  # blocks may reuse the names of earlier blocks
            wide, narrow = wide - set(names), narrow - set(names)
            continue
        op, result, operands = found[1], names[0], names[1:]
        for group, bits in ((wide, "i64"), (narrow, "i32")):
            product = op in ("arith.muli", "arith.shli") and bits in line.rpartition(" : ")[2]
            keep(group, result, product or (op in PASSING and group & set(operands)))
        if op == "tt.addptr" and operands[0] in arenas:
            if operands[1] in narrow:
                return False
            multiplied |= operands[1] in wide
        keep(arenas, result, op in ("tt.addptr", "tt.splat", "tt.broadcast", "tt.bitcast") and operands[0] in arenas)
    return multiplied


def keep(group, name, inside):
    """Add the name to the set or remove it."""
    (group.add if inside else group.discard)(name)


# ---------------------------------------------------------------- gates


def failures(variant, arch, facts, constants, threads):
    """The gates that a variant fails, each with the value found and the limit. threads: per program."""
    kernel, amd, m = KERNELS[variant.kernel], arch.startswith("gfx"), constants.get("M", 1)
    bits = "fp32" if variant.dtype == "fp32" else "16 bit"
    large = ", D > 128 or M > 16" if bits == "16 bit" and (variant.d > 128 or m > 16) else ""
    if variant.codes and bits == "16 bit":
        bits, large = "8 bit", ", M > 16" * (m > 16)
    registers = REGISTERS["AMD" if amd else bits + large]
    shared = SHARED["AMD" if amd else bits.replace("8", "16") + ", roomy" * (arch in ROOMY)]
    loads = facts.wide + facts.narrow
    # NVIDIA has no matrix instructions for IEEE fp32; AMD's need at least 4 rows
    multiplies = kernel.multiplies and bits != "fp32" and not (amd and m < 4)
    gates = {  # name: does it fail?
        f"stack {facts.stack} bytes > {STACK} or {facts.spills} spills > {SPILLS}": (
            facts.stack > STACK or facts.spills > SPILLS
        ),
        f"registers {facts.regs} > {registers}": facts.regs > registers,
        f"shared {facts.shared / 1024:.4g} KB > {shared >> 10}": facts.shared > shared,
        f"loads {facts.wide} wide + {facts.narrow} narrow": not loads_are_wide(variant, facts, constants, threads),
        f"pipeline {facts.copies} of {loads} loads": kernel.streams and not amd and not 0 < facts.copies == loads,
        "matrix": multiplies and facts.matrix == 0,
        f"chain {facts.chain} > {kernel.chain}": (facts.chain or 0) > kernel.chain,
        f"barrier {facts.barrier}": variant.kernel == "append_kernel" and facts.barrier not in ("yes", "weak"),
        "int64": kernel.tiles and not facts.int64,
    }
    return [name for name, failed in gates.items() if failed]


def loads_are_wide(variant, facts, constants, threads):
    """Whether K and V are loaded 16 bytes at a time. Tiles with less than 16 bytes per thread may use smaller loads."""
    kernel = KERNELS[variant.kernel]
    if not kernel.tiles:
        return True
    pieces = constants[kernel.rows] * constants["DP"] * BYTES[variant.codes or variant.dtype] // 16
    if pieces < threads:
        return facts.wide + facts.narrow >= kernel.tiles
    each = pieces // threads
    if variant.codes and (constants["DP"] <= 32 or variant.d % 2):  # V is not read in pairs: 8 bytes at a time
        return facts.wide >= each and facts.narrow <= 2 * facts.wide and facts.wide + facts.narrow / 2 >= 2 * each
    return facts.narrow == 0 and facts.wide >= kernel.tiles * each


# ---------------------------------------------------------------- compile and report


def inspect(job, file=None):
    """Compile a job (variant, architecture) -> its row of the table, with variant, facts and verdict. file: see
    `module_of`."""
    variant, arch = job
    row = {"kernel": variant.kernel, "arch": arch, **asdict(variant)}
    try:
        compiled, constants = compile_for(variant, arch, file)
    except Exception as broken:  # Triton, LLVM and ptxas have no common exception class
        return {**row, "verdict": "compile", "error": f"{type(broken).__name__}: {broken}"}
    backend, _, warp = ARCHS[arch]
    facts = (read_cuda if backend == "cuda" else read_amd)(compiled, kv_lines(variant.kernel, file))
    failed = failures(variant, arch, facts, constants, warp * compiled.metadata.num_warps)
    row |= {"M": constants.get("M"), "constants": constants, **asdict(facts)}
    return {**row, "verdict": ", ".join(failed) or "ok"}


def kv_lines(kernel, file=None):
    """{(file name, line number): "keys" or "values"} of the lines of a kernel's module that load K or V.

    Triton's cache knows lines but not files: a binary of an unchanged function may name the shipped file.
    """
    shipped = ROOT / "kernels" / f"{KERNELS[kernel].module}.py"
    lines = enumerate(Path(file or shipped).read_text().splitlines(), 1)
    found = {n: m[1] for n, line in lines if (m := re.match(r"\s*(keys|values) = tl\.load\(", line))}
    return {(name, n): what for name in {shipped.name, Path(file or shipped).name} for n, what in found.items()}


COLUMNS = (
    "kernel", "dtype", "codes", "d", "M", "arch", "regs", "shared", "stack", "spills", "wide", "narrow", "matrix",
    "barrier", "chain", "verdict",
)  # fmt: skip


def table(rows):
    """The lines of the table, with aligned columns."""
    cells = [["D" if name == "d" else name for name in COLUMNS]]
    cells += [["-" if row.get(name) in (None, "") else str(row[name]) for name in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def parser():
    p = flags(__doc__)
    p.add_argument("--arch", nargs="+", type=one_of(*ARCHS), default=list(ARCHS), metavar="ARCH", help="%(type)s")
    p.add_argument("--kernel", nargs="+", type=one_of(*KERNELS), metavar="NAME", help="%(type)s")
    p.add_argument("--file", metavar="FILE.py", help="instead of what ships: a changed copy of a kernels/*_triton.py")
    p.add_argument("--all", action="store_true", help="every head dimension, group and dtype")
    p.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    p.add_argument("--processes", type=number(int, 1), default=2, metavar="N", help="parallel compilations (default 2)")
    return p


def objection(args):
    """The error message for these arguments, or None if they are valid. Fills in --kernel."""
    shipped = sorted((ROOT / "kernels").glob("*_triton.py"))
    try:
        source = "".join(path.read_text() for path in ([Path(args.file)] if args.file else shipped))
    except (OSError, ValueError) as wrong:
        return f"--file {args.file} cannot be read ({one_line(wrong)}); give a Python file"
    defined = set(re.findall(r"^def (\w+_kernel)\(", source, flags=re.M))
    if args.file is None and (forgotten := defined - set(KERNELS)):
        return f"{', '.join(sorted(forgotten))} missing from KERNELS; add it in {Path(__file__).name}"
    args.kernel = args.kernel or [name for name in KERNELS if name in defined]
    if missing := sorted(set(args.kernel or KERNELS) - defined):
        return f"{args.file} has no {', '.join(missing)}; copy a kernels/*_triton.py and keep its functions' names"
    for kernel in args.kernel:
        names = set(("keys", "values")[: KERNELS[kernel].tiles])
        if missing := sorted(names - set(kv_lines(kernel, args.file).values())):
            lines = " or ".join(f"`{name} = tl.load(`" for name in missing)
            where = args.file or f"kernels/{KERNELS[kernel].module}.py"
            return f"no line {lines} in {where}; the inspector finds loads by these names"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (it has no wheels for macOS and Windows)"
    return unwritable(args.json)


def main(argv=None):
    args = parser().parse_args(argv)
    if wrong := objection(args):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # the worker processes must compile, not interpret
    start = time.monotonic()
    jobs = [(v, arch) for name in args.kernel for v in variants(name, args.all) for arch in args.arch]
    jobs = [(v, arch) for v, arch in jobs if v.codes != "fp8" or arch in E4M3]
    rows = []
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for row in pool.imap(partial(inspect, file=args.file), jobs, chunksize=2):
            rows.append(row)
            if len(rows) % 20 == 0 or len(rows) == len(jobs):
                print(f"{len(rows)} of {len(jobs)} compiled", file=sys.stderr)
    print("\n".join(table(rows)))
    for row in rows:
        if "error" in row:
            print(f"{row['kernel']} on {row['arch']}: {row['error']}", file=sys.stderr)
    failed = sum(row["verdict"] != "ok" for row in rows)
    seconds = round(time.monotonic() - start)
    print(f"{len(rows)} variants in {seconds} s with triton {version('triton')}: {failed or 'none'} failed a gate")
    if args.json:
        write_json(args.json, {"about": {"triton": version("triton"), "seconds": seconds}, "rows": rows})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(as_command(main))
