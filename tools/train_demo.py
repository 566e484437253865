"""Train the small LLaVA in assets/demo from scratch, on the scenes of tools/scenes.py.

    python tools/train_demo.py tower        # 1. the vision tower alone, from dense labels on every patch
    python tools/train_demo.py decoder      # 2. projector and Llama on questions and captions, the tower frozen
    python tools/train_demo.py export       # 3. write the llava-hf folder and the curve, like assets/demo
    python tools/train_demo.py evaluate     # 4. the accuracy table of assets/demo, or of --model, on held-out scenes

Stages 1 and 2 resume after an interruption (checkpoints in --run) and run on CPU or CUDA. They use the modules of
model/. Recipe: first train the tower with cheap dense supervision, then train on many independent questions per
picture, packed into one sequence (see `pack`).
"""

import csv
import dataclasses
import math
import os
import random
import re
import shutil
import string
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.checkpoint import load  # noqa: E402
from model.clip import VisionTower  # noqa: E402
from model.config import parse_config  # noqa: E402
from model.image import CLIP_MEAN, CLIP_STD  # noqa: E402
from model.llava import Llava  # noqa: E402
from model.tokenizer import IMAGE, Tokenizer, build_prompt  # noqa: E402
from tools import figures, scenes  # noqa: E402
from tools.command import as_command, flags  # noqa: E402
from tools.hf import import_transformers  # noqa: E402
from tools.make_checkpoint import config_json, preprocessor_json, write_published  # noqa: E402

HELD_OUT = 10**9  # samples below this index are for training, the others for evaluation

CONFIG = parse_config(config_json("demo", "bf16"))
TEXT, VISION = CONFIG.text_config, CONFIG.vision_config
VOCABULARY = CONFIG.image_token_index  # sentencepiece pieces; with <image> and <pad> a multiple of 64
MEAN, STD = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)  # per channel


# ---------------------------------------------------------------- resumable runs


