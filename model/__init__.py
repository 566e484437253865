"""A small LLaVA implementation: load a checkpoint and ask it about a picture.

    load("assets/demo").ask("How many objects are there?", "x.png", prune="plphp", retention=0.5)

Reading order: generate, llama, cache, view, llava, clip, image, tokenizer, load, config (as in README.md).
"""

from .api import PruneLike
from .batch import Batch, out_of_memory
from .config import InputError
from .generate import Generation, ask
from .image import PictureLike
from .load import Checkpoint, load, open_checkpoint
from .sampling import Sampling

__version__ = "0.1.0"

__all__ = [
    "Batch", "Checkpoint", "Generation", "InputError", "PictureLike", "PruneLike", "Sampling", "ask", "load",
    "open_checkpoint", "out_of_memory",
]  # fmt: skip
