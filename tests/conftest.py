"""Shared fixtures: a tokenizer trained on the fly, checkpoints with random weights, the format of errors."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are too small for threads to help
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import sentencepiece
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on the CPU, slowly
with contextlib.suppress(ImportError):  # now, because some tests change the variable later
    import kernels.ragged_decode_triton
    import kernels.ragged_pack_triton
    import kernels.window_scores_triton  # noqa: F401
from safetensors.torch import save_file

import run
from model import load
from model.config import InputError, parse_config
from model.image import Picture, prepare
from model.llava import Llava
from tests.cover import pairwise
from tests.paths import DEMO
from tests.seeds import BASE, drawn, seed_all, torch_random
from tools.byte_level import write_byte_level
from tools.hf import import_transformers

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

with contextlib.suppress(ImportError):
    import_transformers()  # before any test imports it; see tools/hf.py

PIECES = 420  # of the sentencepiece model; the added tokens follow
IMAGE_ID, PAD_ID = PIECES, PIECES + 1
VOCAB = 448  # rows of the embedding: pieces, added tokens, padding

TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


# ---------------------------------------------------------------- selection of tests


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every combination of parameters and every architecture")
    parser.addoption("--rest", action="store_true", help="of --all only what a run without it leaves out")


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: runs only with --all, or when named on the command line")
    config.addinivalue_line("markers", "wider: does more with --all, so --rest runs it too")
    config.option.all |= config.option.rest


SLOW = set(Path(__file__).with_name("slow.txt").read_text().splitlines()[1:])


def function(item):
    """A test as "test_file.py::test_name", without the case."""
    return Path(item.nodeid.partition("[")[0]).name


def pytest_collection_modifyitems(config, items):
    """Without --all, drop thorough and slow tests, and reduce cases to a set that covers all pairs of parameter values.

    Functions that are named on the command line are not dropped, nor slow ones of a file that is named.
    """
    named = any("[" in argument for argument in config.args)  # a case was named
    if named or (config.option.all and not config.option.rest):
        return
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    asked = {Path(argument).name for argument in config.args}
    left_out = {
        item for item in items
        if function(item) not in asked and (
            item.get_closest_marker("thorough") or (function(item) in SLOW and item.path.name not in asked)
        )
    }  # fmt: skip
    for cases in tests.values():
        cases = [item for item in cases if item not in left_out] or cases
        if hasattr(cases[0], "callspec"):  # cases share the object of a parameter value, so its id identifies it
            chosen = pairwise([{name: id(v) for name, v in item.callspec.params.items()} for item in cases])
            left_out |= set(cases) - {cases[i] for i in chosen}
    if config.option.rest:
        left_out = {item for item in items if item not in left_out and not item.get_closest_marker("wider")}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


# ---------------------------------------------------------------- random numbers


# the same examples every time; tests/sweep.py passes Hypothesis a seed
settings.register_profile("tests", derandomize=not BASE, database=None, deadline=None, print_blob=True)
settings.load_profile("tests")


DRAWING = set()  # shared fixtures that draw numbers


@pytest.fixture(autouse=True)
def seeded(request):
    """Seed each test by its name, so that it does not depend on the tests before it.

    TEST_DRAWS: a file that collects the tests that draw numbers, for tests/sweep.py.
    """
    seed_all(request.node.nodeid)
    path = os.environ.get("TEST_DRAWS")
    before = drawn() if path else None
    yield
    if path and (drawn() != before or DRAWING & set(request.fixturenames) or hasattr(request.function, "hypothesis")):
        with open(path, "a") as file:
            file.write(f"{request.node.nodeid}\n")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """Seed each shared fixture by its name, so that it does not depend on the test that needs it first."""
    if fixturedef.scope == "function":
        return (yield)
    seed_all(f"{fixturedef.baseid} {fixturedef.argname} {request.param_index}")  # the test is seeded later
    before = drawn()
    made = yield
    if drawn() != before:
        DRAWING.add(fixturedef.argname)
    return made


def pytest_collectstart(collector):
    """Seed each test file by its name before it is imported."""
    if isinstance(collector, pytest.Module):
        seed_all(collector.nodeid)


# ---------------------------------------------------------------- tokenizer

TEXT_TO_LEARN = (
    "USER ASSISTANT what is the content of this image picture there are red green blue circle square triangle how "
    "many objects chat between curious user and an artificial intelligence assistant gives helpful detailed polite "
    "answers to questions left right above below yes no one two three"
)
ALPHABET = "USER: a café ASSISTANT: (x) [y] {z} 'q' \"w\" 0123456789 _-+*/=!?@#$%^&|~`;,. " + " ".join(
    map(chr, (*range(65, 91), *range(97, 123)))
)


def added_token(text):
    flags = ("lstrip", "rstrip", "normalized", "single_word")
    return {"content": text, "special": True, **dict.fromkeys(flags, False)}


TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "added_tokens_decoder": {str(IMAGE_ID): added_token("<image>"), str(PAD_ID): added_token("<pad>")},
}


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory):
    """Folder with tokenizer.model (BPE with byte fallback) and tokenizer_config.json (`<image>`, `<pad>`)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = TEXT_TO_LEARN.split()
    lines = [" ".join(words[(i * k + k) % len(words)] for k in range(1, 13)) + "." for i in range(300)]
    lines += [ALPHABET] * 5
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    return folder


LINES_OF_BYTES = [
    "It's 2024: he'll say \u201cdon't\u201d.",
    "naïve café, 12 %",
    "日本語の絵 картинка 😀👍",
    "a\n\nb\tc  d",
]