class Run:
    """Step counter, checkpoint, curve and progress line of one training stage."""

    def __init__(self, folder, stage, steps, modules, optimizer):
        self.folder, self.stage, self.steps = Path(folder), stage, steps
        self.modules, self.optimizer = modules, optimizer
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{stage}.pt"
        self.curve = self.folder / f"{stage}.csv"
        self.step, self.seconds = 0, 0.0  # seconds: training time, summed over all resumptions
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            self.step, self.seconds = saved["step"], saved["seconds"]
            modules.load_state_dict(saved["modules"])
            optimizer.load_state_dict(saved["optimizer"])
            print(f"{stage}: resumed at step {self.step}", file=sys.stderr)
            if self.curve.exists():  # drop rows after the checkpoint: those steps run again
                head, *rows = self.curve.read_text().splitlines(keepends=True)
                self.curve.write_text(head + "".join(row for row in rows if int(row.split(",")[0]) <= self.step))
        self.started, self.first = time.time() - self.seconds, self.step

    def save(self):
        """Write a temporary file, then rename it, so that a kill leaves the old checkpoint or the new one."""
        state = {
            "step": self.step, "seconds": time.time() - self.started,
            "modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        torch.save(state, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def due(self, every):
        """Is it time for a row of the curve? Not right after resuming, where that row already exists."""
        return self.step % every == 0 and (self.step == 0 or self.step > self.first)

    def log(self, numbers):
        """Write a row of the curve, and print progress with the remaining time."""
        elapsed = time.time() - self.started
        fresh = self.step == 0 or not self.curve.exists()
        with open(self.curve, "w" if fresh else "a", newline="") as f:
            writer = csv.writer(f)
            if fresh:
                writer.writerow(["step", "seconds", *numbers])
            cells = ("" if v is None else f"{v:.4f}" for v in numbers.values())
            writer.writerow([self.step, round(elapsed, 1), *cells])
        left = (elapsed - self.seconds) / max(1, self.step - self.first) * (self.steps - self.step)
        times = f"{elapsed / 60:.1f} min, {left / 60:.0f} min left"
        line = "  ".join(f"{k} {v:.3f}" for k, v in numbers.items() if v is not None)
        print(f"{self.stage} {self.step}/{self.steps}  {times}  {line}", file=sys.stderr, flush=True)


def rate_at(step, steps, peak, warmup=100, decay=0.4):
    """Learning rate: linear warm-up, constant, then cosine decay to 1 % of the peak over the last fraction `decay`."""
    down = max(0.0, (step - (1 - decay) * steps) / (decay * steps))
    return peak * min(1, (step + 1) / warmup) * (0.505 + 0.495 * math.cos(math.pi * down))


def precision(device, frozen=torch.float32):
    """Autocast to the dtype of frozen weights if it has 16 bits, because fp32 inputs do not fit them; else to bf16 if
    bf16 matrix products are fast: on a GPU, and on CPUs with AVX-512 bf16."""
    half = frozen.itemsize == 2
    fast = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.autocast(device.type, dtype=frozen if half else torch.bfloat16, enabled=half or fast)


def optimizer_for(modules):
    """AdamW with weight decay on matrices only."""
    trained = [p for p in modules.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def descend(run, loss, rate):
    """One step of the optimizer."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_((p for p in run.modules.parameters() if p.requires_grad), 1.0)
    run.optimizer.step()
    run.step += 1


def to_bytes(image):
    """PIL picture -> (S, S, 3) uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def to_pixels(raw, device):
    """(B, S, S, 3) uint8 -> (B, 3, S, S) fp32, CLIP-normalised, as model/image.py does for a 224 px picture."""
    return ((raw.to(device) / 255 - MEAN.to(device)) / STD.to(device)).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------- stage 1: the vision tower

# Labels that linear heads predict for each patch, with their numbers of classes (class 0: background)
LABELS = {
    "colour": 8, "shape": 7, "size": 3, "place": 10, "row rank": 6, "column rank": 6,
    "letter": len(scenes.LETTERS) + 1, "index": 4,
}  # fmt: skip


def patch_labels(scene):
    """(8, 256) uint8 in the order of LABELS: the thing or letter that covers most of each patch.

    Ranks number the things row by row and column by column; index numbers the letters of the word from the left.
    """
    colours = list(scenes.COLOURS)
    by_column = sorted(scene.things, key=lambda t: (t.column, t.row))
    owners = [((0,) * len(LABELS), [31] * scenes.GRID**2)]  # covered by less than an eighth: background
    for rank, t in enumerate(scene.things):  # numbers from 0 on
        kinds = colours.index(t.colour), scenes.SHAPES.index(t.shape), scenes.SIZES.index(t.size), t.row * 3 + t.column
        column = (*(i + 1 for i in (*kinds, rank, by_column.index(t))), 0, 0)
        owners.append((column, scenes.coverage(t)))
    if scene.sign:
        for i, cover in enumerate(scenes.letter_coverage(scene.sign)):
            letter = scenes.LETTERS.index(scene.sign.word[i]) + 1
            owners.append(((0, 0, 0, scene.sign.row * 3 + 2, 0, 0, letter, i + 1), cover))
    columns, covers = zip(*owners, strict=True)
    most = torch.tensor(covers).argmax(0)  # (256,); of equal covers the first
    return torch.tensor(columns, dtype=torch.uint8)[most].T.contiguous()


class LabelledScenes(Dataset):
    """Sample i: a picture (224, 224, 3) uint8 and its patch labels (8, 256) uint8."""

    def __getitem__(self, i):
        scene = scenes.sample(i, tasks=())[0][0]
        return to_bytes(scenes.draw_scene(scene)), patch_labels(scene)


def train_tower(args):
    torch.manual_seed(args.seed)
    steps, batch = args.steps or 2200, args.batch or 32
    device = torch.device(args.device)
    tower = VisionTower(VISION)
    heads = nn.ModuleDict({name: nn.Linear(VISION.hidden_size, n) for name, n in LABELS.items()})
    modules = nn.ModuleDict({"tower": tower, "heads": heads}).to(device)
    run = Run(args.run, "tower", steps, modules, optimizer_for(modules))
    samples = range(run.step * batch, steps * batch)
    for pictures, labels in DataLoader(LabelledScenes(), batch, sampler=samples, num_workers=1, prefetch_factor=4):
        labels = labels.to(device).long()
        with precision(device):
            features = tower(to_pixels(pictures, device), CONFIG.feature_layers)[0][:, 1:]  # (B, 256, C)
            logits = {name: head(features).float().flatten(0, 1) for name, head in heads.items()}
        loss, numbers = 0.0, {}
        for i, (name, guess) in enumerate(logits.items()):
            truth = labels[:, i].flatten()
            weight = torch.ones(LABELS[name], device=device)
            weight[0] = 0.1  # most patches are background
            loss = loss + F.cross_entropy(guess, truth, weight)
            there = truth > 0
            numbers[name] = (guess.argmax(-1)[there] == truth[there]).float().mean().item()
        if run.due(50):
            run.log({"loss": loss.item(), **numbers})
        descend(run, loss, rate_at(run.step, steps, 1.5e-3))
        if run.step % 200 == 0 or run.step == steps:
            run.save()


# ---------------------------------------------------------------- the tokenizer


def train_tokenizer(folder):
    """Write a sentencepiece BPE with byte fallback into the folder: tokenizer.model and its JSON files.

    Words of the world become one piece each. The corpus omits the words on signs, so these are spelled in single
    letters, except a tenth of them, which contain a known pair of letters such as the ER of USER.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in range(4000):
        questions = scenes.sample(seed)[1] + scenes.sample(seed, pair=True)[1]
        for q in questions:
            answer = re.sub(r"says [A-Z]{3}", "says", q.answer)
            lines.append(", ".join(q.value) if q.task == "spell" else f"USER: {q.question} ASSISTANT: {answer}")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=VOCABULARY, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        required_chars=string.ascii_letters + string.digits + ".,:;?!'-", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    added = {IMAGE: VOCABULARY, "<pad>": VOCABULARY + 1}
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, **added}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(i): {"content": text, **flags} for text, i in special.items()},
        "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "legacy": False, "model_max_length": TEXT.max_position_embeddings, "tokenizer_class": "LlamaTokenizer",
        "image_token": IMAGE, "processor_class": "LlavaProcessor",
    }  # fmt: skip
    write_published(folder / "tokenizer_config.json", settings)
    write_published(folder / "added_tokens.json", added)
    names = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    write_published(folder / "special_tokens_map.json", names)


# ---------------------------------------------------------------- stage 2: projector and decoder


@dataclasses.dataclass
class Packed:
    """One or two pictures and many questions about them in one sequence of T tokens.

    The sequence is BOS, the pictures, then one block per conversation. A block attends to the pictures and itself, not
    to other blocks, and its positions continue from the pictures, so each conversation is independent. The pictures,
    90 % of the cost, are computed once.
    """

    ids: list  # one placeholder per picture
    position: list  # T, placeholders expanded
    block: list  # T: 0 for the pictures, 1.. for the conversations
    target: list  # T: the next token in rows that predict an answer, else -100
    answers: list  # (question, first, stop): rows that predict the answer and its stop token


def pack(tokenizer, conversations, pictures, image_tokens):
    """The Packed of a list of conversations, each a list of Questions."""
    opening = tokenizer.encode(build_prompt("", pictures, "llava").split("\n ")[0])  # BOS "USER: " and the pictures
    shift = len(opening)  # start of a block's tokens in the conversation's own ids
    start = shift + pictures * (image_tokens - 1)
    packed = Packed(list(opening), list(range(start)), [0] * start, [-100] * start, [])
    for number, conversation in enumerate(conversations, 1):
        text, ids, row = "USER: " + (IMAGE + "\n") * pictures, [], len(packed.position) - shift
        for turn, q in enumerate(conversation):
            text += f"{'USER: ' if turn else ''}{q.question} ASSISTANT:"
            first = len(tokenizer.encode(text))
            text += f" {q.answer}</s>"
            ids = tokenizer.encode(text)
            packed.answers.append((q, row + first - 1, row + len(ids) - 1))
        assert ids[:shift] == opening, "the pictures open every conversation"
        packed.ids += ids[shift:]
        packed.position += range(start, start + len(ids) - shift)
        packed.block += [number] * (len(ids) - shift)
    packed.target += [-100] * (len(packed.position) - start)
    moved = start - shift  # from ids to rows
    for _, first, stop in packed.answers:
        packed.target[first:stop] = packed.ids[first + 1 - moved : stop + 1 - moved]
    return packed


def mask_of(block):
    """block (B, T) -> (B, 1, T, T) bool, True where row i attends to column j. Padding (-1) attends to padding."""
    t = block.shape[1]
    same = (block[:, :, None] == block[:, None, :]) | ((block[:, None, :] == 0) & (block[:, :, None] > 0))
    return (same & torch.ones(t, t, dtype=torch.bool, device=block.device).tril())[:, None]


def padded(rows, length, value):
    """Lists of different lengths, padded with `value` -> (B, length)."""
    return torch.tensor([r + [value] * (length - len(r)) for r in rows])


class PackedScenes(Dataset):
    """Item i is the batch of step i: (pictures uint8, list of Packed). Every fifth step has pairs of pictures."""

    def __init__(self, tokenizer, batch, image_tokens):
        self.tokenizer, self.batch, self.image_tokens = tokenizer, batch, image_tokens

    def __getitem__(self, step):
        pair = step % 5 == 4
        size = self.batch // 2 if pair else self.batch
        pictures, rows = [], []
        for i in range(size):
            seed = step * self.batch + i
            rng = random.Random(seed)
            tasks = PAIR_TASKS if pair else phase_at(step)[1]
            tasks = [rng.choice(t) if isinstance(t, tuple) else t for t in tasks]
            alike = step >= ALIKE_FROM and i % 4 < 3
            drawn, questions = scenes.sample(seed, tasks, pair, alike=alike and not pair)
            pictures += [to_bytes(scenes.draw_scene(s)) for s in drawn]
            rows.append(pack(self.tokenizer, talks(questions, rng), len(drawn), self.image_tokens))
        return torch.stack(pictures), rows


PAIR_TASKS = ("compare", "pair", "pair", "pair")
TASKS = (*scenes.ASKERS, *scenes.PAIR_ASKERS)

# (first step, tasks per picture, weight answers equally whatever their length, peak learning rate). The model learns
# captions first, token by token, and finding an object by name last: later phases ask that more often, at a lower rate.
# The phases were chosen by watching the curve. A tuple among the tasks: one of them at random.
CAPTIONS = (*scenes.ASKERS,)
FINDING = ("position", "relation", "presence") * 3 + ("colour", "shape", "size", "count")
ALIKE_FROM = 4000  # first step at which most scenes have things that share colours and shapes
BINDING = ("position", "presence") * 3 + ("relation", "relation", "presence", "size", "shape")
PHASES = (
    (0, CAPTIONS, False, 1.5e-3),
    (1600, (*CAPTIONS, "colour", "presence", "position", "relation", "list"), True, 1.5e-3),
    (2200, (*FINDING, "list", "list", ("describe", "spell", "read")), True, 1.5e-3),
    (2600, (*FINDING, "list", "list", ("describe", "spell", "read")), True, 8e-4),
    (3400, (*BINDING, ("colour", "count"), "list", ("describe", "spell", "read")), True, 8e-4),
)


def phase_at(step):
    """The phase of a step."""
    return [phase for phase in PHASES if phase[0] <= step][-1]


def talks(questions, rng):
    """Group questions into conversations: a fifth have two turns, the others one."""
    order = rng.sample(questions, len(questions))
    result = []
    while order:
        turns = 2 if rng.random() < 0.2 and len(order) > 1 else 1
        result.append([order.pop() for _ in range(turns)])
    return result


def hidden_states(model, pictures, rows, device, drop_vision=False):
    """Final hidden states (B, T, C) of a batch of Packed, and its targets (B, T). The vision tower gets no gradient.

    drop_vision: tokens fed from the first answer token on do not attend to the pictures, as if their KV were dropped.
    """
    with torch.no_grad():
        states = model.vision_tower(to_pixels(pictures, device), model.config.feature_layers)
    tokens = model.multi_modal_projector(states[0][:, 1:])
    tokens = iter(tokens.split(len(pictures) // len(rows)))
    x, spans = zip(*(model.splice(row.ids, next(tokens)) for row in rows), strict=True)
    longest = -(-max(map(len, x)) // 64) * 64  # few shapes: each new one costs a second on a CPU
    x = torch.stack([F.pad(r, (0, 0, 0, longest - len(r))) for r in x])
    block = padded([row.block for row in rows], longest, -1).to(device)
    position = padded([row.position for row in rows], longest, 0).to(device)
    mask = mask_of(block)
    if drop_vision:
        for i, row in enumerate(rows):
            for _, first, stop in row.answers:
                for left, right in spans[i]:
                    mask[i, 0, first + 1 : stop, left:right] = False  # row `first` predicts the first token
    mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, float("-inf"))  # once, not in every layer
    target = padded([row.target for row in rows], longest, -100).to(device)
    return model.language_model.prefill(x, positions=position, mask=mask), target


def new_model():
    model = Llava(CONFIG)
    for name, p in model.language_model.named_parameters():
        if p.ndim == 2:  # smaller in matrices that write to the residual stream
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * TEXT.num_hidden_layers) if deep else 0.02)
    return model


def answer_loss(logits, target, rows, even):
    """Cross entropy of logits (B, T, V) on the answers: mean over tokens or, if even, over the answers' own means."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view_as(target)
    weight = torch.zeros(target.shape)
    for i, row in enumerate(rows):
        for _, first, stop in row.answers:
            weight[i, first:stop] = 1 / (stop - first) if even else 1.0
    return (losses * weight.to(losses.device)).sum() / weight.sum()


def train_decoder(args):
    torch.manual_seed(args.seed)
    steps, batch = args.steps or 5600, args.batch or 8
    device, folder = torch.device(args.device), Path(args.run)
    if not (folder / "tokenizer" / "tokenizer_config.json").exists():
        train_tokenizer(folder / "tokenizer")
    tokenizer = Tokenizer(folder / "tokenizer")
    model = new_model().to(device)
    tower = torch.load(folder / "tower.pt", weights_only=True, map_location=device)["modules"]
    tower = {name.removeprefix("tower."): p for name, p in tower.items() if name.startswith("tower.")}
    model.vision_tower.load_state_dict(tower)
    model.vision_tower.requires_grad_(False)
    run = Run(folder, "decoder", steps, model, optimizer_for(model))
    samples = PackedScenes(tokenizer, batch, VISION.num_patches)
    data = DataLoader(samples, None, sampler=range(run.step, steps), num_workers=1, prefetch_factor=8)
    seen = {task: [] for task in TASKS}  # is each answer correct in every token? since the last log line
    for pictures, rows in data:
        with precision(device):
            hidden, target = hidden_states(model, pictures, rows, device)
            logits = model.language_model.logits(hidden)
        loss = answer_loss(logits, target, rows, even=phase_at(run.step)[2])
        right = logits.argmax(-1) == target
        for i, row in enumerate(rows):
            for q, first, stop in row.answers:
                seen[q.task].append(right[i, first:stop].all().item())
        if run.due(50):
            run.log({"loss": loss.item(), **{task: sum(n) / len(n) if n else None for task, n in seen.items()}})
            seen = {task: [] for task in TASKS}
        descend(run, loss, rate_at(run.step, steps, phase_at(run.step)[3], decay=0.2))
        if run.step % 100 == 0 or run.step == steps:
            run.save()


# ---------------------------------------------------------------- stage 3: a standard llava-hf folder


def export(args):
    """Write the llava-hf folder from a run's checkpoints: sparse config, original key names, bf16 weights."""
    source, folder = args.run, args.out or args.run / "model"
    model = new_model()
    model.load_state_dict(torch.load(source / "decoder.pt", weights_only=True, map_location="cpu")["modules"])
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.to(torch.bfloat16).contiguous() for name, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for path in (source / "tokenizer").iterdir():
        shutil.copy(path, folder)
    write_config(folder)
    write_fast_tokenizer(folder)
    figures.training(source).savefig(folder.parent / "demo-training.png")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB", file=sys.stderr)


def different(config):
    """Fields that differ from the class default, the only ones in Hugging Face configs."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}


def write_config(folder):
    """Write the JSON files of a llava-hf folder, except those of the tokenizer."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": VOCABULARY, "pad_token_id": VOCABULARY + 1, "projector_hidden_act": "gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "image_seq_length": VISION.num_patches, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {"model_type": "llama", **different(TEXT)},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": VISION.hidden_size, **different(VISION)},
    }  # fmt: skip
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": VOCABULARY + 1}
    preprocessor = preprocessor_json(VISION.image_size)
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": VISION.patch_size, "image_token": IMAGE,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    names = "config", "generation_config", "preprocessor_config", "processor_config"
    for name, value in zip(names, (config, generation, preprocessor, processor), strict=True):
        write_published(folder / f"{name}.json", value)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


