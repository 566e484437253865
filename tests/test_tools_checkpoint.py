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
from safetensors.torch import load_file

from model import Generation, InputError, Sampling, load
from model.checkpoint import empty_model
from model.config import parse_config, read_config
from model.tokenizer import Tokenizer
from tools import make_checkpoint, verify_checkpoint

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny checkpoint in several files; read-only."""
    folder = tmp_path_factory.mktemp("made") / "tiny"
    assert make_checkpoint.main([str(folder), "--shape", "tiny", "--shard-gb", "0.0001"]) == 0
    return folder


def weights_of(folder):
    """All tensors of a folder by name."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def only_error(capsys):
    """The single line on stderr, with cause and remedy."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "; " in line
    return line


# ---------------------------------------------------------------- written checkpoints


def test_a_made_checkpoint_verifies_and_runs(made, capsys):
    assert verify_checkpoint.main([str(made), "--sha256"]) == 0
    out, err = capsys.readouterr()
    for path in made.glob("*.safetensors"):
        assert f"sha256      {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" in out
        assert path.name in err  # progress
    assert out.splitlines()[-1] == "all fine"
    parameters = sum(t.numel() for t in weights_of(made).values())
    for fact in (
        "2 heads, 28 px in patches of 14", "features of layer -2, the output of layer 2", "4 tokens per picture",
        "vocabulary 512", "<image> is 510\n", "dummy space before every segment\n",
        "not a Vicuna tokenizer (400 pieces, not 32000): no golden ids", "model-00001-of-",
        f"{parameters:,} parameters, stored as F16", "llava (no chat template in the folder)", "crop to 28 px",
    ):  # fmt: skip
        assert fact in out, fact
    generation = Generation(load(made), "What is this?", Image.new("RGB", (40, 30), "red"), Sampling(4, seed=1))
    "".join(generation)
    assert generation.vision_tokens == 4
    assert len(generation.token_ids) == 4 and max(generation.token_ids) < make_checkpoint.PIECES


def test_files_are_cut_and_indexed(made):
    index = json.loads((made / "model.safetensors.index.json").read_text())
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
    assert index["metadata"]["total_size"] == total and set(index["weight_map"].values()) == set(files)


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
    tokenizer = Tokenizer(tmp_path / "big")
    assert tokenizer.encode("<image>")[-1] == 32000
    for text in ("USER: what is this? ASSISTANT:", "Zürich, ½ 狐"):  # falls back to bytes
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("shape", "parameters"), [("onevision-0.5b", 893_675_552), ("onevision-7b", 8_030_807_584)])
def test_sizes_of_onevision_are_those_of_the_page(shape, parameters):
    model = empty_model(parse_config(make_checkpoint.config_json(shape, "bf16")))  # on the meta device
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{parameters:,} | {2e-9 * parameters:.2f} GB" in (TOOLS.parent / "weights.md").read_text()


def test_a_tied_onevision_has_one_matrix_and_maps_its_weights(tmp_path, capsys):
    make_checkpoint.make(tmp_path / "made", "tiny-onevision", "bf16")
    assert verify_checkpoint.main([str(tmp_path / "made")]) == 0 and "all fine" in capsys.readouterr().out
    (file,), weights = (tmp_path / "made").glob("*.safetensors"), weights_of(tmp_path / "made")
    assert "language_model.lm_head.weight" not in weights
    for dtype, mapped in (("bf16", True), ("fp32", False)):  # fp32 is cast, so copied once
        model = load(tmp_path / "made", dtype).model
        language, tensors = model.language_model, {p.data_ptr(): p for p in model.parameters()}
        assert language.head is language.model.embed_tokens and len(tensors) == len(list(model.parameters()))
        stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors.values()}
        if mapped:
            assert max(stored) + stored[max(stored)] - min(stored) <= file.stat().st_size  # all inside one mapped file
        else:
            assert sum(stored.values()) == sum(p.nbytes for p in tensors.values())
        assert sum(p.nbytes for p in tensors.values()) == sum(t.numel() for t in weights.values()) * (
            2 if mapped else 4
        )


# ---------------------------------------------------------------- refusals


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


def test_a_fault_is_one_line(made, tmp_path, capsys):
    """Of the faults in test_checkpoint.py, which go through the same `open_checkpoint`."""
    copy = shutil.copytree(made, tmp_path / "copy")
    sorted(copy.glob("*.safetensors"))[1].unlink()
    assert verify_checkpoint.main([str(copy), "--sha256"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: 1 of 5 weight files are missing") and "; " in err and err.count("\n") == 1
    assert "all fine" not in out


# ---------------------------------------------------------------- golden ids

EVERY = [1, 3148, 1001, 29901, 29871, 32000, 29871, 13, 5618, 29915, 29879, 278, 2793, 310, 278, 1967, 29973, 13, 22933]
EVERY += [9047, 13566, 29901]
FIRST = EVERY[:6] + EVERY[7:]


def show_tokenizer(ids, pieces=32000, image=32000):
    """verify_checkpoint's output for a tokenizer that returns these ids for the golden prompt."""
    tokenizer = namedtuple(
        "tokenizer", "kind size bos_id add_bos added prefix_every_segment prefix_spares_spaces encode"
    )
    encode = {"USER: <image>\nWhat's the content of the image?\nASSISTANT:": ids}.get
    fields = "sentencepiece", pieces, 1, True, {"<image>": image}, True, False, encode
    verify_checkpoint.show_tokenizer(tokenizer(*fields), 32000)


def test_golden_ids_are_recognised(capsys):
    for ids, pieces, image, words in (
        (EVERY, 32000, 32000, "match: a space before every segment, as llava-1.5-7b-hf"),
        (FIRST, 32000, 32000, "match: a space before the first segment only, as the v1.6"),
        ([1], 32003, 32000, "not a Vicuna tokenizer"),
        # the golden ids use 32000 for `<image>`; 32001 is equally valid
        ([32001 if i == 32000 else i for i in EVERY], 32000, 32001, "<image> is 32001 (config.json says 32000"),
    ):
        show_tokenizer(ids, pieces, image)
        out = capsys.readouterr().out
        assert words in out and ("match: " in out) == (pieces == 32000)


@pytest.mark.parametrize("ids", [EVERY[1:], [*FIRST[:9], 7, *FIRST[10:]], EVERY[:-1], [*EVERY, 2]])
def test_other_ids_of_vicunas_size_are_refused(ids):
    with pytest.raises(InputError, match="Vicuna's size but other ids .*; "):
        show_tokenizer(ids)


# ---------------------------------------------------------------- as programs


@pytest.mark.parametrize("tool", ["make_checkpoint.py", "verify_checkpoint.py"])
def test_help_is_quick(tool, tmp_path):
    """-h works from anywhere and does not import torch."""
    command = [sys.executable, "-X", "importtime", str(TOOLS / tool), "-h"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage: " in done.stdout and "argparse" in done.stderr
    assert "torch" not in done.stderr


def test_exit_code_of_the_program(tmp_path):
    command = [sys.executable, str(TOOLS / "verify_checkpoint.py"), "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no folder nowhere, ") and done.stderr.count("\n") == 1
