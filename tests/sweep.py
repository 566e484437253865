"""Run every test that draws numbers with other seeds, to check that its bounds do not depend on lucky ones.

    python tests/sweep.py                                     # 20 bases, one thread and two; takes hours
    python tests/sweep.py --bases 1 5 --threads 1 -- tests/test_cache.py -k torch    # bases 1 to 4, some of the tests

A first run with base 0 records which tests draw numbers. Exit 1 if any test fails with any base.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(arguments, **environment):
    """Run pytest in its own process -> (exit code, output)."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    names = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=names)
    return done.returncode, done.stdout


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bases", nargs=2, type=int, default=(1, 21), metavar=("FIRST", "END"))
    p.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    p.add_argument("arguments", nargs="*", help="arguments for pytest: files, -k")
    args = p.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "draws.txt"
        code, output = run(args.arguments, TEST_DRAWS=listed)
        if code:
            print(output)
            return 1
        tests = listed.read_text().splitlines()
        print(f"{len(tests)} tests draw numbers", flush=True)
        for base in range(*args.bases):
            for threads in args.threads:
                asked = f"@{listed}", f"--hypothesis-seed={base}"
                code, output = run(asked, TEST_SEED=base, OMP_NUM_THREADS=threads)
                lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
                print(f"base {base}, {threads} threads: {len(lines)} failed", *lines, sep="\n  ", flush=True)
                failed += lines or [output] * (code != 0)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
