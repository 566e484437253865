"""Compile every Triton kernel without a GPU and check the binaries: registers, shared memory, loads, barriers.

    python tools/inspect_kernels.py                               # some variants of each kernel, four architectures
    python tools/inspect_kernels.py --arch sm_90 --kernel append_kernel
    python tools/inspect_kernels.py --all --json facts.json       # every head dimension, group and dtype (slow)

One row per variant and architecture:

    M        query rows per tile                 narrow   loads of K and V below 16 bytes per thread, in the kernel
    regs     registers per thread                wide     loads of K and V of 16 bytes or more per thread
    shared   bytes per program                   matrix   matrix-unit instructions
    stack    bytes per thread                    loop     instructions in the loop over tiles of K and V (not on AMD)
    spills   instructions that access the stack  barrier  between append_kernel's partial results and its ticket

The verdict is ok, compile (compilation failed), or the failed gates with the value found and the limit:

    stack, registers, shared  too much of it: a register spilled to the stack, or too few programs fit beside each other
    loads     K or V is not loaded 16 bytes at a time, or fewer loads were found than its tiles have
    pipeline  not all loads of K and V in the loop are asynchronous copies
    matrix    no matrix-unit instruction
    int64     an offset into K or V is not computed with 64-bit products, so it overflows in large arenas
    barrier   none before the ticket ("no"); only one that Triton inserted by chance ("chance"). "weak" passes: AMD's
              barrier does not wait for the stores of other waves, which only a run can judge

The loads of K and V are found by the names `keys` and `values` in a kernel's module. This does not replace a run on a
GPU: it cannot show races, times or wrong results. Exit codes: 0 all variants pass; 1 one fails; 2 wrong arguments.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import DEFAULT, patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.console import as_command  # noqa: E402

ARCHS = {  # Triton backend, its name for the architecture, threads per warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
HEAD_DIMS, GROUPS, BYTES = (32, 64, 72, 80, 96, 128, 256), (1, 2, 4, 7, 8, 16), {"bf16": 2, "fp16": 2, "fp32": 4}
# head dimension, group, dtype: covers every head dimension, every dtype, and M = 2, 4, 8 and 16
COVER = (
    (32, 4, "fp16"), (64, 2, "bf16"), (72, 16, "bf16"), (80, 7, "bf16"), (128, 4, "bf16"), (96, 8, "fp16"),
    (256, 16, "fp32"),
)  # fmt: skip

# ---------------------------------------------------------------- limits of the gates

# Per thread. A multiprocessor has 65,536 registers. At 128 per thread four programs of 128 threads fit, at 168 three,
# at 200 two; several are needed to hide the latency of loads. The compiler spills at 255.
REGISTERS = {"16 bit": 128, "16 bit, D > 128 or M > 16": 168, "fp32": 200, "AMD": 512}
# Bytes, instructions. ptxas may park two registers on the stack while the loop runs, to reach a rounder register count
# (append_kernel on sm_80 with G = 1 and D = 72, 80, 96). Real spilling takes hundreds.
STACK, SPILLS = 8, 4
# Bytes per program. On sm_80 (164 KB per multiprocessor) three programs of 48 KB fit. sm_90 and sm_100 (227 KB) keep
# one more tile in flight; three programs of 75 KB fit, or two of 80 KB. AMD has 64 KB: a larger program cannot start.
SHARED = {"16 bit": 48 << 10, "fp32": 56 << 10, "16 bit, roomy": 80 << 10, "fp32, roomy": 90 << 10, "AMD": 64 << 10}
ROOMY = ("sm_90", "sm_100")


# ---------------------------------------------------------------- variants


@dataclass(frozen=True)
class Variant:
    """group: query heads per KV head; tokens: new query tokens (split, merge), or rows of the window (lse, mass)."""

    kernel: str
    dtype: str
    d: int
    group: int
    tokens: int


def variants(kernel, everything):
    """The variants of a kernel to compile: everything that ships, or a selection."""
    plain = Variant(kernel, "bf16", 128, 4, 16 if kernel in ("lse_kernel", "mass_kernel") else 1)
    cover = COVER if kernel in ("split_kernel", "append_kernel") else COVER[::2]  # fewer, to stay below 90 s
    if everything:
        cover = itertools.product(HEAD_DIMS, GROUPS if kernel != "pack_kernel" else (1,), BYTES)
    chosen = [replace(plain, d=d, group=group, dtype=dtype) for d, group, dtype in cover]
    if kernel in ("split_kernel", "append_kernel"):
        chosen += [replace(plain, d=d, group=group) for d, group in ((128, 1), (128, 8), (256, 4))]
    if kernel in ("split_kernel", "merge_kernel"):  # 17 * 4 rows: more than one tile
        chosen += [replace(v, tokens=17) for v in chosen if v.group == 4 and (everything or v.d == 128)]
        chosen += [replace(plain, d=64, tokens=17), replace(plain, d=64, dtype="fp32", tokens=17)]
    if kernel == "lse_kernel":
        chosen += [replace(plain, tokens=1), replace(plain, d=64, dtype="fp32")]
    return list(dict.fromkeys(chosen))


# ---------------------------------------------------------------- launches, recorded from the launchers

HEADS = 4  # KV heads
SLOTS = 300  # per segment: several splits
PROMPT = 1500  # tokens: two parts of window_scores


def launch_decode(variant, dtype):
    import torch

    from kernels import decode_plan, ragged_decode_triton

    start, cap = SLOTS * torch.arange(HEADS, dtype=torch.int32), torch.full((HEADS,), SLOTS, dtype=torch.int32)
    q = torch.empty(1, variant.tokens, HEADS * variant.group, variant.d, dtype=dtype)
    k, v = torch.empty(2, HEADS * SLOTS, variant.d, dtype=dtype)
    ragged_decode_triton.attend(q, k, v, start, cap, decode_plan(start, cap), 1.0)


def launch_append(variant, dtype):
    import torch

    from kernels import decode_plan, ragged_decode_triton

    start, cap = SLOTS * torch.arange(HEADS, dtype=torch.int32), torch.full((HEADS,), SLOTS, dtype=torch.int32)
    q, new = (torch.empty(1, heads, variant.d, dtype=dtype) for heads in (HEADS * variant.group, HEADS))
    k, v = torch.empty(2, HEADS * SLOTS, variant.d, dtype=dtype)
    rope = torch.empty(2, 1, 1, variant.d, dtype=dtype).unbind()
    ragged_decode_triton.append_attend(q, new, new, k, v, start, cap, decode_plan(start, cap), 1.0, rope)


def launch_scores(variant, dtype):
    """q and k have the memory layout of a prefill, (T, H, D)."""
    import torch

    from kernels import window_scores_triton

    q, k = (torch.empty(PROMPT, h, variant.d, dtype=dtype).transpose(0, 1) for h in (HEADS * variant.group, HEADS))
    positions = torch.arange(PROMPT - variant.tokens, PROMPT)
    window_scores_triton.scores(q[:, -variant.tokens :], k, positions, 1.0, "none")


def launch_pack(variant, dtype):
    """k and v have the memory layout of a prefill, (T, H, D)."""
    import torch

    from kernels import ragged_pack_triton

    k, v = torch.empty(2, PROMPT, HEADS, variant.d, dtype=dtype).transpose(1, 2)
    ragged_pack_triton.pack(k, v, torch.ones(HEADS, PROMPT, dtype=torch.bool), 64, HEADS * PROMPT)


@dataclass(frozen=True)
class Kernel:
    """module, launch: where the kernel is and a function that launches it; tiles: tiles of K and V that it loads; rows:
    name of the constant with a tile's rows; streams: loads them in a loop, which must be pipelined; multiplies: uses
    the matrix units."""

    module: str
    launch: Callable
    tiles: int = 0
    rows: str = ""
    streams: bool = False
    multiplies: bool = False


KERNELS = {
    "split_kernel": Kernel("ragged_decode_triton", launch_decode, 2, "BN", streams=True, multiplies=True),
    "merge_kernel": Kernel("ragged_decode_triton", launch_decode),
    "append_kernel": Kernel("ragged_decode_triton", launch_append, 2, "BN", streams=True, multiplies=True),
    "lse_kernel": Kernel("window_scores_triton", launch_scores, 1, "BN", streams=True, multiplies=True),
    "mass_kernel": Kernel("window_scores_triton", launch_scores, 1, "BN", multiplies=True),
    "pack_kernel": Kernel("ragged_pack_triton", launch_pack, 2, "BT"),
}
TYPES = {
    "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32",
    "torch.int32": "i32", "torch.int64": "i64", "torch.bool": "i1",
}  # fmt: skip


def launched(variant, arch):
    """(jitted function, arguments, options) of a launch: runs the launcher on a CPU with mocks in place of kernels."""
    import torch

    module = importlib.import_module(f"kernels.{KERNELS[variant.kernel].module}")
    function = getattr(module, variant.kernel)
    siblings = [name for name in KERNELS if hasattr(module, name)]
    dtype = next(getattr(torch, name.removeprefix("torch.")) for name, t in TYPES.items() if t == variant.dtype)
    stand_ins = dict.fromkeys(siblings, DEFAULT)
    if hasattr(module, "stages"):
        stand_ins["stages"] = lambda device: 3 if arch in ROOMY else 2
    with patch.multiple(module, **stand_ins) as stand_ins:
        KERNELS[variant.kernel].launch(variant, dtype)
    arguments, options = stand_ins[variant.kernel].__getitem__.return_value.call_args
    return function, arguments, options


def specialise(function, arguments, options):
    """Specialise a launch as Triton's JIT does -> signature, constants, attributes, compiler options.

    Tensors aligned to 16 bytes and integers divisible by 16 get an attribute; the integer 1 becomes a constant.
    """
    import torch

    values = dict(zip(function.arg_names, arguments, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        value = values.pop(name)
        if function.params[i].is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif type(value) is float:
            signature[name] = "fp32"
        else:
            tensor = isinstance(value, torch.Tensor)
            signature[name] = "*" + TYPES[str(value.dtype)] if tensor else "i32"
            aligned = (value.data_ptr() if tensor else value) % 16 == 0
            if aligned and not function.params[i].do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, values


# ---------------------------------------------------------------- facts of a binary


@dataclass(frozen=True)
class Instruction:
    """op: opcode without predicate; line: (file name, line number) in the kernel's source."""

    op: str
    text: str
    line: tuple


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
    loop: int | None
    barrier: str
    int64: bool


