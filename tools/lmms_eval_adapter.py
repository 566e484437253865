"""Evaluate a checkpoint with lmms-eval (pip install lmms-eval; written for 0.7.3), the whole cache or a pruned one.

    python tools/lmms_eval_adapter.py --tasks pope --batch_size 8 --output_path out/ --log_samples \\
        --model_args 'pretrained=llava-hf/llava-1.5-7b-hf,device=cuda,image_mode=pad,prune="plphp:window=4,margin=0.1"'

Runs lmms-eval's own command line with this model as --model; all other flags are lmms-eval's (--tasks, --batch_size,
--limit, --gen_kwargs, --output_path, --log_samples, ...). In --model_args, a SPEC with commas is put in double quotes,
and the whole argument in single quotes for the shell: lmms-eval does not split at commas in quotes or brackets.

Model arguments: pretrained, prune (a SPEC as in run.py --prune), retention, keep_tokens, dtype, device, kv_dtype,
template, image_mode, system, as in run.py, and log=FILE.jsonl, to which a line per request is appended: tokens kept, KV
bytes of the whole prompt and held. One line with their means is printed at the end of the run.

Without this command, an entry point of the group `lmms_eval.models` registers the model as `plphp`:
`plphp = "tools.lmms_eval_adapter:manifest"`.
"""

import copy
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
# without the folder of this file, where evaluate.py hides the package `evaluate` from lmms-eval
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "tools")]

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from model.api import choose_method, named_with_budget, off_budget  # noqa: E402
from model.batch import answer_each, out_of_memory  # noqa: E402
from model.checkpoint import GENERATION, SAMPLING, choose_device, open_checkpoint  # noqa: E402
from model.config import InputError, brief  # noqa: E402
from model.console import note, one_line, say  # noqa: E402
from model.generate import Generation  # noqa: E402
from model.sampling import Chooser, Sampling  # noqa: E402
from tools.command import as_command, fail, flags  # noqa: E402
from tools.hf import import_transformers  # noqa: E402

try:
    import lmms_eval  # noqa: F401  fails at once, unlike the next line

    import_transformers()  # before lmms-eval does
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from tqdm import tqdm

    missing = None
except ImportError as broken:
    lmms = GenerationResult = object  # -h works without lmms-eval
    missing = broken

NAME = "plphp"
LONGEST = 1024  # new tokens if a task sets no limit, as in lmms-eval's own LLaVA


def main(argv=None):
    _, rest = flags(__doc__).parse_known_args(argv)
    if missing is not None:
        return fail(f"cannot import lmms-eval ({one_line(missing)}); pip install lmms-eval==0.7.3", 2)
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    sys.argv = ["lmms-eval", "--model", NAME, *rest]  # read by cli_evaluate
    cli_evaluate()