# The llava template, for loading the folder with transformers: pictures first, then the turns
CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'user' -%}
USER: {% for part in message.content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor -%}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %} ASSISTANT:
{%- else -%}
{%- for part in message.content if part.type == 'text' %}{{ ' ' + part.text + '</s>' }}{% endfor -%}
{%- endif -%}
{%- endfor -%}
"""


def write_fast_tokenizer(folder):
    """Write tokenizer.json, for loading the folder with transformers, which converts it from tokenizer.model."""
    tokenizer = import_transformers().LlamaTokenizer  # AutoTokenizer omits the dummy space
    tokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------- stage 4: the table

EVALUATED = (
    "list", "describe", "spell", "list", "colour", "shape", "size", "count", "position", "relation", "presence", "read",
)  # fmt: skip
CONDITIONS = ("normal", "blind", "vision dropped")


def evaluate(args):
    """Accuracy on held-out scenes -> demo-accuracy.{csv,md} in the folder --out.

    Greedy decoding gives an answer if and only if each token is the most likely one after the correct tokens before it.
    So one pass over the packed answers gives the exact match of greedy decoding; a test compares real generations.
    """
    checkpoint = load(args.model, "fp32", args.device)
    rows = []
    for unseen, wanted in ((False, args.scenes), (True, args.scenes // 5)):
        for start in range(0, wanted, 8):
            for pair, size in ((False, 8), (True, 2)):  # one pair of pictures for every four single ones
                seeds = range(HELD_OUT + start, HELD_OUT + min(start + size, wanted))
                rows += evaluate_batch(checkpoint, seeds, pair, unseen, args.seed)
            done = sum(not r["unseen"] for r in rows)
            print(f"\revaluate {len(rows)} questions ({done} of the main table)", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    write_table(rows, args.out or args.run)


def held_out_questions(number, pair, unseen, seed):
    """(scenes, questions) of one held-out sample; half of the questions have long answers."""
    rng = random.Random(f"evaluate {number} {pair} {seed}")
    tasks = ("compare", "compare", "pair") if pair else EVALUATED[:3] + tuple(rng.sample(EVALUATED[3:], 3))
    drawn, questions = scenes.sample(number, tasks, pair, unseen)
    return drawn, list({q.question: q for q in questions}.values())  # no question twice


@torch.inference_mode()
def evaluate_batch(checkpoint, seeds, pair, unseen, seed):
    """One dict per question: task, length and, for each of CONDITIONS, whether the answer is correct."""
    model, device = checkpoint.model, checkpoint.device
    pictures, packed = [], []
    for number in seeds:
        drawn, questions = held_out_questions(number, pair, unseen, seed)
        pictures += [to_bytes(scenes.draw_scene(s)) for s in drawn]
        packed.append(pack(checkpoint.tokenizer, [[q] for q in questions], len(drawn), model.config.image_tokens))
    pictures = torch.stack(pictures)
    right = {}
    for condition in CONDITIONS:
        shown = torch.full_like(pictures, 128) if condition == "blind" else pictures  # grey
        hidden, target = hidden_states(model, shown, packed, device, drop_vision=condition == "vision dropped")
        right[condition] = (model.language_model.logits(hidden).argmax(-1) == target).cpu()
    result = []
    for i, row in enumerate(packed):
        for q, first, stop in row.answers:
            numbers = {condition: int(right[condition][i, first:stop].all()) for condition in CONDITIONS}
            numbers["tokens >= 2"] = right["normal"][i, first + 1 : stop].float().mean().item()
            about = {"task": q.task, "kind": q.kind, "value": q.value, "words": q.dependent_words, "unseen": unseen}
            result.append({**about, "names_unseen": names_unseen(q), **numbers})
    return result


def names_unseen(q):
    """Does the question or its answer name a held-out colour x shape pair?"""
    words = set(q.answer.rstrip(".").split())
    apart = q.task in ("colour", "shape", "pair")  # "The star is red."
    return any(f"{c} {s}" in q.answer + q.question or (apart and {c, s} <= words) for c, s in scenes.UNSEEN_PAIRS)


def majority(rows):
    """Accuracy of always giving the most common answer of each kind."""
    by_kind = defaultdict(Counter)
    for r in rows:
        by_kind[r["kind"]][r["value"]] += 1
    return sum(max(values.values()) for values in by_kind.values()) / len(rows)


def write_table(rows, folder):
    """Write the accuracy table of assets/README.md: a row per task, then totals."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = [r for r in rows if not r["unseen"]]
    groups = {task: [r for r in seen if r["task"] == task] for task in TASKS}
    groups["all"] = seen
    groups["long answers (6+ image words)"] = [r for r in seen if r["words"] >= 6]
    groups["unseen colour x shape pairs"] = [r for r in rows if r["names_unseen"]]
    head = ["task", "questions", "exact match", "tokens >= 2", "majority", "blind", "vision dropped after token 1"]
    table = []
    for name, group in groups.items():
        if group:
            keys = "normal", "tokens >= 2", "blind", "vision dropped"
            right, later, blind, dropped = (sum(r[key] for r in group) / len(group) for key in keys)
            shares = (f"{100 * v:.1f}" for v in (right, later, majority(group), blind, dropped))
            table.append([name, str(len(group)), *shares])
    with open(folder / "demo-accuracy.csv", "w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([head, *table])
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *table]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "demo-accuracy.md").write_text(text + "\n")
    print(text)


def main(argv=None):
    training = "run", "steps", "batch", "seed"
    stages = {  # its function and the flags that it uses
        "tower": (train_tower, *training),
        "decoder": (train_decoder, *training),
        "export": (export, "run", "out"),
        "evaluate": (evaluate, "model", "run", "out", "scenes", "seed"),
    }
    parser = flags(__doc__)
    # fmt: off
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo",
                        help="folder of checkpoints and curves (default runs/demo)")
    parser.add_argument("--model", default=ROOT / "assets" / "demo",
                        help="evaluate: the llava-hf folder to measure (default assets/demo)")
    parser.add_argument("--out", type=Path, help="export: folder of the model (default: model in --run); evaluate: "
                        "folder of the table (default: --run)")
    parser.add_argument("--scenes", type=int, default=800, help="held-out scenes of the table (default 800)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the stage")
    parser.add_argument("--batch", type=int, help="pictures per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # fmt: on
    args = parser.parse_args(argv)
    work, *used = stages[args.stage]
    for name, value in vars(args).items():
        if name not in (*used, "stage", "device") and value != parser.get_default(name):
            parser.error(f"{args.stage} does not use --{name}; leave it out")
    work(args)


if __name__ == "__main__":
    sys.exit(as_command(main))
