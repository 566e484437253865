"""Promises of the repository: which folder imports which; that the pages' commands and tables are right."""

import argparse
import ast
import csv
import importlib
import itertools
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch

import run
from model import Generation, load
from model.flags import parser
from model.pruning import COMMON, METHODS
from model.pruning.describe import listing
from tests.paths import DEMO, PAGES, ROOT
from tools import evaluate, tables

README = ROOT / "README.md"
COMMITTED = {"assets", "benchmarks", "kernels", "model", "tests", "tools", "README.md", "weights.md"}
STDLIB = set(sys.stdlib_module_names)
# folder -> what its files may import besides the standard library and their own folder
ALLOWED = {
    "model": {"torch", "safetensors", "sentencepiece", "tokenizers", "PIL", "kernels"},
    "kernels": {"torch", "triton"},
    "model/pruning": {"torch"},
}


def imported(path):
    """Top-level names that a file imports; relative ones with their leading dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0] if node.level == 0 else "." * node.level + (node.module or "")


ONE_ANSWER = (
    "run.py model/prompt.py model/generate.py model/llava.py model/clip.py model/llama.py model/cache.py model/view.py "
)
ONE_ANSWER += "model/pruning/plphp.py model/pruning/budget.py"


def test_the_slow_tests_exist():
    for name in (ROOT / "tests" / "slow.txt").read_text().splitlines()[1:]:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name


def test_the_lines_are_counted():
    """Whoever adds lines raises a number here and in the README, or removes as many elsewhere."""

    def lines(paths):
        return sum(len(path.read_text().splitlines()) for path in paths)

    counted = {
        "one answer": lines(ROOT / name for name in ONE_ANSWER.split()),
        "product": lines([ROOT / "run.py", *(ROOT / "model").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]),
        "tools": lines((ROOT / "tools").rglob("*.py")),
        "tests": lines([*(ROOT / "tests").rglob("*.py"), ROOT / "tests" / "mutants.txt"]),
    }  # fmt: skip
    print(counted)
    assert counted["one answer"] <= 2437 and counted["product"] <= 13520 and counted["tools"] <= 11400
    assert counted["tests"] <= 29740
    said = README.read_text()
    for what, words in (("product", "{} lines with kernels"), ("one answer", "{} of them on the path of one answer")):
        assert words.format(f"{round(counted[what], -2):,}") in said, f"{what}: {counted[what]}"


PRODUCT = [ROOT / "run.py", *(ROOT / "model").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_import_only_what_the_design_allows(path):
    names, folder = set(imported(path)), path.parent.relative_to(ROOT).as_posix()
    assert not {"tools", "tests", "run"} & names
    if path != ROOT / "model" / "api.py" and folder != ".":  # all other files get methods as arguments
        assert not any(name.startswith(".pruning") for name in names)
    foreign = {name for name in names if not name.startswith(".")} - STDLIB
    assert foreign <= ALLOWED.get(folder, foreign)
    assert not any(name.startswith("..") for name in names)  # out of the folder
    assert ".fast" not in names or path == ROOT / "model" / "checkpoint.py"


def test_flags_are_written_out():
    """Abbreviations are disabled, because a later flag could change their meaning."""
    for path in (ROOT / "run.py", *(ROOT / "tools").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Parser", "argparse.ArgumentParser"):
                assert "allow_abbrev=False" in ast.unparse(node), f"{path.name}, line {node.lineno}"


ALONE = {  # in a process of its own: (code, stdout)
    "the model needs neither tools nor transformers": (
        "import sys; from model import *\n"
        "assert 'torch' in sys.modules and not {'transformers', 'tools', 'triton', 'matplotlib'} & set(sys.modules)",
        "",
    ),
    "names of the package are imported when they are used": (
        "import pickle, pydoc, sys, model; from model.config import InputError as known\n"
        "assert 'torch' not in sys.modules and set(model.__all__) < set(dir(model)) and not hasattr(model, 'nothing')\n"
        "from model import *; from model import chat\n"
        "assert InputError is known and chat.Generation is Generation is model.Generation and model.load is load\n"
        "assert pickle.loads(pickle.dumps(Sampling(3))) == Sampling(3)\n"
        "assert all(name in pydoc.render_doc(model, renderer=pydoc.plaintext) for name in model.__all__)",
        "",
    ),
    "everything works without a triton wheel": (
        "import sys; sys.modules['triton'] = None\nimport run\n"
        "sys.exit(run.main(['--image', 'assets/demo.png', '--prompt', 'How many objects are there?']))",
        "The picture has four objects.\n",
    ),
}


@pytest.mark.parametrize("promise", ALONE)
def test_imports(promise):
    code, printed = ALONE[promise]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


# ---------------------------------------------------------------- the pages of prose


def named(page):
    """A page as it is called in this repository: model/pruning/README.md."""
    return page.relative_to(ROOT).as_posix()


def fenced(page, kind):
    """Contents of a page's fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def parted(command):
    """Environment and words of a command, up to a pipe: `NAME=value python x | y` -> ({NAME: value}, [python, x])."""
    words = list(itertools.takewhile(lambda word: word != "|", shlex.split(command)))
    names = list(itertools.takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    return dict(n.split("=", 1) for n in names), words[len(names) :]


def commands(page, kinds=("sh", "console")):
    """(command, [lines shown below it]) of a page's blocks of these kinds, in order."""
    found = []
    for kind in kinds:
        for block in fenced(page, kind):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("$ ") or (kind == "sh" and line.strip() and not line.startswith("#")):
                    found.append((line.removeprefix("$ ").split("  #")[0].strip(), []))
                elif kind == "console":
                    found[-1][1].append(line)
    return found


COMMANDS = [(page, command, shown) for page in PAGES for command, shown in commands(page)]
INLINE = {c for page in PAGES for c in re.findall(r"`(python (?:run\.py|tools/)[^`]*)`", page.read_text())}
WRITES = {  # flags that name an output
    "--out", "--json", "--csv", "--html", "--plot", "--answers", "--run", "--show", "--figures",
}  # fmt: skip


def test_the_pages_have_commands():
    assert {"make run", "make test"} <= {c for page, c, _ in COMMANDS if page == README}
    assert {named(page) for page, _, _ in COMMANDS} >= {*tables.PAGES, "tools/README.md", "weights.md"}


@pytest.mark.parametrize("command", sorted({c for _, c, _ in COMMANDS} | INLINE))
def test_commands_of_the_pages_parse(command, monkeypatch, capsys):
    _, words = parted(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif words[:2] == ["python", "run.py"]:
        try:
            parser().parse_args(words[2:])
        except SystemExit as left:  # -h and the like leave with 0
            assert not left.code, capsys.readouterr().err
    elif words[0] == "torchrun":
        parser().parse_args(words[words.index("run.py") + 1 :])
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in words[3:] if word.startswith("tests/"))
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", [words[1], "-h"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        told = capsys.readouterr().out
        assert ended.value.code == 0
        for word in words[2:]:
            assert not word.startswith("--") or word in told, f"{words[1]} has no {word}"
    else:
        known = ("git", "cd", "cp", "cmp", "pip", "hf", "grep", "cat", "printf", "sed")
        assert words[0] in known, f"a command no test knows: {command}"


def test_no_command_of_the_pages_overwrites_what_is_committed():
    """In the blocks that a reader copies; the list of files in benchmarks/README.md says how those were made."""
    for page, command, _ in COMMANDS:
        _, words = parted(command)
        for flag, value in itertools.pairwise(words):
            written = flag in WRITES and (ROOT / value).resolve()
            committed = written and written.relative_to(ROOT).parts[0] in COMMITTED
            assert not committed, f"{named(page)}: {command}"


TOOLS = sorted(f"tools.{p.stem}" for p in (ROOT / "tools").glob("*.py") if "as_command(main)" in p.read_text())


class Parsed(Exception):
    """Raised with the parser instead of parsing."""


@pytest.mark.parametrize("name", ["run", *TOOLS])
def test_no_default_overwrites_what_is_committed(name, monkeypatch):
    def stop(parser, *_):
        raise Parsed(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(name).main()
    for action in parsed.value.args[0]._actions:
        default = action.default if WRITES & set(action.option_strings) else None
        committed = default and (ROOT / default).resolve().relative_to(ROOT).parts[:1]
        assert not committed or committed[0] not in COMMITTED, f"{name} writes {action.dest} to {default} by default"


RUNNABLE = {}  # command: what a page shows below it
for _, command, shown in COMMANDS:
    if parted(command)[1][:2] == ["python", "run.py"] and "--model" not in command:
        RUNNABLE[command] = RUNNABLE.get(command) or shown


@pytest.mark.parametrize("command", RUNNABLE)
def test_offline_commands_of_the_pages_say_what_is_shown(command, tmp_path, monkeypatch, capsys):
    shown = RUNNABLE[command]
    method = next(block for block in fenced(README, "python") if "def keep(" in block)  # the reader's own file
    (tmp_path / "my_method.py").write_text(method)
    if "TRITON_INTERPRET" in command and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without CUDA")
    environment, words = parted(command)
    for i, (flag, value) in enumerate(itertools.pairwise(words), 1):
        if flag in WRITES - {"--json"} or value.startswith("my_method.py"):
            words[i] = str(tmp_path / value)
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = run.main(words[2:])
    told = capsys.readouterr()
    assert code == 0, told.err
    if shown:
        assert told.out.splitlines() == shown


# a page whose console blocks only run run.py is left to the test above, which does so in its own process
LONG = [page for page in PAGES if not all(c.startswith("python run.py") for c, _ in commands(page, ["console"]))]


def test_worked_examples_are_found():
    found = {named(page): len(commands(page, ["console"])) for page in LONG}
    assert (
        found.keys() == {"README.md", "tools/README.md"} and found["README.md"] >= 2 and found["tools/README.md"] >= 8
    )


@pytest.mark.thorough
@pytest.mark.parametrize("page", LONG, ids=named)
def test_worked_examples_print_what_they_show(page, tmp_path):
    """The commands of the console blocks, in their order."""
    for command, lines in commands(page, ["console"]):
        placed = re.sub(r"\bout/", f"{tmp_path}/", command)
        placed = re.sub(r"\bpython ", f"{sys.executable} ", placed)
        placed = re.sub(r"\btorchrun ", f"{sys.executable} -m torch.distributed.run ", placed)
        done = subprocess.run(["bash", "-c", f"set -e -o pipefail; {placed}"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.replace(f"{tmp_path}/", "out/").splitlines() == lines, command


PYTHON = [(named(page), block) for page in PAGES for block in fenced(page, "python")]


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page} {i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_of_the_pages_runs(page, block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(block.splitlines()) <= 12
    exec(compile(block, page, "exec"), {})
    told = capsys.readouterr().out
    if "List the objects row by row." in block:
        assert "A small red cross, a large black star, a large blue square, a large orange star." in told


METHOD_BLOCKS = [block for page, block in PYTHON if re.search(r"def \w+\((self, )?(view|picture)\b", block)]


@pytest.mark.parametrize("block", METHOD_BLOCKS, ids=lambda block: re.findall(r"(?:class|def) (\w+)", block)[0])
def test_methods_of_the_pages_drop_vision_tokens(block):
    named = {"__name__": __name__}
    exec(compile(block, "page", "exec"), named)
    method = named[re.findall(r"^(?:class|def) (\w+)", block, flags=re.M)[0]]
    generation = Generation(load(DEMO), "How many objects are there?", [ROOT / "assets" / "demo.png"], prune=method)
    "".join(generation)
    assert 0.05 < generation.retention < 0.8
    assert generation.wanted is None or abs(generation.retention - generation.wanted) < 0.01


def test_the_names_that_are_reserved_are_listed():
    page = (ROOT / "model" / "pruning" / "README.md").read_text()
    listed = re.search(r"one meaning and range in all methods: (.*?)\.\n", page, flags=re.S)[1]
    assert re.findall(r"`(\w+)`", listed) == list(COMMON)


def anchors(page):
    """What links may name behind a # in a page: its headings, in the way of GitHub."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_pictures_of_a_page_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            place = page.parent / path if path else page
            assert place.exists(), target
            assert not anchor or anchor in anchors(place), target


def test_the_listed_methods_are_those_that_exist():
    assert [line.split()[0] for line in listing().split("\n\n")[0].splitlines() if line[0] != " "] == list(METHODS)


def test_the_readme_is_read_in_five_minutes():
    assert len(README.read_text().splitlines()) <= 150


# ---------------------------------------------------------------- tables


def test_the_tables_of_the_pages_are_those_of_the_code_and_of_the_results():
    found = [name for page in PAGES for _, name, _ in tables.MARKED.findall(page.read_text())]
    assert sorted(found) == sorted(tables.TABLES)  # each once
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.filled(text) == text, f"{page}: run python tools/tables.py --write"


def test_the_results_are_those_of_the_weights_that_are_shipped():
    about, short, *_ = (ROOT / "benchmarks" / "pruning-accuracy.md").read_text().split("\n\n")
    assert evaluate.fingerprint(ROOT / "assets" / "demo") in about and short == tables.pruning()


def test_the_first_table_of_the_readme_is_the_measured_one():
    with open(ROOT / "benchmarks" / "pruning-accuracy.csv", newline="") as file:
        measured = {(row["method"], row["retention"]): float(row["long"]) for row in csv.DictReader(file)}
    _, _, behind = README.read_text().partition("| long answers right, % | 0.5 kept | 0.3 kept | 0.15 kept |\n")
    shown = [[float(cell) for cell in line.strip("|").split("|")[1:]] for line in behind.splitlines()[1:6]]
    retentions = "0.5", "0.3", "0.15"
    rows = [[measured["none", ""]] * 3]
    rows += [[measured[name, f] for f in retentions] for name in ("plphp", "plphp as shipped", "plphp ahead+grid")]
    rows += [[max(measured["random", f], measured["grid", f]) for f in retentions]]
    assert shown == rows
    with open(ROOT / "benchmarks" / "pruning-accuracy.csv", newline="") as file:
        kept = [(float(row["retention"]), float(row["kept"])) for row in csv.DictReader(file) if row["retention"]]
    assert all(abs(100 * wanted - share) <= 1.5 for wanted, share in kept)  # the rows compare equal bytes


def test_a_page_is_filled_between_its_comments(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| 1 |", "two-b": lambda: "| 2 |\n| 3 |"})
    end = "<!-- end of table -->"
    text = f"a\n<!-- table one -->\nold\n{end}\nb <!-- table two-b -->\n{end}"
    filled = f"a\n<!-- table one -->\n| 1 |\n{end}\nb <!-- table two-b -->\n| 2 |\n| 3 |\n{end}"
    assert tables.filled(text) == filled == tables.filled(filled)