def read_cuda(compiled, loads):
    """Facts of a CUDA binary; loads: the source lines that load K or V."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        code, labels = parse_sass(nvidia_tool("nvdisasm", "-c", "-g", file.name))
    kv = [i for i in code if i.line in loads and i.op.startswith(("LDG.", "LDGSTS."))]
    wide = sum(re.search(r"\.(128|256)\b", i.op) is not None for i in kv)
    return Facts(
        regs=int(re.search(r"REG:(\d+)", resources)[1]),
        shared=compiled.metadata.shared,
        stack=int(re.search(r"STACK:(\d+)", resources)[1]),  # LOCAL is 0 even where registers spill
        spills=sum(i.op.startswith(("LDL", "STL")) for i in code),
        wide=wide,
        narrow=len(kv) - wide,
        copies=sum(i.op.startswith("LDGSTS.") for i in kv),
        matrix=sum(re.match(r"HMMA|HGMMA|QGMMA|UTC\w*MMA", i.op) is not None for i in code),
        loop=loop_length(code, labels, kv),
        barrier=ticket_barrier(compiled.asm),
        int64=offsets_are_64_bit(compiled.asm["ttir"]),
    )


def nvidia_tool(name, *arguments):
    """Output of an NVIDIA tool that ships with Triton."""
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def parse_sass(text):
    """Parse the output of `nvdisasm -c -g` -> instructions, {label: index of the next instruction}."""
    code, labels, line = [], {}, ()
    for row in text.splitlines():
        if found := re.search(r'//## File "(.*)", line (\d+)', row):
            line = Path(found[1]).name, int(found[2])
        elif found := re.match(r"(\.L\w+):", row):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]*)(.*)", row):
            code.append(Instruction(found[1], found[2], line))
    return code, labels


def loop_length(code, labels, wanted):
    """Instructions in the shortest loop (label to backward branch) with a wanted instruction; None without a loop."""
    lengths = []
    for end, branch in enumerate(code):
        target = re.search(r"\.L\w+", branch.text)
        if branch.op.startswith("BRA") and target and labels[target[0]] <= end:
            body = code[labels[target[0]] : end + 1]
            lengths += [len(body)] if any(i in wanted for i in body) else []
    return min(lengths, default=None)


def read_amd(compiled, loads):
    """Facts of an AMD binary, from its assembly."""
    text = compiled.asm["amdgcn"]
    code = parse_gcn(text)
    kv = [i for i in code if i.line in loads and re.match(r"(global|buffer)_load", i.op)]
    wide = sum("dwordx4" in i.op for i in kv)
    return Facts(
        regs=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        shared=compiled.metadata.shared,
        stack=int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1]),
        spills=sum(i.op.startswith("scratch_") for i in code),
        wide=wide,
        narrow=len(kv) - wide,
        copies=0,
        matrix=sum(i.op.startswith("v_mfma") for i in code),
        loop=None,
        barrier=ticket_barrier(compiled.asm),
        int64=offsets_are_64_bit(compiled.asm["ttir"]),
    )


def parse_gcn(text):
    """Parse AMD assembly -> instructions."""
    files, code, line = {}, [], ()
    for row in text.splitlines():
        if found := re.match(r'\s+\.file\s+(\d+) .*"(.*)"', row):
            files[found[1]] = Path(found[2]).name
        elif found := re.match(r"\s+\.loc\s+(\d+) (\d+)", row):
            line = files.get(found[1]), int(found[2])
        elif found := re.match(r"\s+([a-z]\w*)(.*)", row):
            code.append(Instruction(found[1], found[2], line))
    return code


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
        keep(arenas, result, op in ("tt.addptr", "tt.splat", "tt.broadcast") and operands[0] in arenas)
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
    registers = REGISTERS["AMD" if amd else bits + large]
    shared = SHARED["AMD" if amd else bits + ", roomy" * (arch in ROOMY)]
    loads = facts.wide + facts.narrow
    gates = {
        f"stack {facts.stack} bytes > {STACK} or {facts.spills} spills > {SPILLS}": (
            facts.stack <= STACK and facts.spills <= SPILLS
        ),
        f"registers {facts.regs} > {registers}": facts.regs <= registers,
        f"shared {facts.shared / 1024:.4g} KB > {shared >> 10}": facts.shared <= shared,
        f"loads {facts.wide} wide + {facts.narrow} narrow": loads_are_wide(variant, facts, constants, threads),
        f"pipeline {facts.copies} of {loads} loads": amd or not kernel.streams or 0 < facts.copies == loads,
        # NVIDIA has no matrix instructions for IEEE fp32; AMD's need at least 4 rows
        "matrix": not kernel.multiplies or bits == "fp32" or (amd and m < 4) or facts.matrix > 0,
        f"barrier {facts.barrier}": facts.barrier in ("yes", "weak") or variant.kernel != "append_kernel",
        "int64": facts.int64 or not kernel.tiles,
    }
    return [name for name, passed in gates.items() if not passed]


def loads_are_wide(variant, facts, constants, threads):
    """Whether K and V are loaded 16 bytes at a time. Tiles with less than 16 bytes per thread may use smaller loads."""
    kernel = KERNELS[variant.kernel]
    if not kernel.tiles:
        return True
    pieces = constants[kernel.rows] * constants["DP"] * BYTES[variant.dtype] // 16
    if pieces < threads:
        return facts.wide + facts.narrow >= kernel.tiles
    return facts.narrow == 0 and facts.wide >= kernel.tiles * pieces // threads


# ---------------------------------------------------------------- compile and report


def inspect(job):
    """Compile a job (variant, architecture) -> its row of the table, with variant, facts and verdict."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant, arch = job
    backend, _, warp = ARCHS[arch]
    function, arguments, options = launched(variant, arch)
    signature, constants, attributes, options = specialise(function, arguments, options)
    row = {"kernel": variant.kernel, "arch": arch, **asdict(variant), "M": constants.get("M"), "constants": constants}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget(*ARCHS[arch]), options=options)
    except Exception as broken:  # Triton, LLVM and ptxas have no common exception class
        return {**row, "verdict": "compile", "error": f"{type(broken).__name__}: {broken}"}
    facts = (read_cuda if backend == "cuda" else read_amd)(compiled, kv_lines(KERNELS[variant.kernel].module))
    failed = failures(variant, arch, facts, constants, warp * options["num_warps"])
    return {**row, **asdict(facts), "verdict": ", ".join(failed) or "ok"}


