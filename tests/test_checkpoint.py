"""Checkpoint folders: every layout in use loads to the same bits; everything else fails with one clear line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_ID, PAD_ID, TEXT, VOCAB, added_token, refusal, write_json
from PIL import Image
from safetensors.torch import load_file, save_file

from model import Generation, InputError, Sampling, load, open_checkpoint
from model.checkpoint import choose_device
from tests.seeds import torch_random

PROMPT = "USER: <image>\nwhat is this? ASSISTANT:"


@pytest.fixture(scope="session")
def original(make_checkpoint, tmp_path_factory):
    """(folder, tensors) of a checkpoint in the published layout; read-only."""
    folder = tmp_path_factory.mktemp("original")
    return folder, make_checkpoint(folder)


@pytest.fixture
def folder(original, tmp_path):
    """A copy of it that tests may change."""
    return Path(shutil.copytree(original[0], tmp_path / "checkpoint"))


def edit(path, **changes):
    """Change keys at the top of a JSON file; None removes."""
    raw = json.loads(path.read_text()) | changes
    write_json(path, {k: v for k, v in raw.items() if v is not None})


def rewrite(folder, change):
    """Save the weights again with `change` applied to their dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@torch.inference_mode()
def logits(checkpoint):
    """Logits for a picture and a few words."""
    model = checkpoint.model
    pixels = torch.linspace(-2, 2, 3 * 28 * 28).view(1, 3, 28, 28).to(checkpoint.dtype)
    x, _ = model.splice(checkpoint.tokenizer.encode(PROMPT), model.encode_images(pixels))
    return model.language_model.logits(model.language_model.prefill(x[None]))


def assert_same_weights(checkpoint, tensors):
    state = checkpoint.model.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[k], v) for k, v in tensors.items())


# ---------------------------------------------------------------- names


def swap(*pairs):
    """Function that replaces the first matching prefix."""

    def rename(key):
        return next((new + key.removeprefix(old) for old, new in pairs if key.startswith(old)), key)

    return rename


LAYOUTS = {
    "A, published": swap(),
    "B, in memory of 4.52": swap(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("image_newline", "model.image_newline"),
    ),
    "C, written by 5": swap(("vision_tower.vision_model.", "vision_tower.")),
    "D, in memory of 5": swap(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("image_newline", "model.image_newline"),
    ),
    "E, original code": swap(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("image_newline", "model.image_newline"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_key_layout_gives_the_same_logits_to_the_bit(original, folder, layout):
    rename = LAYOUTS[layout]
    save_file({rename(k): v for k, v in original[1].items()}, folder / "model.safetensors")
    assert len({rename(k) for k in original[1]} & original[1].keys()) < len(original[1]) or layout.startswith("A")
    checkpoint = load(folder, dtype="fp32")
    assert_same_weights(checkpoint, original[1])
    assert torch.equal(logits(checkpoint), logits(load(original[0], dtype="fp32")))


def test_constants_that_old_files_store_are_passed_over(original, folder):
    old = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5),
    }
    rewrite(folder, lambda t: t.update(old))
    assert_same_weights(load(folder, dtype="fp32"), original[1])


# ---------------------------------------------------------------- files


def split(tensors, folder, names):
    """Distribute the tensors over files of these names; returns the weight map."""
    (folder / "model.safetensors").unlink()
    shards = {name: dict(list(tensors.items())[i :: len(names)]) for i, name in enumerate(names)}
    for name, shard in shards.items():
        save_file(shard, folder / name)
    return {key: name for name, shard in shards.items() for key in shard}


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


INDEX = "model.safetensors.index.json"


def write_index(folder, weight_map):
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})


def stale_index(folder, tensors, complete=True):
    """An index and its shards with other numbers, beside the whole file."""
    whole = (folder / "model.safetensors").read_bytes()
    write_index(folder, split({k: v + 1 for k, v in tensors.items()}, folder, SHARDS))
    (folder / "model.safetensors").write_bytes(whole)
    if not complete:
        (folder / SHARDS[1]).unlink()


def adapter(folder, tensors):
    split(tensors, folder, ["b.safetensors", "a.safetensors"])
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})


