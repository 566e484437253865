"""A small LLaVA implementation: load a checkpoint and ask it about a picture.

    load("assets/demo").ask("How many objects are there?", "x.png", prune="plphp", retention=0.5)

Reading order: prompt, generate, llama, cache, view, llava, clip, image, tokenizer, checkpoint, config (see README.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import PruneLike
    from .batch import Batch, out_of_memory
    from .checkpoint import Checkpoint, load, open_checkpoint
    from .config import InputError
    from .generate import Generation
    from .image import PictureLike
    from .sampling import Sampling

__version__ = "0.1.0"

__all__ = [
    "Batch", "Checkpoint", "Generation", "InputError", "PictureLike", "PruneLike", "Sampling", "load",
    "open_checkpoint", "out_of_memory",
]  # fmt: skip


def __getattr__(name):
    """Import a name of `__all__` on first use: importing torch takes a second, and `run.py -h` does not need it."""
    if name in __all__:
        files = "config", "sampling", "image", "api", "checkpoint", "batch", "generate"
        modules = (import_module(f".{file}", __name__) for file in files)
        return next(vars(module)[name] for module in modules if name in vars(module))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__]
