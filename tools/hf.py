"""transformers beside this project: its import, and the arguments of its generate().

transformers 5 uses Hugging Face's package `kernels` if a distribution of that name is installed. The import then finds
ours, which is first on the path, and fails; transformers has no option against that. So `kernels` is made impossible
to import while transformers checks for it; transformers caches the result of that check.
"""

import sys

import torch


def import_transformers():
    """The module transformers, set to work without Hugging Face's `kernels`. ImportError if it is not installed."""
    ours = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # makes `import kernels` raise ImportError
    try:
        import transformers
        from transformers.utils import import_utils

        import_utils.is_kernels_available()
    finally:
        del sys.modules["kernels"]
        if ours is not None:
            sys.modules["kernels"] = ours
    return transformers


def hf_inputs(asked, dtype, device="cpu"):
    """Arguments of transformers' generate() for a Generation with one picture."""
    image, (picture,) = asked.checkpoint.config.image_token_index, asked.images
    ids = [i for t in asked.ids for i in [t] * (picture["tokens"] if t == image else 1)]
    ids, pixels = torch.tensor([ids], device=device), torch.stack(asked.pixels).to(device, dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "suppress_tokens": asked.checkpoint.never_ids}
    if not asked.checkpoint.config.image_grid_pinpoints:
        return inputs | {"pixel_values": pixels}
    # LLaVA-NeXT: (pictures, squares, 3, S, S) and (height, width)
    return inputs | {"pixel_values": pixels[None], "image_sizes": torch.tensor([picture["size"][::-1]])}
