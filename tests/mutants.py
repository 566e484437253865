"""Scripted faults: each one-line change of the code must make its named test fail.

    python tests/mutants.py             # all of them, two at a time; exit 1 if one survives
    python tests/mutants.py rope eps    # those whose name contains one of the words
    python tests/mutants.py --tenth     # every tenth one of each file, as in `make test`
    python tests/mutants.py --rest      # all others
    python tests/mutants.py --tested    # skip the check that the tests pass without a fault

The mutants are in mutants.txt. One that survives means that no test checks some promise. Runs in a copy; the working
tree stays unchanged.
"""

import argparse
import gc
import itertools
import multiprocessing.connection
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

# as in tests/conftest.py, before torch is imported
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test needs one
sys.dont_write_bytecode = True
if not os.path.exists("/dev/nvidiactl"):  # no CUDA; torch could tell, but imports triton
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402, F401  import the tests' libraries once, before forking
import PIL.Image  # noqa: E402, F401
import pytest  # noqa: E402
import safetensors.torch  # noqa: E402, F401
import sentencepiece  # noqa: E402, F401
import torch  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds for the test of one mutant

# not imported as a module: a forked process must find tools/ in its own tree
transformers = runpy.run_path(str(ROOT / "tools" / "hf.py"))["import_transformers"]()
transformers.LlavaForConditionalGeneration  # noqa: B018  loaded on first access
transformers.LlamaTokenizer  # noqa: B018
transformers.AttentionInterface  # noqa: B018


def read_mutants(text):
    """The table in mutants.txt -> {name: (file, text that occurs in it once, replacement, test that must fail)}.

    A section `== file` has an entry `name | test` per mutant; lines with - are replaced by those with +, as in a patch.
    """
    mutants = {}
    for section in re.split("^== ", text, flags=re.M)[1:]:
        file, entries = section.split("\n", 1)
        for name, test, change in re.findall(r"^(\S.*) \| (.*)\n((?:  [-+].*\n)+)", entries, flags=re.M):
            old, new = (re.findall(rf"^  [{sign}] ?(.*)", change, flags=re.M) for sign in "-+")
            mutants[name] = file, "\n".join(old), "\n".join(new), test
    return mutants


MUTANTS = read_mutants(Path(__file__).with_suffix(".txt").read_text())


def copy_of_tree(folder):
    """Copy the repository without large and generated files to a new folder."""
    skip = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache", ".hypothesis")
    return Path(shutil.copytree(ROOT, folder, ignore=skip))


def mistakes(mutants):
    """Errors in the table of mutants: a line for each whose test is missing or whose text does not occur once."""
    found = []
    for name, (file, old, _, test) in mutants.items():
        path = ROOT / file
        count = path.read_text().count(old) if path.exists() else 0
        if count != 1:
            found.append(f"{name}: the text to replace occurs {count} times in {file}")
        where, _, function = test.partition("::")
        if f"def {function.partition('[')[0]}(" not in (ROOT / "tests" / where).read_text():
            found.append(f"{name}: test {test} does not exist")
    return found


def run_tests(tree, tests):
    """Run tests (names without their folder) in a tree -> (exit code, end of the output).

    Call it in a process forked after the imports, which take longer than most tests.
    """
    os.chdir(tree)
    sys.path[:] = [p for p in sys.path if p and Path(p).resolve() != ROOT / "tests"]
    sys.modules["__main__"].__file__ = None  # processes that a test spawns need not run this file
    with open("output.txt", "wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    signal.signal(signal.SIGALRM, lambda *_: pytest.exit(f"no result after {LIMIT} s", returncode=99))
    signal.alarm(LIMIT if len(tests) == 1 else 0)
    options = ["-x", "-q", "--no-header", "--assert=plain", "-p", "no:cacheprovider", "--rootdir", str(tree)]
    code = int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))
    sys.stdout.flush()
    return code, Path("output.txt").read_text(errors="replace")[-2000:]


