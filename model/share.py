"""What a process has of the language model and its cache: everything, or its part of a model that several share."""

import torch
import torch.distributed as dist

from .config import InputError

OUTPUTS, INPUTS, ONCE = 0, 1, None  # the divided dimension of a weight; ONCE: process 0 has all, the others zeros
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
        """The sum of the processes' tensors. May change `own`."""
        return own

    def each(self, function, pictures, counts):
        """function(squares) of each picture. pictures: an iterable of squares (n, ...), with the n of counts. function
        computes each square on its own -> (n, ...).
        """
        return map(function, pictures)

    def size(self, name, weight):
        """Numbers in the whole parameter of the `Llava` that has this name."""
        return weight.numel()

    def read(self, name, file, key, **kind):
        """What this process loads of a tensor that an open safetensors file has as `key`. kind: device and dtype."""
        return file.get_tensor(key).to(**kind)

    def sample(self, name, weight, count):
        """`count` evenly spaced numbers of the parameter of a `Llama` that has this name."""
        return weight.flatten()[spread(weight.numel(), count, weight.device)]


WHOLE = Whole()


class Share:
    """The part of one process, see `model.parallel`. Methods as in `Whole`.

    parts   {name of a tensor in the model, or in the file of look-ahead rows: (its whole shape, divided dimension)}
    """

    def __init__(self, mesh):
        self.group, self.device, self.parts = mesh.get_group(), mesh.device_type, {}
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()

    def gather(self, own):
        sent = own.to(self.device).contiguous()
        sent = sent.view(torch.uint8) if own.dtype == torch.bool else sent  # no backend sends bool
        every = [torch.empty_like(sent) for _ in range(self.ranks)]
        dist.all_gather(every, sent, group=self.group)
        return torch.cat(every).view(own.dtype).to(own.device)

    def own(self, of_all):
        return of_all.tensor_split(self.ranks)[self.rank]

    def total(self, own):
        sent = own.to(self.device).contiguous()
        dist.all_reduce(sent, group=self.group)
        return sent.to(own.device)

    def each(self, function, pictures, counts):
        if sum(counts) <= 1:  # for all to compute
            return map(function, pictures)
        start, stop = self.bounds(sum(counts))
        own, before = [], 0
        for squares in pictures:
            part = squares[max(0, start - before) : max(0, stop - before)]
            before += len(squares)
            if len(part):
                own.append(function(part))
        own = torch.cat(own) if own else function(squares[:1])[:0]  # none, but of the right shape
        return self.gather_parts(own, sum(counts)).split(counts)

    def size(self, name, weight):
        return self.parts[name][0].numel() if name in self.parts else weight.numel()

    def read(self, name, file, key, **kind):
        shape, dim = self.parts.get(name, (None, ONCE))
        if dim is ONCE:
            own = file.get_tensor(key).to(**kind)
            return own if shape is None or self.rank == 0 else torch.zeros_like(own)
        piece, (start, stop) = file.get_slice(key), self.bounds(shape[dim])
        own = piece[start:stop] if dim == OUTPUTS else piece[:, start:stop]
        return own.to(**kind).contiguous()

    def sample(self, name, weight, count):
        shape, dim = self.parts.get(f"language_model.{name}", (None, ONCE))
        if dim is ONCE:
            found = WHOLE.sample(name, weight, count)
            return found if shape is None else self.total(found)
        at = [*torch.unravel_index(spread(shape.numel(), count, weight.device), shape)]
        start, stop = self.bounds(shape[dim])
        here = (at[dim] >= start) & (at[dim] < stop)
        at[dim] = (at[dim] - start).clamp(0, stop - start - 1)
        return self.total(torch.where(here, weight[tuple(at)], 0))

    def gather_parts(self, own, size):
        """own (n, ...), for the n numbers of `bounds(size)` -> (size, ...). The last parts are padded to be sent."""
        missing = -(-size // self.ranks) - len(own)
        return self.gather(torch.cat((own, own.new_zeros(missing, *own.shape[1:]))))[:size]

    def bounds(self, size):
        """The part of this process in `size` numbers. The last parts may be smaller, as with `torch.chunk`."""
        each = -(-size // self.ranks)
        return min(size, self.rank * each), min(size, (self.rank + 1) * each)


def spread(size, count, device):
    """`count` (at least 2) evenly spaced indices of `size` numbers, with the first and the last."""
    return torch.arange(count, device=device) * (size - 1) // (count - 1)


def checksum(before, tensors):
    """A number below `PRIME` for `before`, such a number, and tensors of bool or int64. Does not wait for a device."""
    for t in tensors:
        weights = torch.arange(1, t.numel() + 1, device=t.device) * 2_654_435_761 % PRIME  # Knuth's hash of the places
        before = (31 * before + ((t.flatten() + 1) * weights % PRIME).sum()) % PRIME  # + 1, so that zeros count
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