WHOLE = ["model.safetensors is read", "index.json"]
BROKEN_INDEX = ['{"weight_map": {}}', "version https://git-lfs.github.com", '{"weight_map": {"a": "../x"}}', "[]"]
FILES = {  # function (folder, tensors) that arranges the files, words of the note
    "shards of an index": (lambda f, t: write_index(f, split(t, f, SHARDS)), None),
    "several without index": (lambda f, t: split(t, f, ["b.safetensors", "a.safetensors"]), None),
    "a single file": (lambda f, t: None, None),
    "an index of the whole file": (lambda f, t: write_index(f, dict.fromkeys(t, "model.safetensors")), None),
    "a stale index": (stale_index, WHOLE),
    "a stale index without a shard": (lambda f, t: stale_index(f, t, complete=False), WHOLE),
    "an adapter": (adapter, ["adapter", "not applied"]),
} | {f"a broken index {text}": (lambda f, t, text=text: (f / INDEX).write_text(text), WHOLE) for text in BROKEN_INDEX}


@pytest.mark.parametrize("case", FILES)
def test_the_files_that_transformers_would_take_are_read(original, folder, case):
    arrange, words = FILES[case]
    arrange(folder, original[1])
    if "several" not in case and case != "an adapter":
        (folder / "other.safetensors").write_bytes(b"never opened")
    checkpoint = load(folder, dtype="fp32")
    assert_same_weights(checkpoint, original[1])
    assert len(checkpoint.notes) == (words is not None) and all(word in checkpoint.notes[0] for word in words or ())


@pytest.mark.parametrize("stored, wanted", [("float16", "fp32"), ("bfloat16", "fp32"), ("float32", "bf16")])
def test_weights_are_cast_to_the_wanted_type(original, folder, stored, wanted):
    half = {k: v.to(getattr(torch, stored)) for k, v in original[1].items()}
    save_file(half, folder / "model.safetensors")
    checkpoint = load(folder, dtype=wanted)
    assert checkpoint.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]
    assert_same_weights(checkpoint, {k: v.to(checkpoint.dtype) for k, v in half.items()})


NAMES_OF_DTYPES = {
    torch.float16: ("fp16", "float16", "half", torch.float16, "FP16"),
    torch.bfloat16: ("bf16", "bfloat16", torch.bfloat16),
    torch.float32: ("fp32", "float32", torch.float32, "auto"),
}


def test_a_dtype_has_several_names(folder):
    checkpoint = open_checkpoint(folder)
    for dtype, names in NAMES_OF_DTYPES.items():
        assert all(checkpoint.choose_dtype(name, "cpu") == dtype for name in names)
    for given in ("float64", torch.float64, "int8", torch.int8, "bf8", None, 16):
        assert "cannot be used" in refusal(load, folder, given)


@pytest.mark.parametrize(
    "given", ["cuda", 0, "cuda:7", torch.device("cuda"), "mps", "meta", "gpu", -1, True, None, 1.5]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="^device .*; use "):
        load("/nowhere", "fp32", given)
    assert choose_device("auto") == choose_device(torch.device("cpu")) == torch.device("cpu")


def test_a_device_may_be_a_number_of_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(1) == torch.device("cuda:1") == choose_device("cuda:1")
    assert "device 2 is not available (2 CUDA devices" in refusal(choose_device, 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's table of mapped memory")
@pytest.mark.parametrize("stored, wanted, mapped", [("bfloat16", "bf16", True), ("bfloat16", "fp32", False)])
def test_weights_in_the_wanted_type_are_mapped_and_not_copied(original, folder, stored, wanted, mapped):
    half = {k: v.to(getattr(torch, stored)) for k, v in original[1].items()}
    save_file(half, folder / "model.safetensors")
    checkpoint = load(folder, dtype=wanted)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(folder / "model.safetensors")):
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    inside = [any(a <= p.data_ptr() < b for a, b in ranges) for p in checkpoint.model.parameters()]
    assert all(inside) if mapped else not any(inside)


# ---------------------------------------------------------------- inconsistent files


def lose_some(tensors):
    del tensors["language_model.model.norm.weight"]
    del tensors["vision_tower.vision_model.post_layernorm.bias"]
    tensors["image_newline"] = torch.ones(64)


