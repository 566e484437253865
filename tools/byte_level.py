"""A small tokenizer in the layout of Qwen2's published files: byte-level BPE, trained on a few lines of text."""

import json

from model.bpe import SPLIT
from tools.command import write_json

TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")  # of llava-onevision-qwen2-*-hf
PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def write_byte_level(folder, lines, pieces, first=None, length=32768):
    """Write tokenizer.json and the JSON files next to it into the folder.

    lines: strings to train on; pieces: size of the vocabulary, at least 256, or less if the text has no more pairs.
    first: id of the first of TOKENS. Ids up to there get pieces that no text is encoded to, because transformers
    numbers added tokens without a gap. Default: the number of pieces.
    """
    fast = json.loads(train(lines, pieces).to_str())
    vocabulary = fast["model"]["vocab"]
    vocabulary |= {f"<unused-{i}>": i for i in range(len(vocabulary), first or 0)}
    added = {text: len(vocabulary) + i for i, text in enumerate(TOKENS)}
    fast["added_tokens"] = [{"content": text, "id": i, **PLAIN} for text, i in added.items()]
    write_json(folder / "tokenizer.json", fast)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    settings = {
        **names, "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "added_tokens_decoder": {str(i): {"content": text, **PLAIN} for text, i in added.items()}, "bos_token": None,
        "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": length,
        "processor_class": "LlavaOnevisionProcessor", "split_special_tokens": False, "unk_token": None,
        "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    for name, value in (
        ("tokenizer_config.json", settings), ("special_tokens_map.json", names), ("added_tokens.json", added)
    ):  # fmt: skip
        write_json(folder / name, value, indent=2, sort_keys=True)


def train(lines, pieces):
    """A `tokenizers.Tokenizer` with the steps of Qwen2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(**level)])
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(**level), processors.ByteLevel(**level)
    every = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=pieces, initial_alphabet=every, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
