"""The two checkpoint tools: output of make_checkpoint verifies and runs; verify_checkpoint finds faults."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.checkpoint import load
from model.config import InputError, read_config
from model.generate import Generation
from model.sampling import Sampling
from model.tokenizer import Tokenizer
from tools import make_checkpoint, verify_checkpoint

TOOLS = Path(__file__).resolve().parent.parent / "tools"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny checkpoint in several files. Tests that change something take `copy`."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    assert make_checkpoint.main([str(folder), "--shape", "tiny", "--shard-gb", "0.0001"]) == 0
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def weights_of(folder):
    """All tensors of a folder by name."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def only_error(capsys):
    """The single line on stderr, with cause and remedy."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "; " in line
    return line


# ---------------------------------------------------------------- written checkpoints


def test_verifies(made, capsys):
    assert verify_checkpoint.main([str(made)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == "all fine"
    parameters = sum(t.numel() for t in weights_of(made).values())
    for fact in (
        "2 heads, 28 px in patches of 14",
        "features of layer -2, the output of layer 2",
        "4 tokens per picture",
        "vocabulary 512",
        "<image> is 510\n",
        "dummy space before every segment\n",
        "not a Vicuna tokenizer (400 pieces, not 32000): no golden ids",
        "model-00001-of-",
        f"{parameters:,} parameters, stored as F16",
        "llava (no chat template in the folder)",
        "crop to 28 px",
    ):
        assert fact in out, fact


def test_runs(made):
    generation = Generation(
        load(made), "What is this?", [Image.new("RGB", (40, 30), "red")], Sampling(max_new_tokens=4, seed=1)
    )
    for _ in generation:
        pass
    assert generation.vision_tokens == 4
    assert len(generation.token_ids) == 4 and max(generation.token_ids) < make_checkpoint.PIECES


def test_files_are_cut_and_indexed(made):
    index = json.loads((made / INDEX).read_text())
    files = sorted(path.name for path in made.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert not list(made.glob("*.tmp"))
    total = 0
    for name in files:
        with safe_open(made / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        tensors = load_file(made / name)
        assert all(index["weight_map"][key] == name for key in tensors)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 1e5 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"].values()) == set(files)


def test_weights_do_not_depend_on_the_cut(made, tmp_path):
    first = weights_of(made)
    for seed, same in ((0, True), (1, False)):
        make_checkpoint.make(tmp_path / str(seed), "tiny", seed=seed)
        other = weights_of(tmp_path / str(seed))
        assert other.keys() == first.keys()
        assert all(torch.equal(first[name], other[name]) for name in first) == same


def test_values_and_dtype(tmp_path):
    make_checkpoint.make(tmp_path / "c", "tiny", "bf16")
    for name, t in weights_of(tmp_path / "c").items():
        assert t.dtype == torch.bfloat16
        if name.endswith("bias"):
            assert not t.any()
        elif "norm" in name:
            assert (t == 1).all()
        else:
            assert t.float().std().item() == pytest.approx(0.02, rel=0.4 if t.numel() < 100 else 0.1), name
    assert read_config(tmp_path / "c").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("shape", "parameters", "files"), [("llava-1.5-7b", 7_063_427_072, 3), ("llava-1.5-13b", 13_351_494_656, 6)]
)
def test_published_shapes(shape, parameters, files, tmp_path, monkeypatch):
    """Everything except the 14 GB: names, sizes and the split into files."""
    seen = {}
    monkeypatch.setattr(make_checkpoint, "prepare", lambda folder, size: folder.mkdir())
    monkeypatch.setattr(make_checkpoint, "write_weights", lambda *args: seen.update(shards=args[1], shapes=args[2]))
    make_checkpoint.make(tmp_path / "big", shape)
    assert sum(torch.Size(s).numel() for s in seen["shapes"].values()) == parameters
    assert [name for shard in seen["shards"] for name in shard] == list(seen["shapes"])
    assert len(seen["shards"]) == files
    config = read_config(tmp_path / "big")
    assert (config.text_config.vocab_size, config.text_config.rms_norm_eps) == (32064, 1e-5)
    assert (config.image_token_index, config.image_tokens) == (32000, 576)
    assert Tokenizer(tmp_path / "big").encode("<image>")[-1] == 32000


def test_tokenizer_falls_back_to_bytes(made):
    tokenizer = Tokenizer(made)
    for text in ("USER: what is this? ASSISTANT:", "Zürich, ½ 狐"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# ---------------------------------------------------------------- refused output folders


def test_refuses_a_folder_with_something_in_it(made, capsys):
    before = sorted(made.iterdir())
    assert make_checkpoint.main([str(made), "--shape", "tiny"]) == 2
    assert "not an empty folder" in only_error(capsys)
    assert sorted(made.iterdir()) == before


def test_refuses_a_full_disk(tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(make_checkpoint.shutil, "disk_usage", lambda path: usage(10**12, 0, 14 * 10**9))
    monkeypatch.setattr(make_checkpoint, "write_weights", None)  # avoids 14 GB if the check fails
    assert make_checkpoint.main([str(tmp_path / "a" / "b"), "--shape", "llava-1.5-7b"]) == 2
    assert "needs 14.13 GB" in only_error(capsys)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags", [["--shape", "huge"], ["--shape", "tiny", "--shard-gb", "0"], []])
def test_refuses_flags(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        make_checkpoint.main([str(tmp_path / "x"), *flags])
    assert left.value.code == 2
    only_error(capsys)


# ---------------------------------------------------------------- faulty checkpoints


def remove_a_file(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def truncate_a_file(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-10])


def change_first(folder, change):
    """Apply change(tensors) to the first weight file."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut_a_tensor(tensors):
    name = "vision_tower.vision_model.embeddings.class_embedding"
    tensors[name] = tensors[name][:-1].clone()