def manifest():
    """The entry point of lmms-eval's group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path="tools.lmms_eval_adapter.Plphp")


class Likelihood(tuple, GenerationResult):
    """(log-probability, is it greedy). lmms-eval 0.7.3 would turn a plain tuple into a string; of a GenerationResult it
    takes `text`, here the pair itself, and caches it unless strip() is empty. It would read a list from the cache."""

    def __init__(self, _):
        GenerationResult.__init__(self, text=self)

    def strip(self):
        return ""


class Plphp(lmms):
    """The model for lmms-eval. A request that fails is noted, and its answer is "" or the log-probability -inf."""

    def __init__(
        self, pretrained, prune="none", retention=None, keep_tokens=None, dtype="auto", device="auto", kv_dtype="auto",
        template="auto", image_mode="auto", system=None, log=None, batch_size=1, max_batch_size=None,
    ):  # fmt: skip
        """Arguments as in the module's docstring. batch_size: questions decoded together. InputError."""
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("several processes are not supported; run one per GPU with parts of --offset and --limit")
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise InputError(f"batch_size is {batch_size}, max_batch_size {max_batch_size}; give --batch_size N alone")
        self.batch_size, self._device = int(batch_size), choose_device(device)
        self.checkpoint = open_checkpoint(unquoted(pretrained))
        self.method = choose_method(unquoted(prune), self.checkpoint.folder, retention, keep_tokens)
        self._how = {"template": template, "image_mode": image_mode, "system": unquoted(system), "kv_dtype": kv_dtype}
        example = Generation(self.checkpoint, "?", prune=self.method, **self._how)  # arguments are checked here
        try:
            self._log = open(unquoted(log), "a", encoding="utf-8") if log else None  # noqa: SIM115  clean() closes it
        except OSError as wrong:
            raise InputError(f"cannot write log={log} ({wrong}); give another file") from wrong
        self._totals, self._noted = Counter(), set()
        self.checkpoint.read_weights(dtype, self._device)
        self.named = named_with_budget(self.method) if self.method else "no pruning"
        mode = example.image_settings.mode
        say(f"{self.checkpoint}, template {example.template}, image_mode {mode}, {self.named}")

    @property
    def device(self):
        return self._device

    # ------------------------------------------------------------ answers

    def generate_until(self, requests):
        """The answers, a GenerationResult each. InputError before the first one for settings that are not supported."""
        asked, repeats, failed = [], Counter(), self._totals["failed"]
        for request in requests:  # a repeated one gets another seed
            asked.append((request, self._sampling(request.args[1], repeats[id(request)])))
            repeats[id(request)] += 1

        def begin(question):
            (context, _, visual, doc_id, task, split), sampling = question[0].args, question[1]
            return self._generation(context, visual, self.task_dict[task][split], doc_id, sampling)

        def crowded(number):
            self._note(f"out of memory with {number} questions at once, retrying one by one; lower --batch_size")

        results = [None] * len(asked)
        with tqdm(total=len(asked), desc=NAME, disable=None) as progress:
            for number, answer in answer_each(begin, asked, self.batch_size, crowded):
                failure = answer if isinstance(answer, Exception) else answer.failure
                self._count(requests[number], answer, failure)
                results[number] = GenerationResult("")
                if failure is None:
                    counts = TokenCounts(answer.prompt_tokens, len(answer.token_ids))
                    results[number] = GenerationResult(answer.text, counts)
                progress.update()
        self._check(len(requests), self._totals["failed"] - failed)
        return results

    def _sampling(self, given, repeat):
        """Sampling for a task's generation_kwargs; see `sampling_of`."""
        sampling, notes = sampling_of(given, repeat)
        for line in notes:
            self._note(line)
        return sampling

    def generate_until_multi_round(self, requests):
        raise InputError("tasks with several rounds are not supported; choose others")

    # ------------------------------------------------------------ likelihoods

    def loglikelihood(self, requests):
        """(sum of the log-probabilities of the continuation's tokens, is each the most probable one) per request.

        The prompt is prefilled and pruned as for an answer; then the continuation passes through the cache as if it had
        been generated. The end of the answer is not part of it. Consecutive requests with the same prompt share its
        prefill. The choices of a multiple-choice task are strings. If lmms-eval takes the one with the smallest number,
        as 0.7.3 does, their log-probabilities are returned with the sign changed.
        """
        choices = any(isinstance(request.args[1], str) for request in requests)
        sign = -1 if choices and smallest_wins() else 1
        if sign < 0:
            self._note("this lmms-eval takes the choice with the smallest number: log-probabilities are negated for it")
        results, before, prompt, failed = [], None, None, self._totals["failed"]
        for request in tqdm(requests, desc=NAME, disable=None):
            context, target, visual, doc_id, task, split = request.args
            docs, generation = self.task_dict[task][split], None
            try:
                text = target if isinstance(target, str) else target(docs[doc_id])
                if before != (context, visual, doc_id, task, split):
                    before = prompt = None  # frees the cache of the prompt before
                    generation = self._generation(context, visual, docs, doc_id, Sampling())
                    with torch.inference_mode():
                        prompt = generation, generation.prefill()
                    before = context, visual, doc_id, task, split
                generation, logits = prompt
                total, greedy = likelihood(generation, logits, continuation(generation, text))
                failure = None
            except Exception as broken:
                if not isinstance(broken, InputError | FloatingPointError) and not out_of_memory(broken):
                    raise
                total, greedy, failure = float("-inf"), False, broken.with_traceback(None)
            results.append(Likelihood((sign * total if isinstance(target, str) else total, greedy)))
            self._count(request, generation, failure)
        self._check(len(requests), self._totals["failed"] - failed)
        return results

    # ------------------------------------------------------------ both

    def _generation(self, context, visual, docs, doc_id, sampling):
        """The Generation of a request. InputError also for pictures that the task cannot give."""
        try:
            visuals = visual(docs[doc_id]) if visual else None
        except Exception as broken:
            why = f"{type(broken).__name__}: {one_line(broken)[:200]}"
            raise InputError(f"the task failed to give the pictures ({why}); check its data") from broken
        pictures = pictures_of(visuals or [])
        return Generation(self.checkpoint, context, pictures, sampling, prune=self.method, **self._how)

    def _count(self, request, generation, failure):
        """Add a request to the means and to the log. generation: a Generation after its prefill, unless it failed."""
        *_, doc_id, task, split = request.args
        line = {"task": task, "split": split, "doc_id": doc_id, "idx": request.idx}
        self._totals["requests"] += 1
        if failure is not None:
            line |= {"error": one_line(failure)}
            self._totals["failed"] += 1
            self._note(f"{task} {doc_id} failed: {line['error']}", once=line["error"])
        else:
            config = self.checkpoint.config.text_config
            row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            full = row * self.checkpoint.dtype.itemsize * generation.prompt_tokens
            vision, kept = generation.vision_tokens, generation.retention
            line |= {
                "prompt_tokens": generation.prompt_tokens, "vision_tokens": vision, "retention": kept,
                "kv_bytes_full": full, "kv_bytes_held": generation.bytes_held, "new_tokens": len(generation.token_ids),
            }  # fmt: skip
            wanted = vision * (generation.wanted or 0)
            self._totals.update(vision=vision, kept=vision * kept, wanted=wanted, full=full, held=generation.bytes_held)
        if self._log:
            print(json.dumps(line, ensure_ascii=False, default=str), file=self._log, flush=True)

    def _check(self, asked, failed):
        """RuntimeError if all of several requests failed: the scores would look like a result."""
        if failed == asked > 1:
            raise RuntimeError(f"all {asked} requests failed; fix the cause noted above and run again")

    def _note(self, text, once=None):
        """A line on stderr, once for each `once` (by default the text)."""
        if (once or text) not in self._noted:
            self._noted.add(once or text)
            note(text)

    @property
    def summary(self):
        """The requests so far, in one line: how many, vision tokens kept, KV bytes per prompt of whole and held."""
        t = self._totals
        asked = t["requests"] - t["failed"]
        line = f"{self.named}: {t['requests']} requests"
        line += f", {t['failed']} of them failed and are scored like answers" if t["failed"] else ""
        if asked:
            line += f"; {100 * t['kept'] / t['vision']:.1f} % of the vision tokens kept" if t["vision"] else ""
            line += f"; KV cache of a prompt {t['full'] / asked / 1e6:.3f} MB, held {t['held'] / asked / 1e6:.3f} MB"
        return line

    def clean(self):
        """Called by lmms-eval after the last request: prints the summary and frees the weights."""
        say(self.summary)
        vision = self._totals["vision"]
        off = vision and off_budget(self.method, self._totals["kept"] / vision, self._totals["wanted"] / vision or None)
        if off:
            note(off)
        if self._log:
            self._log.close()
        self.checkpoint = self._log = None
        super().clean()


