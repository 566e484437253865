"""The first minutes on a GPU, in stages of less than nine minutes: tests, kernels, tuning, whole answers. `make gpu`.

    python tools/gpu.py                          # all stages that are not done, then out/gpu/report.md
    python tools/gpu.py --stage kernels tune     # only these; without a name none, only the report
    python tools/gpu.py --list                   # the stages with their commands
    python tools/gpu.py --rehearse               # tiny sizes on a CPU, in the interpreter, and ahead-of-time compiling

A stage runs other commands of this repository and writes, under --out, their output (STAGE.log), their JSON files and
how it ended (STAGE.status.json). A stage that fails or reaches its time limit does not stop the next. Run again, the
command skips stages that passed; files of several loans of one kind of GPU may be copied together. `tuned` copies the
table that `tune` wrote to kernels/tuned.json, which later runs then use. Needs no network and installs nothing.

Exit codes: 0 all stages that were asked for have passed; 1 one failed; 2 wrong arguments, or no GPU; 130 Ctrl-C.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.command import as_command, exit_code, flags, one_of, say, write_json  # noqa: E402
from tools.gpu_report import content, report  # noqa: E402
from tools.gpu_stages import STAGES, commands  # noqa: E402


def run(name, stage, out, rehearse):
    """Run a stage's commands, all of them, and write its log and status -> how it ended: its exit code, or 124 for a
    stage that reached its time limit."""
    start, code = time.monotonic(), 0
    alone = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    with open(out / f"{name}.log", "w") as log:
        for words in commands(stage, out, rehearse):
            print("$", shlex.join(words), file=log, flush=True)
            left = stage.seconds - (time.monotonic() - start)
            code = finished(words, log, os.environ | {"PYTHONUNBUFFERED": "1"} | alone, left) or code
    status = {"code": code, "seconds": round(time.monotonic() - start), "limit": stage.seconds, "rehearsal": rehearse}
    write_json(out / f"{name}.status.json", status | {"date": time.strftime("%Y-%m-%d %H:%M")})
    return code


def finished(words, log, environment, seconds):
    """Run a command -> its exit code. After `seconds` it and its children get Ctrl-C, then they are killed: 124."""
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(seconds, 0.1))
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as why:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes its results
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(why, KeyboardInterrupt):
            raise
        return 124


def passed(name, out, rehearse):
    status = content(out / f"{name}.status.json")
    return status.get("code") == 0 and status.get("rehearsal") == rehearse


def gpu(args):
    from model import InputError  # imports torch; -h must not wait for that

    known = [name for name, stage in STAGES.items() if commands(stage, "OUT", args.rehearse)]
    if args.list:
        for name in known:
            print(f"{name}: {STAGES[name].what} (at most {STAGES[name].seconds} s)")
            print(*(f"  {shlex.join(words)}" for words in commands(STAGES[name], "OUT", args.rehearse)), sep="\n")
        return 0
    names = known if args.stage is None else args.stage
    if foreign := [name for name in names if name not in known]:
        raise InputError(f"stage {foreign[0]} is only rehearsed; add --rehearse")
    if names and not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            raise InputError("no GPU is available; run this on a machine with one, or add --rehearse")
    out = Path(args.out or ROOT / "out" / ("rehearsal" if args.rehearse else "gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.md"
    for number, name in enumerate(names, 1):
        what = f"{number} of {len(names)}: {name}, {STAGES[name].what}"
        if passed(name, out, args.rehearse) and not args.again:
            say(f"{what}: done before")
            continue
        say(f"{what}, at most {STAGES[name].seconds} s")
        if code := run(name, STAGES[name], out, args.rehearse):
            say(f"  {'time limit' if code == 124 else f'exit code {code}'}; see {out / name}.log")
        page.write_text(report(out, known), encoding="utf-8")  # now, because a GPU may be taken away
    page.write_text(report(out, known), encoding="utf-8")
    say(f"report: {page}")
    return 0 if all(passed(name, out, args.rehearse) for name in names) else 1


def main(argv=None):
    p = flags(__doc__)
    p.add_argument("--out", metavar="DIR", help="folder of results (default out/gpu, or out/rehearsal)")
    p.add_argument("--stage", nargs="*", type=one_of(*STAGES), metavar="NAME", help="%(type)s (default: all)")
    p.add_argument("--again", action="store_true", help="repeat stages that passed")
    p.add_argument("--list", action="store_true", help="print the stages and their commands")
    p.add_argument("--rehearse", action="store_true", help="every stage in tiny sizes, without a GPU")
    return exit_code(gpu, p.parse_args(argv), interrupted="interrupted; the same command continues with this stage")


if __name__ == "__main__":
    sys.exit(as_command(main))