@pytest.fixture(scope="session")
def byte_level_dir(tmp_path_factory):
    """Folder with the JSON files of a byte-level BPE as Qwen2's: pieces, then <|endoftext|> to <video>."""
    pytest.importorskip("tokenizers", reason="tokenizers trains this tokenizer")
    folder = tmp_path_factory.mktemp("byte-level")
    write_byte_level(folder, [TEXT_TO_LEARN, ALPHABET, *LINES_OF_BYTES] * 4, 500)
    return folder


@pytest.fixture
def tokenizer_folder(tiny_tokenizer_dir, tmp_path):
    """Function (settings of tokenizer_config.json) -> a copy of the tiny tokenizer's folder with those settings."""

    def build(**settings):
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_tokenizer_dir, folder)
        write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | settings)
        return folder

    return build


# ---------------------------------------------------------------- backends


@pytest.fixture
def frequent_repacks(monkeypatch):
    """A full cache gets few more slots, so that a test sees several repacks."""
    monkeypatch.setattr("model.cache.MORE", 2)


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """The backend under test. Sets the default device: CUDA for Triton if available, else the CPU."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton has no wheel for this system")
    with torch.device("cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"):
        yield request.param


# ---------------------------------------------------------------- checkpoints


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_small_files(folder, tokenizer_dir, image_size):
    """Write all files except config.json and the weights."""
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder)
    side = {"height": image_size, "width": image_size}
    write_json(folder / "preprocessor_config.json", {"size": {"shortest_edge": image_size}, "crop_size": side})


def spread(module, seed):
    """Set random weights large enough that a wrong angle, mask or head clearly changes the logits."""
    generator = torch_random(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, device="cpu") * 0.2
            weight.copy_(1 + noise if weight.ndim == 1 and name.endswith("weight") else noise)  # 1-d weights: norms
    return module


@pytest.fixture(scope="session")
def make_checkpoint(tiny_tokenizer_dir):
    """Function (folder, text, vision, top, seed): a loadable checkpoint made without transformers.

    The dicts override TEXT, VISION and the top of config.json. Returns its tensors by their canonical names.
    """

    def make(folder, text=None, vision=None, top=None, seed=0):
        raw = {"model_type": "llava", "image_token_index": IMAGE_ID, "text_config": TEXT | (text or {})}
        raw |= {"vision_config": VISION | (vision or {})} | (top or {})
        config = parse_config(raw)
        with torch.device("cpu"):
            tensors = spread(Llava(config), seed).state_dict()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", raw)
        write_small_files(folder, tiny_tokenizer_dir, config.vision_config.image_size)
        save_file(tensors, folder / "model.safetensors")
        return tensors

    return make


@pytest.fixture(scope="session")
def make_hf_checkpoint(tiny_tokenizer_dir):
    """Function (folder, text, vision, top, seed, kind): a checkpoint written by transformers; kind Llava or LlavaNext.

    The dicts override TEXT, VISION and the top of the config. Returns transformers' model in eval mode.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of these tests")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def make(folder, text=None, vision=None, top=None, seed=0, kind="Llava"):
        config = getattr(transformers, kind + "Config")(
            text_config=TEXT | (text or {}),
            vision_config=VISION | (vision or {}),
            **({"image_token_index": IMAGE_ID} | (top or {})),
        )
        with torch.device("cpu"):
            model = spread(getattr(transformers, kind + "ForConditionalGeneration")(config), seed).eval()
        model.save_pretrained(folder)
        write_small_files(folder, tiny_tokenizer_dir, config.vision_config.image_size)
        return model

    return make


def preprocess(image, settings):
    """Pixel values of an RGB picture, (3, S, S) fp32, or (1 + tiles, 3, S, S) for "anyres"."""
    pixels = prepare(Picture("", image), settings, 1, 0).pixels
    return pixels if settings.mode == "anyres" else pixels[0]


# ---------------------------------------------------------------- errors


def refusal(function, *arguments, **options):
    """The message of the InputError that a call must raise: one line, `what; what to do`."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    what, _, advice = message.partition("; ")
    assert what and advice, message
    return message


def exit_code_of(main, argv):
    """The exit code of a command, whether its main() returns it or argparse exits with it."""
    try:
        return main(argv)
    except SystemExit as left:
        return left.code


# ---------------------------------------------------------------- run.py in this process, which has imported torch


@pytest.fixture(scope="session")
def demo():
    return load(DEMO, "fp32")


@pytest.fixture
def cli(capsys):
    """Function (arguments of run.py) -> (exit code, stdout, stderr)."""

    def cli(*args):
        try:
            code = run.main([str(word) for word in args])
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return cli


@pytest.fixture
def refused(cli):
    """Function (arguments of run.py) -> the only line that it prints, an error with exit code 2 and a remedy."""

    def refused(*args):
        code, out, err = cli(*args)
        assert (code, out) == (2, "") and re.fullmatch("error: .+[;,] .+\n", err), (code, out, err)
        return err

    return refused


@pytest.fixture
def stdin(monkeypatch):
    """Function (bytes, or None if it is closed): what stdin holds."""
    return lambda data: monkeypatch.setattr(sys, "stdin", None if data is None else io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture
def failing(monkeypatch):
    """Function (owner, name of a function, error, at, where): from now on its calls raise the error.

    at: only the call with this number; where: only calls with arguments for which it is true.
    """

    def failing(owner, name, error, at=None, where=None):
        function, numbers = getattr(owner, name), itertools.count(1)

        def call(*args, **options):
            if at in (None, next(numbers)) and (where is None or where(*args)):
                raise error
            return function(*args, **options)

        monkeypatch.setattr(owner, name, call)

    return failing