def unquoted(text):
    """A model argument without the quotes that protect its commas."""
    quoted = isinstance(text, str) and len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def pictures_of(visuals):
    """The pictures of a request; InputError for anything else, which lmms-eval uses for videos and sound."""
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            what = f"the path {visual[:80]!r}" if isinstance(visual, str) else f"a {type(visual).__name__}"
            raise InputError(f"the task gives {what}, a video or sound; only tasks with pictures are supported")
    return list(visuals)


def sampling_of(given, repeat=0):
    """(Sampling, notes, one line each) for a task's generation_kwargs. repeat: how often the question was asked before.

    temperature alone decides whether to sample, but do_sample false is greedy, and true without a temperature means 1.
    InputError for settings that transformers' generate() knows and that are not implemented here; a note for others.
    """
    given, neutral = dict(given), GENERATION | SAMPLING
    until, temperature, sampled = (given.pop(name, None) for name in ("until", "temperature", "do_sample"))
    longest, top_p, top_k, seed = (given.pop(name, None) for name in ("max_new_tokens", "top_p", "top_k", "seed"))
    temperature = float(sampled is True) if temperature is None else temperature
    notes = []
    if sampled is False and temperature:
        notes.append(f"generation_kwargs: do_sample is false, so temperature {temperature} has no effect")
        temperature = 0
    for name, value in given.items():
        if value in (None, []) or (name in neutral and value == neutral[name]):
            continue
        if name in neutral:
            raise InputError(f"generation_kwargs asks for {name} {value}, which is not implemented; override it with "
                             f"--gen_kwargs {name}={neutral[name]}")  # fmt: skip
        notes.append(f"generation_kwargs: {name} {brief(value)} has no effect here")
    stop = [until] if isinstance(until, str) else until or []
    return Sampling(
        LONGEST if longest is None else longest, temperature, (top_k or None) if temperature else None,
        top_p if temperature else None, (seed or 0) + repeat, [text for text in stop if text != ""],
    ), notes  # fmt: skip


