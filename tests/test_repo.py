"""What the repository promises about itself: who imports whom, and that the README's commands are real."""

import ast
import csv
import itertools
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch

import run
from model.pruning import METHODS
from model.pruning.describe import listing
from tests.paths import ROOT
from tools import evaluate, method_table

README = ROOT / "README.md"
STDLIB = set(sys.stdlib_module_names)
# folder -> what its files may import beside the standard library and their own folder
ALLOWED = {
    "model": {"torch", "safetensors", "sentencepiece", "PIL", "kernels"},
    "kernels": {"torch", "triton"},
    "model/pruning": {"torch"},
}


def imported(path):
    """Top-level names that a file imports; relative ones with their dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0] if node.level == 0 else f".{node.module or ''}"


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_the_design_allows(folder):
    for path in (ROOT / folder).glob("*.py"):
        names = set(imported(path))
        if path != ROOT / "model" / "api.py":  # methods are handed to the rest of the model
            assert not any(name.startswith(".pruning") for name in names), path
        foreign = {name for name in names if not name.startswith(".")} - STDLIB - ALLOWED[folder]
        assert not foreign, f"{path.name} imports {foreign}"


def test_flags_are_written_out():
    """An abbreviation that some later flag shares would change its meaning, so none is taken."""
    for path in (ROOT / "run.py", *(ROOT / "tools").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Parser", "argparse.ArgumentParser"):
                assert "allow_abbrev=False" in ast.unparse(node), f"{path.name}, line {node.lineno}"


def test_the_model_never_needs_the_tools_or_transformers():
    code = "import sys, model; assert not {'transformers', 'tools', 'triton', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_everything_works_without_a_triton_wheel():
    code = (
        "import sys; sys.modules['triton'] = None\nimport run\n"
        "sys.exit(run.main(['--image', 'assets/demo.png', '--prompt', 'How many objects are there?']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "The picture has four objects.\n"), done.stderr


def fenced(kind):
    """Contents of the fenced blocks of a kind in README.md and weights.md."""
    text = README.read_text() + (ROOT / "weights.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.M | re.S)


def parted(command):
    """Environment and words of a command: `NAME=value python x` -> ({NAME: value}, [python, x])."""
    words = shlex.split(command)
    names = list(itertools.takewhile(lambda w: re.match(r"[A-Z_]+=", w), words))
    return dict(n.split("=", 1) for n in names), words[len(names) :]


def commands():
    """(command, the lines shown below it) of every command."""
    for text in fenced("sh") + fenced("console"):
        command, output = None, []
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("$ ") or (text in fenced("sh") and line.strip() and not line.startswith("#")):
                if command:
                    yield command, output
                command, output = line.removeprefix("$ ").split("  #")[0].strip(), []
            elif command:
                output.append(line)
        if command:
            yield command, output


COMMANDS = list(commands())


def test_the_readme_has_commands():
    assert {"make run", "make test"} <= {c for c, _ in COMMANDS} and len(COMMANDS) >= 5


@pytest.mark.parametrize("command", sorted({c for c, _ in COMMANDS}))
def test_commands_of_the_readme_parse(command, monkeypatch, capsys):
    _, words = parted(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
    elif words[:2] == ["python", "run.py"]:
        run.parser().parse_args(words[2:])
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", [words[1], "-h"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        told = capsys.readouterr().out
        assert ended.value.code == 0
        for word in words[2:]:
            assert not word.startswith("--") or word in told, f"{words[1]} has no {word}"
    else:
        assert words[0] in ("git", "cd", "pip", "hf"), f"a command no test knows: {command}"


RUNNABLE = [(c, out) for c, out in COMMANDS if parted(c)[1][:2] == ["python", "run.py"] and "--model" not in c]


@pytest.mark.parametrize(("command", "shown"), RUNNABLE, ids=[c for c, _ in RUNNABLE])
def test_offline_commands_of_the_readme_say_what_it_shows(command, shown, tmp_path, monkeypatch, capsys):
    method = next(block for block in fenced("python") if "def keep(" in block)  # the reader's own file
    (tmp_path / "my_method.py").write_text(method)
    if "TRITON_INTERPRET" in command and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without CUDA")
    for written in ("my_method.py", "out/"):
        command = command.replace(written, str(tmp_path / written))
    environment, words = parted(command)
    monkeypatch.chdir(ROOT)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = run.main(words[2:])
    told = capsys.readouterr()
    assert code == 0, told.err
    if shown:  # the answer is the first line; below it the README may show --stats, whose times are its own
        assert told.out.rstrip("\n") == shown[0]


def test_python_of_the_readme_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = fenced("python")
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 12
        exec(compile(block, "README.md", "exec"), {})
    assert "A small red cross, a large black star, a large blue square, a large orange star." in capsys.readouterr().out


def test_files_named_in_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_methods_of_the_readme_and_of_the_help_are_those_that_exist():
    text = README.read_text()
    begin, end = text.index(method_table.BEGIN) + len(method_table.BEGIN), text.index(method_table.END)
    assert text[begin:end].strip() == method_table.table()
    assert [line.split()[0] for line in listing().split("\n\n")[0].splitlines() if line[0] != " "] == list(METHODS)


def test_the_tables_of_the_readme_are_the_measured_ones():
    table = (ROOT / "assets" / "demo-accuracy.md").read_text().strip()
    about, short, *_ = (ROOT / "benchmarks" / "pruning-accuracy.md").read_text().split("\n\n")
    assert table in README.read_text() and short.startswith("| long answers right") and short in README.read_text()
    assert evaluate.fingerprint(ROOT / "assets" / "demo") in about  # of these weights


def test_the_first_table_of_the_readme_is_the_measured_one():
    with open(ROOT / "benchmarks" / "pruning-accuracy.csv", newline="") as file:
        measured = {(row["method"], row["retention"]): float(row["long"]) for row in csv.DictReader(file)}
    lines = (
        README.read_text().partition("| long answers right, % | 0.5 kept | 0.3 kept | 0.15 kept |\n")[2].splitlines()
    )
    shown = [[float(cell) for cell in line.strip("|").split("|")[1:]] for line in lines[1:6]]
    retentions = "0.5", "0.3", "0.15"
    rows = [[measured["none", ""]] * 3]
    rows += [[measured[name, f] for f in retentions] for name in ("plphp", "plphp as shipped", "plphp ahead")]
    rows += [[max(measured["random", f], measured["grid", f]) for f in retentions]]
    assert shown == rows
