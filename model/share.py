"""What a process has of the language model and its cache: here everything. `model.parallel.Share` is a part."""

import torch

from .config import InputError

PRIME = 2**31 - 1


class Whole:
    """All weights and all heads. H heads, of any kind."""

    ranks = 1  # processes that share the model

    def gather(self, own):
        """own (H of this process, ...) -> (H of all, ...), the same in all processes."""
        return own

    def own(self, of_all):
        """(H of all, ...) -> (H of this process, ...)."""
        return of_all

    def total(self, own):
        """The sum of the processes' tensors."""
        return own

    def read(self, name, file, key, **kind):
        """What this process loads of a tensor that an open safetensors file has as `key`. kind: device and dtype."""
        return file.get_tensor(key).to(**kind)

    def numbers(self, weight, at):
        """Single numbers of a weight, at the indices that `torch.unravel_index` gives."""
        return weight[at]


WHOLE = Whole()


def checksum(before, tensors):
    """A number below `PRIME` for `before`, such a number, and tensors of bool or int64. Does not wait for a device."""
    for t in tensors:
        weights = torch.arange(1, t.numel() + 1, device=t.device) * 2_654_435_761 % PRIME  # Knuth's hash of the places
        before = (31 * before + (t.flatten() * weights % PRIME).sum()) % PRIME
    return before


def gather_alike(share, own, chosen):
    """share.gather(own), for own (H, L) int32, where chosen is a `checksum` of what the method chose in this process.

    InputError, in all processes, if they chose differently: each has its own part of a different answer.
    """
    if share.ranks == 1:
        return own
    found = share.gather(torch.cat((own, own.new_full((len(own), 1), int(chosen))), 1))
    if (found[:, -1] != found[0, -1]).any():
        raise InputError(
            "the method chose other tokens in another process; let it draw numbers only from torch, and give all "
            "processes the same file"
        )
    return found[:, :-1]
