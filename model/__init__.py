"""A LLaVA that can be read in an hour: load a checkpoint, ask it about a picture.

    load("assets/demo").ask("How many objects are there?", "x.png", prune="plphp", retention=0.5)

Reading order: config, load, tokenizer, image, clip, llama, llava, cache, generate.
"""

from .config import InputError
from .generate import Batch, Generation, Sampling, ask, out_of_memory
from .load import Checkpoint, load, open_checkpoint

__version__ = "0.1.0"

__all__ = [
    "Batch", "Checkpoint", "Generation", "InputError", "Sampling", "ask", "load", "open_checkpoint", "out_of_memory",
]  # fmt: skip