def quantise(tensors):
    tensors.update({name: t.to(torch.int8) for name, t in tensors.items()})


def point_outside(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["language_model.lm_head.weight"] = "../x.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def leave_pickles_only(folder):
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def forget_the_image_token(folder):
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={})
    (folder / "added_tokens.json").unlink()


def shrink_the_vocabulary(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config={**text, "vocab_size": 64})


FAULTS = {
    "file missing": (remove_a_file, "1 of 5 weight files are missing"),
    "file truncated": (truncate_a_file, "truncated"),
    "config cut off": (lambda f: (f / "config.json").write_text('{"model_type": "ll'), "not readable JSON"),
    "config of another kind": (lambda f: edit_json(f / "config.json", model_type="llava_video"), "'llava_video'"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "wrong shape": (lambda f: change_first(f, cut_a_tensor), "has shape [31], but config.json implies [32]"),
    "tensor missing": (lambda f: change_first(f, lambda t: t.popitem()), "1 tensors missing"),
    "tensor too many": (
        lambda f: change_first(f, lambda t: t.update({"extra.weight": torch.ones(1)})),
        "1 tensors unexpected (extra.weight)",
    ),
    "quantised": (lambda f: change_first(f, quantise), "stored as I8"),
    "index points outside": (point_outside, "points outside the folder"),
    "pickles only": (leave_pickles_only, "pickled"),
    "no <image>": (forget_the_image_token, "no <image> token"),
    "tokenizer larger than embedding": (shrink_the_vocabulary, "400 pieces and the model 64"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.model"),
    "another picture size": (
        lambda f: edit_json(f / "preprocessor_config.json", size={"shortest_edge": 336}),
        "the vision tower takes 28",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_line(fault, copy, capsys):
    spoil, words = FAULTS[fault]
    spoil(copy)
    assert verify_checkpoint.main([str(copy), "--sha256"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and "; " in line and words in line
    assert "all fine" not in out


def test_sha256(made, capsys):
    assert verify_checkpoint.main([str(made), "--sha256"]) == 0
    out, err = capsys.readouterr()
    for path in made.glob("*.safetensors"):
        assert f"sha256      {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" in out
        assert path.name in err  # progress


def test_sha256_in_pieces(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5)
    assert verify_checkpoint.digest(path, chunk=100) == hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- golden ids

EVERY = [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618, 29915, 29879, 278, 2793, 310, 278, 1967, 29973, 13, 22933]
EVERY += [9047, 13566, 29901]
FIRST = EVERY[:6] + EVERY[7:]


@pytest.mark.parametrize(("ids", "words"), [(EVERY, "llava-1.5-7b-hf"), (FIRST, "v1.6")])
def test_golden_ids_match(ids, words):
    asked = []
    note = verify_checkpoint.golden_note(lambda text: asked.append(text) or list(ids), 32000)
    assert note.startswith("match: ") and words in note
    assert asked == ["USER: <image>\nWhat's the content of the image?\nASSISTANT:"]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (EVERY[1:], "id number 1 is 3148 instead of 1"),
        (FIRST[:9] + [7] + FIRST[10:], "id number 10 is 7 instead of 29879"),
        (EVERY[:-1], "id number 22 is the end instead of 29901"),
        (EVERY + [2], "id number 23 is 2 instead of the end"),
    ],
)
def test_golden_ids_differ(ids, words):
    with pytest.raises(InputError, match=words):
        verify_checkpoint.golden_note(lambda text: ids, 32000)


def test_golden_ids_are_vicunas_only():
    assert "not a Vicuna tokenizer" in verify_checkpoint.golden_note(lambda text: [1], 32003)


def show_fake_tokenizer(added, ids):
    """verify_checkpoint's output for a tokenizer of Vicuna's size that returns these ids for every text."""
    tokenizer = namedtuple("tokenizer", "sp bos_id add_bos added prefix_every_segment prefix_spares_spaces encode")
    text = namedtuple("text", "vocab_size")(32064)
    config = namedtuple("config", "text_config image_token_index")(text, 32000)
    verify_checkpoint.show_tokenizer(tokenizer(range(32000), 1, True, added, True, False, lambda text: ids), config)


def test_image_token_may_have_another_id(capsys):
    """The golden ids use 32000 for `<image>`; 32001 is equally valid."""
    show_fake_tokenizer({"<image>": 32001}, [32001 if i == 32000 else i for i in EVERY])
    out = capsys.readouterr().out
    assert "<image> is 32001 (config.json says 32000" in out and "match: " in out


def test_no_image_token_is_said_before_golden_ids():
    with pytest.raises(InputError, match="no <image> token"):
        show_fake_tokenizer({}, [1, 2, 3])


# ---------------------------------------------------------------- as programs


@pytest.mark.parametrize("tool", ["make_checkpoint.py", "verify_checkpoint.py"])
def test_help_is_quick(tool, tmp_path):
    """-h works from anywhere and does not import torch."""
    command = [sys.executable, "-X", "importtime", str(TOOLS / tool), "-h"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage: " in done.stdout and "argparse" in done.stderr
    assert "torch" not in done.stderr


def test_exit_code_of_the_program(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOLS / "verify_checkpoint.py"), "nowhere"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no folder nowhere; ") and done.stderr.count("\n") == 1