NORM, UP = "language_model.model.norm.weight", "language_model.model.layers.2.mlp.up_proj.weight"
UNFIT = {  # change of the tensors, words of the error
    "missing and unexpected": (lose_some, ["2 tensors missing", NORM, "post_layernorm.bias", "1 tensors", "newline"]),
    "a newline": (lambda t: t.update(image_newline=torch.ones(64)), ["image_newline", "json: 1 tensors unexpected"]),
    "a layer": (lambda t: t.update({UP: torch.ones(64)}), [UP, "json: 1 tensors unexpected"]),
    "another module": (lambda t: t.update({"model.other": torch.ones(64)}), ["model.other", "unexpected"]),
    "many": (lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp" in k], ["7 tensors missing", "and 3 more"]),
    "a wrong shape": (lambda t: t.update({NORM: torch.ones(65)}), [NORM, "[65]", "[64]"]),
    "twice": (lambda t: t.update({"model.norm.weight": torch.ones(64)}), [NORM, "twice"]),  # in another layout
    "no head": (lambda t: t.pop("language_model.lm_head.weight"), ["language_model.lm_head.weight"]),
    "8 bits": (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}), ["I8", "quantised"]),
    "double precision": (lambda t: t.update({NORM: torch.ones(64).double()}), ["F64", "only F32, BF16 and F16"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tensors_that_do_not_fit_are_refused(folder, case):
    change, words = UNFIT[case]
    rewrite(folder, change)
    message = refusal(load, folder)
    assert all(word in message for word in words)


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def heads(case, tensors):
    """Turn the dict of tensors into one of the cases; returns the (embedding, head) that the model must use."""
    embedding, head = tensors[EMBEDDING], tensors[HEAD]
    if case == "equal":
        tensors[HEAD] = embedding.clone()
    elif case == "one number differs":
        tensors[HEAD] = embedding.clone()
        tensors[HEAD][5, 7] += 1
    elif case == "rounded":  # another dtype: values differ until both are cast to it
        tensors[HEAD] = embedding.bfloat16()
    elif case == "no head":
        del tensors[HEAD]
    elif case == "head only":
        del tensors[EMBEDDING]
        return head, head
    return embedding, tensors.get(HEAD, embedding).float()


TIES = ["equal", "different", "one number differs", "rounded", "no head", "head only"]


@pytest.mark.parametrize("layout", ["A, published", "B, in memory of 4.52", "D, in memory of 5", "E, original code"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", TIES)
def test_a_head_that_is_said_to_be_tied_is_compared(original, folder, case, nested, layout):
    raw = json.loads((folder / "config.json").read_text())
    (raw["text_config"] if nested else raw)["tie_word_embeddings"] = True
    write_json(folder / "config.json", raw)
    tensors = dict(original[1])
    embedding, head = heads(case, tensors)
    tensors = {LAYOUTS[layout](k): v for k, v in tensors.items()}
    weight_map = split(tensors, folder, SHARDS)  # the two may be in different files
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    checkpoint = load(folder, dtype="fp32")
    language = checkpoint.model.language_model
    hidden = torch.randn(3, 64, generator=torch_random(0))
    torch.testing.assert_close(language.logits(hidden), hidden @ head.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(language.model.embed_tokens.weight, embedding)
    untied = case in ("different", "one number differs", "rounded")
    assert checkpoint.config.tie_word_embeddings == (language.lm_head is None) == (not untied)
    assert ["another head" in note for note in checkpoint.notes] == [True] * untied


def test_a_quantised_head_that_is_said_to_be_tied_is_refused(folder):
    edit(folder / "config.json", tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.float8_e4m3fn)}))
    assert "quantised" in refusal(load, folder)
    assert "give the folder that holds it" in refusal(load, folder / "model.safetensors")


@pytest.mark.parametrize("case", TIES)
def test_heads_are_tied_exactly_when_transformers_ties_them(make_hf_checkpoint, tmp_path, case):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test")
    make_hf_checkpoint(tmp_path, top={"tie_word_embeddings": False}, seed=3)
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: heads(case, t))
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load(tmp_path, dtype="fp32").model.language_model
    head = ours.model.embed_tokens if ours.lm_head is None else ours.lm_head
    assert torch.equal(head.weight, theirs.lm_head.weight)
    assert torch.equal(ours.model.embed_tokens.weight, theirs.get_input_embeddings().weight)
    assert (ours.lm_head is None) == (theirs.lm_head.weight is theirs.get_input_embeddings().weight)


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_and_a_file_of_something_else_are_refused(folder, left):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * left) if isinstance(left, float) else left])
    assert str(path) in refusal(load, folder)
    for content in (b"hello\nworld" * 50, b"\xff" * 64, b"\x08" + bytes(7) + b'{"a": 1}'):
        path.write_bytes(content)
        assert str(path) in refusal(load, folder)