def kv_lines(module):
    """(file name, line number) of the lines of a module that load K or V."""
    path = ROOT / "kernels" / f"{module}.py"
    lines = enumerate(path.read_text().splitlines(), 1)
    return {(path.name, n) for n, line in lines if re.match(r"\s*(keys|values) = tl\.load\(", line)}


def unnamed_loads(kernel):
    """The error message if loads of K or V in this kernel's module cannot be found by their names, or None."""
    path = ROOT / "kernels" / f"{KERNELS[kernel].module}.py"
    wanted = [f"{name} = tl.load(" for name in ("keys", "values")[: KERNELS[kernel].tiles]]
    if missing := [line for line in wanted if not re.search(rf"^\s*{re.escape(line)}", path.read_text(), re.M)]:
        lines = " or ".join(f"`{line}`" for line in missing)
        return f"no line {lines} in kernels/{path.name}; the inspector finds loads by these names"
    return None


def inspect_all(jobs, processes):
    """Rows in the order of the jobs. Prints progress to stderr."""
    rows = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for row in pool.imap(inspect, jobs, chunksize=2):
            rows.append(row)
            if len(rows) % 20 == 0 or len(rows) == len(jobs):
                print(f"{len(rows)} of {len(jobs)} compiled", file=sys.stderr)
    return rows