def tried(work):
    """(tree without a fault, tests, name of a mutant or None) -> (name, exit code, end of the output, seconds).

    The tree is copied by hard links, except the file with the fault, which is written separately.
    """
    clean, tests, name = work
    started = time.time()
    with tempfile.TemporaryDirectory(dir=clean.parent) as folder:
        tree = Path(shutil.copytree(clean, Path(folder) / "repo", copy_function=os.link))
        if name:
            file, old, new, _ = MUTANTS[name]
            text = (tree / file).read_text()
            (tree / file).unlink()
            (tree / file).write_text(text.replace(old, new))
        code, output = run_tests(tree, tests)
    return name, code, output, time.time() - started


def in_processes(work, todo, processes):
    """Yield work(item) for each item as soon as it is done, each in a forked process of its own.

    Not with a Pool: its processes are daemons, which may not start the workers that some tests start.
    """
    fork, todo, running = multiprocessing.get_context("fork"), iter(todo), {}

    def start(item):
        ours, theirs = fork.Pipe(duplex=False)
        running[ours] = process = fork.Process(target=lambda: theirs.send(work(item)))
        process.start()
        theirs.close()

    try:
        for item in itertools.islice(todo, processes):
            start(item)
        while running:
            for ours in multiprocessing.connection.wait(list(running)):
                try:
                    yield ours.recv()
                except EOFError:
                    sys.exit("a process ended without a result; run its test alone")
                running.pop(ours).join()
                for item in itertools.islice(todo, 1):
                    start(item)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def try_all(names, tests, clean, processes):
    """Names of the mutants that were not killed. Prints each result; exits at once if tests fail without a fault."""
    alive = []
    gc.freeze()  # keep the objects so far out of later garbage collections
    healthy = [(clean, half, None) for half in (tests[::2], tests[1::2]) if half]  # a test that always fails kills none
    for _, code, output, _ in in_processes(tried, healthy, processes):
        if code:
            sys.exit(f"the tests fail without a fault, exit code {code}\n{output}")
    spoilt = [(clean, [MUTANTS[name][3]], name) for name in names]
    for count, (name, code, output, seconds) in enumerate(in_processes(tried, spoilt, processes), 1):
        verdict = {0: "survived", 1: "killed"}.get(code, f"pytest exited with {code}: {output[-600:]}")
        print(f"{count:3} of {len(names)}: {verdict:9} {name} ({seconds:.0f} s)", flush=True)
        if verdict != "killed":
            alive.append(name)
    return alive


STARTING = "test_parallel.py", "test_replicas.py"


def main(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("words", nargs="*", help="parts of names")
    p.add_argument("--tenth", action="store_true", help="every tenth mutant of each file")
    p.add_argument("--rest", action="store_true", help="those that --tenth leaves out")
    p.add_argument("--tested", action="store_true", help="all tests have just passed; do not run them first")
    p.add_argument("--processes", type=int, default=2, metavar="N", help="parallel processes (default 2)")
    args = p.parse_args(argv)
    wrong = mistakes(MUTANTS)
    if wrong:
        print(*wrong, sep="\n")
        return 1
    names = list(MUTANTS)
    by_file = itertools.groupby(MUTANTS, lambda name: MUTANTS[name][0])
    tenth = {name for _, group in by_file for name in list(group)[::10]}
    if args.tenth or args.rest:
        names = [name for name in names if (name in tenth) == args.tenth]
    if (args.tenth or args.rest) and (os.cpu_count() or 1) < 4:  # half a minute each on two cores
        slow = [n for n in names if MUTANTS[n][3].startswith(STARTING)]
        print(f"{len(slow)} mutants whose tests start processes are left out on fewer than four cores")
        names = [n for n in names if n not in slow]
    names = [n for n in names if not args.words or any(w in n for w in args.words)]
    tests = sorted({MUTANTS[n][3] for n in names})
    tests = tests[:4] if args.tested else tests  # a few still check that the copied tree works
    names.sort(key=lambda n: MUTANTS[n][3])
    with tempfile.TemporaryDirectory() as folder:
        try:
            alive = try_all(names, tests, copy_of_tree(Path(folder) / "clean"), args.processes)
        except KeyboardInterrupt:
            print("interrupted")
            return 130
    print(f"{len(names) - len(alive)} of {len(names)} mutants killed", *(f"\n  not: {name}" for name in alive))
    return 1 if alive or not names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
