"""What a process has of the language model and its cache: here everything. `model.parallel.Share` is a part."""


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
