"""One of the processes of tests/test_parallel.py: answers all cases of a file with its part of the models.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/one_of_many.py FOLDER

FOLDER/cases.json is a list of cases, see `answered`; process 0 writes FOLDER/answers.pt, a list of their results.
"""

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Batch, Generation, Sampling, open_checkpoint
from model.parallel import split
from model.processes import Team, connect
from model.report import logits_along

PROMPT, TOKENS = "what is in the picture?", 32


def answered(checkpoint, methods, picture):
    """{method: what it kept and said, and the logits along its answer}, and the ids of four of them in one batch."""
    asked = {m: ask(checkpoint, m, picture) for m in methods}
    found = {}
    for method, generation in asked.items():
        "".join(generation)
        found[method] = {name: getattr(generation, name) for name in ("token_ids", "kept", "masks", "bytes_held")}
        found[method]["bytes_reserved"] = generation.bytes_reserved
        found[method]["logits"] = logits_along(generation.again(generation.prune), generation.token_ids)
    batch = Batch()
    together = [ask(checkpoint, m, picture) for m in [*methods, methods[-1]][:4]]
    for generation in together:
        batch.add(generation)
    while batch:
        batch.advance()
    return found, [generation.token_ids for generation in together]


def ask(checkpoint, method, picture, compile=False):
    """A Generation that no stop id ends."""
    object.__setattr__(checkpoint, "stop_ids", ())
    return Generation(
        checkpoint, PROMPT, picture, Sampling(max_new_tokens=TOKENS), template="raw", prune=method, remember=True,
        compile=compile,
    )  # fmt: skip


class Peak(TorchDispatchMode):
    """bytes: the most that tensors made by operations took at a time. Mapped files are not counted."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if plain(t)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if plain(t)):
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return out


def plain(t):
    return isinstance(t, torch.Tensor) and not t.is_meta


def sizes(module):
    """Bytes of a module's parameters in this process."""
    return sum(p.nbytes for p in module.parameters())


class Collectives(TorchDispatchMode):
    """counts: {name of a collective: number of calls}."""

    NAMES = {"allreduce_": "all_reduce", "allgather_": "all_gather"}  # others have their own

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[self.NAMES.get(func._opname, func._opname)] += 1
        return func(*args, **(kwargs or {}))


def collectives(checkpoint, method, picture):
    """Number of collectives of a prefill and of a decode step: [{name: count}, {name: count}]."""
    generation, told = ask(checkpoint, method, picture), []
    pieces = iter(generation)
    for _ in range(2):
        with Collectives() as counted:
            next(pieces)
        told.append(dict(counted.counts))
    pieces.close()
    return told


def main(folder):
    team = Team(*connect())
    team.join({})
    team.divide(team.size, "cpu")
    answers = []
    for case in json.loads((folder / "cases.json").read_text()):
        checkpoint = split(open_checkpoint(case["folder"]), team.mesh["tp"])
        with Peak() as peak:
            checkpoint.read_weights("bf16")
        model = checkpoint.model
        memory = sizes(model.language_model), sizes(model), peak.bytes
        every = [None] * team.size
        dist.all_gather_object(every, memory)
        checkpoint.read_weights("fp32")
        counts = {m: collectives(checkpoint, m, case["picture"]) for m in case["counted"]}
        compiled = {m: ask(checkpoint, m, case["picture"], compile=True) for m in case["compiled"]}
        ids = {m: ("".join(generation), generation.token_ids)[1] for m, generation in compiled.items()}
        answers.append((answered(checkpoint, case["methods"], case["picture"]), every, counts, ids))
    if team.rank == 0:
        torch.save(answers, folder / "answers.pt")
    team.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