COLUMNS = (
    "kernel", "dtype", "d", "M", "arch", "regs", "shared", "stack", "spills", "wide", "narrow", "matrix", "loop",
    "barrier", "verdict",
)  # fmt: skip


def table(rows):
    """The lines of the table, with aligned columns."""
    cells = [["D" if name == "d" else name for name in COLUMNS]]
    cells += [["-" if row.get(name) is None else str(row[name]) for name in COLUMNS] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def parser():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--arch", nargs="+", default=list(ARCHS), metavar="ARCH", help=", ".join(ARCHS))
    p.add_argument("--kernel", nargs="+", default=list(KERNELS), metavar="NAME", help=", ".join(KERNELS))
    p.add_argument("--all", action="store_true", help="every head dimension, group and dtype")
    p.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    p.add_argument("--processes", type=int, default=2, metavar="N", help="parallel compilations (default 2)")
    return p


def objection(args):
    """The error message for these arguments, or None if they are valid."""
    for kind, asked, known in (("architecture", args.arch, ARCHS), ("kernel", args.kernel, KERNELS)):
        if unknown := [name for name in asked if name not in known]:
            return f"unknown {kind} {unknown[0]!r}; use {', '.join(known)}"
    source = "".join(path.read_text() for path in sorted((ROOT / "kernels").glob("*_triton.py")))
    if forgotten := set(re.findall(r"^def (\w+_kernel)\(", source, flags=re.M)) - set(KERNELS):
        return f"{', '.join(sorted(forgotten))} missing from KERNELS; add it in {Path(__file__).name}"
    if unnamed := next(filter(None, map(unnamed_loads, args.kernel)), None):
        return unnamed
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (it has no wheels for macOS and Windows)"
    if args.processes < 1:
        return f"--processes is {args.processes}; use 1 or more"


def main(argv=None):
    args = parser().parse_args(argv)
    wrong = objection(args)
    try:
        if args.json and not wrong:
            open(args.json, "a").close()  # fail now, not after minutes of compilation
    except OSError as refused:
        wrong = f"cannot write {args.json} ({refused.strerror}); give another --json FILE"
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # the worker processes must compile, not interpret
    start = time.monotonic()
    jobs = [(v, arch) for name in args.kernel for v in variants(name, args.all) for arch in args.arch]
    rows = inspect_all(jobs, args.processes)
    print("\n".join(table(rows)))
    for row in rows:
        if "error" in row:
            print(f"{row['kernel']} on {row['arch']}: {row['error']}", file=sys.stderr)
    failed = sum(row["verdict"] != "ok" for row in rows)
    seconds = round(time.monotonic() - start)
    print(f"{len(rows)} variants in {seconds} s with triton {version('triton')}: {failed or 'none'} failed a gate")
    if args.json:
        about = {"triton": version("triton"), "seconds": seconds}
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(as_command(main))
