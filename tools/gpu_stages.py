"""The stages of gpu.py: which commands they run on a GPU, and which in a rehearsal on a CPU."""

import os
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec

KERNEL_TESTS = (
    "tests/test_triton.py tests/test_ragged_decode.py tests/test_ragged_pack.py tests/test_window_scores.py "
    "tests/test_quantise.py tests/test_slot_scores.py"
)
MODEL_TESTS = (
    "tests/test_fast.py tests/test_cache.py tests/test_batch.py tests/test_generate.py tests/test_kv_dtype.py "
    "tests/test_h2o.py tests/test_attend.py tests/test_narrow.py tests/test_yopo.py"
)
CUDA_TESTS = "tests/test_bench_decode.py::test_a_step_on_cuda_neither_allocates_nor_waits"
PYTEST, BENCH, DECODE = "PYTHON -m pytest", "PYTHON tools/bench_kernels.py", "PYTHON tools/bench_decode.py"
PREFILL = "PYTHON tools/bench_prefill.py"
SEVEN = f"{DECODE} --shape llava-1.5-7b --prune none plphp:dr=0@0.3 --engines ours hf-sdpa --rounds 2"
SMALL = f"{BENCH} ragged_decode_append --shapes demo --mbytes 0.01 --no-flex --copies 1 --rounds 2"
TINY = f"{DECODE} --shape tiny --device cpu --dtype fp32 --new-tokens 3 --rounds 1"


@dataclass(frozen=True)
class Stage:
    """commands and rehearsal, one per line; PYTHON, OUT and WORKERS are filled in. seconds: time limit."""

    what: str
    seconds: int
    commands: str
    rehearsal: str


STAGES = {  # the most informative first, because a GPU may be taken away
    "tests": Stage(
        "the kernels' tests on this device", 500,
        f"{PYTEST} WORKERS {KERNEL_TESTS} {CUDA_TESTS} --junitxml OUT/tests.xml",
        f"{PYTEST} tests/test_triton.py -k more_query_heads --junitxml OUT/tests.xml",
    ),
    "smoke": Stage(
        "every kernel once, small", 240,
        f"{BENCH} --preset smoke --json OUT/smoke.json",
        f"{BENCH} window_scores --shapes demo --tokens 40 --copies 1 --rounds 2 --json OUT/smoke.json",
    ),
    "kernels": Stage(
        "attention over sizes, skew and G, with the present tiles", 500,
        f"{BENCH} --preset gpu --rounds 7 --json OUT/kernels.json",
        f"{SMALL} --retention 0.2 --layouts plphp --json OUT/kernels.json",
    ),
    "tune": Stage(
        "other tiles, warps and pipeline stages", 520,
        f"{BENCH} --tune --out OUT/tuned.json --json OUT/tune.json",
        f"{BENCH} --tune --shapes demo --mbytes 0.01 --rounds 2 --copies 1 --out OUT/tuned.json --json OUT/tune.json",
    ),
    "tuned": Stage(
        "attention again, with the tiles found by `tune`", 500,
        f"cp OUT/tuned.json kernels/tuned.json\n{BENCH} --preset gpu --rounds 7 --json OUT/tuned-kernels.json",
        f"{SMALL} --skew 1 8 --json OUT/tuned-kernels.json",
    ),
    "decode": Stage(
        "whole answers of the 7B shape, batches, pruned and not, beside transformers", 520,
        f"{SEVEN} --workloads one one-b8 one-b32 --json OUT/decode.json",
        f"{TINY} --workloads 2x24,8+8 --prune none plphp:dr=0@0.5 --engines ours hf-sdpa --json OUT/decode.json",
    ),
    "pictures": Stage(
        "the same with many pictures", 520,
        f"{SEVEN} --workloads tiles eight-images long --json OUT/pictures.json\n"
        f"{PREFILL} --shape wide-next --dtype bf16 --json OUT/prefill.json",
        f"{TINY} --workloads 1x24,24,24+8 --prune none --engines ours --json OUT/pictures.json\n"
        f"{PREFILL} --shape tiny-next --device cpu --rounds 1 --json OUT/prefill.json",
    ),
    "model": Stage(
        "the model's tests on this device", 500,
        f"{PYTEST} {MODEL_TESTS} tests/test_out_of_memory.py --junitxml OUT/model.xml",
        f"{PYTEST} tests/test_cache.py -k position_is_not_the_length --junitxml OUT/model.xml",
    ),
    "compile": Stage(
        "the decode step, compiled without a GPU", 240, "",  # only rehearsed: a GPU's minutes are for running
        "PYTHON tools/inspect_kernels.py --arch sm_90 --kernel append_kernel --json OUT/compile.json",
    ),
}  # fmt: skip


def commands(stage, out, rehearse):
    """The words of each command of a stage."""
    workers = f"-n {min(8, os.cpu_count())} --dist worksteal" if find_spec("xdist") else ""
    text = (stage.rehearsal if rehearse else stage.commands).replace("WORKERS", workers)
    text = text.replace("OUT/", f"{shlex.quote(str(out))}/").replace("PYTHON", shlex.quote(sys.executable))
    return [shlex.split(line) for line in text.splitlines()]