PROJECTION = "language_model.model.layers.0.self_attn.q_proj"
PACKED = {  # tool: tensors it stores instead of a weight, or in addition
    "AWQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "GPTQ": {"qweight": torch.int32, "g_idx": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "NF4": {"weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_state.bitsandbytes__nf4": torch.uint8},
    "int8": {"weight": torch.int8, "SCB": torch.float32, "weight_format": torch.uint8},
    "FP8": {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32},
    "compressed-tensors": {"weight_packed": torch.int32, "weight_scale": torch.float16},
    "MLX": {"weight": torch.uint32, "scales": torch.float16, "biases": torch.float16},
}


@pytest.mark.parametrize("layout", ["A, published", "D, in memory of 5"])
@pytest.mark.parametrize("tool", PACKED)
def test_weights_of_a_quantising_tool_are_called_quantised(folder, tool, layout):
    def change(tensors):
        del tensors[PROJECTION + ".weight"]
        tensors.update({f"{PROJECTION}.{name}": torch.ones(8).to(dtype) for name, dtype in PACKED[tool].items()})
        for name in list(tensors):
            tensors[LAYOUTS[layout](name)] = tensors.pop(name)

    rewrite(folder, change)
    message = refusal(load, folder)
    assert "quantised" in message and "use an unquantised copy" in message and "q_proj" in message


def test_a_missing_shard_is_named(original, folder):
    write_index(folder, split(original[1], folder, SHARDS))
    (folder / SHARDS[1]).unlink()
    message = refusal(load, folder)
    assert "1 of 3" in message and SHARDS[1] in message and SHARDS[0] not in message


@pytest.mark.parametrize("evil", ["../x.safetensors", "{absolute}", "sub/x.safetensors", "sub/../../x.safetensors"])
def test_an_index_cannot_point_outside_the_folder(original, folder, evil):
    outside = folder.parent / "x.safetensors"
    shutil.move(folder / "model.safetensors", outside)  # complete, and reachable from there
    write_index(folder, dict.fromkeys(original[1], evil.format(absolute=outside)))
    assert "outside" in refusal(load, folder)


def test_other_weights_alone_are_refused_with_the_reason(folder):
    last = folder / "model.safetensors"
    for name, words in (("adapter_model.safetensors", "must be merged"), ("pytorch_model-00001.bin", "can run code")):
        last = last.rename(folder / name)
        message = refusal(load, folder)
        assert words in message and f"only {name}" in message


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_named(folder, gone):
    (folder / gone).unlink()
    assert gone.removeprefix("model") in refusal(load, folder)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert str(path) in refusal(load, path)
    for name in (None, 3, b"folder"):
        assert "is not a path" in refusal(load, name)


SMALL_FILES = [
    "config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json", INDEX,
    "tokenizer.json", "added_tokens.json", "chat_template.json",
]  # fmt: skip


@pytest.mark.parametrize("content", ["{", "\xff", "3", '["text"]'])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_broken_json_file_is_refused_and_named(folder, name, content):
    needs_index(folder, name)
    (folder / name).write_bytes(content.encode("latin-1"))
    assert name in refusal(load, folder)


def needs_index(folder, name):
    """Remove the single file, because an index beside it is not read."""
    if "index" in name:
        (folder / "model.safetensors").rename(folder / SHARDS[0])


WRONG_TYPES = {
    "config.json": {"text_config": 3, "vision_config": [1], "vision_feature_layer": "x"},
    "tokenizer_config.json": {"added_tokens_decoder": [1]},
    "tokenizer.json": {"added_tokens": [1]},
    "preprocessor_config.json": {"size": [28], "image_mean": "grey"},
    "model.safetensors.index.json": {"weight_map": ["a"]},
}


@pytest.mark.parametrize("name, key", [(name, key) for name, keys in WRONG_TYPES.items() for key in keys])
def test_a_value_of_the_wrong_type_is_refused_and_not_a_crash(folder, name, key):
    path = folder / name
    needs_index(folder, name)
    if not path.exists():
        write_json(path, {})
    edit(path, **{key: WRONG_TYPES[name][key]})
    assert name in refusal(load, folder)


def test_a_null_means_the_same_as_nothing(folder):
    before = load(folder)
    for name, key in (("preprocessor_config.json", "do_pad"), ("tokenizer_config.json", "add_bos_token")):
        write_json(folder / name, json.loads((folder / name).read_text()) | {key: None})
    after = load(folder)
    assert (after.image_settings, after.tokenizer.add_bos) == (before.image_settings, before.tokenizer.add_bos)


# ---------------------------------------------------------------- small files


