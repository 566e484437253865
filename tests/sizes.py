"""The largest tensor that operations return."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sizes(TorchDispatchMode):
    """Records the largest tensor that any operation returns: elements and operation."""

    largest, where = 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.largest:
                self.largest, self.where = tensor.numel(), str(function)
        return out