def smallest_wins():
    """Does lmms-eval's multiple choice take the smallest number? In 0.7.3 it does: its own models return losses."""
    from lmms_eval.api.task import ConfigurableTask

    task = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice", config=SimpleNamespace(process_results=None), _metric_fn_list={"acc": None},
        multiple_input=False, multiple_target=False, doc_to_choice=lambda _: ["a", "b"], doc_to_target=lambda _: 0,
    )  # fmt: skip
    try:
        return ConfigurableTask.process_results(task, {}, [(-2.0, False), (-1.0, False)])["acc"] == 1
    except Exception as broken:
        raise InputError(
            f"cannot tell if this lmms-eval takes the smallest or the largest number for a choice ({broken!r:.80}); "
            "use lmms-eval 0.7.3"
        ) from broken


def continuation(generation, text):
    """Ids of a text as the answer to a prompt, list of int. InputError for other than text, or if it does not fit.

    White space before it is replaced by what the template has before an answer: a space, or none after a line break.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the continuation is {brief(text)}; loglikelihood needs a text that is not blank")
    tokenizer = generation.checkpoint.tokenizer
    if generation.template != "raw":
        begins_line = tokenizer.decode(generation.ids[-4:]).endswith("\n")
        text = ("" if begins_line else " ") + text.lstrip()
    ids = tokenizer.encode(text, follows=True)
    if len(ids) > generation.context_left:
        raise InputError(f"the continuation has {len(ids)} tokens; the context has room for {generation.context_left}")
    return ids


@torch.inference_mode()
def likelihood(generation, logits, ids):
    """(sum of the log-probabilities of ids after a prefilled prompt, is each the most probable one that may be chosen).

    generation: after its prefill, whose logits (V,) these are; its cache does not change. Softmax over the whole
    vocabulary, in fp32. FloatingPointError for NaN.
    """
    checkpoint = generation.checkpoint
    language, rows = checkpoint.model.language_model, logits[None]
    target = torch.tensor(ids, device=logits.device)
    if len(ids) > 1:
        cache = copy.deepcopy(generation.cache)
        hidden = language.extend(language.model.embed_tokens(target[None, :-1]), cache, answer=True)
        rows = torch.cat((rows, language.logits(hidden[0])))  # (len(ids), V)
    total = rows.float().log_softmax(-1).gather(1, target[:, None]).double().sum().item()
    if not abs(total) < float("inf"):
        raise FloatingPointError("the model produced NaN or infinity; try dtype=fp32 or bf16")
    best, _ = Chooser(Sampling(), checkpoint.never_ids, logits.device).greedy(rows)
    return total, bool((best == target).all())


if __name__ == "__main__":
    sys.exit(as_command(main))