@pytest.mark.parametrize("eos", [[], -1, [2, -1], TEXT["vocab_size"], [2, 10**9], "2", True, [[2]]])
def test_an_answer_that_nothing_ends_is_refused(folder, eos):
    write_json(folder / "generation_config.json", {"eos_token_id": eos})
    message = refusal(load, folder)
    assert "generation_config.json has eos_token_id" in message and f"not ids from 0 to {VOCAB - 1}" in message


def test_the_tokenizer_decides_which_id_the_image_has(folder):
    edit(folder / "config.json", image_token_index=None)  # then 32000, the class default
    checkpoint = load(folder, dtype="fp32")
    assert checkpoint.config.image_token_index == checkpoint.model.config.image_token_index == IMAGE_ID
    answer = Generation(checkpoint, "what?", [Image.new("RGB", (30, 30))], Sampling(max_new_tokens=2))
    list(answer)
    assert answer.vision_tokens == 4 and len(answer.spans) == 1


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    edit(folder / "tokenizer_config.json", added_tokens_decoder=None)
    assert "<image>" in refusal(load, folder)
    rows = TEXT["vocab_size"]
    for i in range(PAD_ID + 1, rows + 1):
        added[str(i)] = added_token(f"<{i}>") | {"special": i % 2 == 0}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    assert f"'<{rows}>' {rows} beyond the {rows} rows" in refusal(load, folder)
    del added[str(rows)]
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    assert load(folder).tokenizer.decode([rows - 1]) == f"<{rows - 1}>"
    edit(folder / "config.json", text_config=TEXT | {"vocab_size": 64})
    assert "420 pieces and the model 64" in refusal(load, folder)


def test_ids_that_stand_for_nothing_are_never_said(folder):
    answer = Generation(load(folder), "what?")
    assert (
        set(answer.checkpoint.never_ids) == set(range(IMAGE_ID, TEXT["vocab_size"]))
        and PAD_ID in answer.checkpoint.never_ids
    )


def test_opening_reads_no_weights(folder):
    checkpoint = open_checkpoint(folder)
    assert {p.device.type for p in checkpoint.model.parameters()} == {"meta"}
    checkpoint.read_weights("fp32")
    assert {p.device.type for p in checkpoint.model.parameters()} == {"cpu"}


# ---------------------------------------------------------------- the local cache

CACHES = {
    "HF_HUB_CACHE": "",
    "HUGGINGFACE_HUB_CACHE": "",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "huggingface/hub",
    "HOME": ".cache/huggingface/hub",
}


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """Unset the machine's cache variables and use an empty home folder."""
    for variable in CACHES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def put_in_cache(hub, folder, name="org--tiny", commit="0123abcd"):
    """In the layout of the hub's own tools: files are links to blobs."""
    snapshot = hub / f"models--{name}" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        os.symlink(file, snapshot / file.name)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit + "\n")
    return snapshot


@pytest.mark.parametrize("variable", CACHES)
def test_an_id_is_found_in_the_local_cache(no_cache, original, monkeypatch, tmp_path, variable):
    root = tmp_path / "somewhere"
    snapshot = put_in_cache(root / CACHES[variable], original[0])
    monkeypatch.setenv(variable, str(root))
    assert open_checkpoint("org/tiny").folder == snapshot


def test_a_folder_and_the_more_special_variable_win(no_cache, original, monkeypatch, tmp_path):
    put_in_cache(tmp_path / "home2" / "hub", original[0], commit="a" * 8)
    special = put_in_cache(tmp_path / "special", original[0], commit="b" * 8)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home2"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "special"))
    assert open_checkpoint("org/tiny").folder == special
    shutil.copytree(original[0], tmp_path / "org" / "tiny")
    assert open_checkpoint("org/tiny").folder == Path("org/tiny")


def test_an_id_that_is_not_there_is_refused_with_the_place_searched(no_cache, original, monkeypatch, tmp_path):
    snapshot = put_in_cache(tmp_path / "hub", original[0])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("org/tiny/more", "../org", "/org/tiny", "tiny", "./tiny"):
        assert name in refusal(load, name)
        assert "`hf download llava-hf/llava-1.5-7b-hf`" in refusal(load, name)
    missing = refusal(load, "org/other")
    assert str(tmp_path / "hub" / "models--org--other") in missing and "`hf download org/other`" in missing
    shutil.rmtree(snapshot)
    assert "org/tiny" in refusal(load, "org/tiny")
