"""transformers beside a package of ours that is called `kernels`.

transformers 5 uses Hugging Face's package `kernels` where a distribution of that name is installed. The import finds
ours instead, which comes first on the path, and fails. No switch of transformers prevents that. So no package `kernels`
can be imported while transformers looks for it, and it remembers the answer.
"""

import sys


def import_transformers():
    """The module transformers, which takes Hugging Face's `kernels` for not installed. ImportError if it is missing."""
    ours = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # Python's own way to say that there is no such module
    try:
        import transformers
        from transformers.utils import import_utils

        import_utils.is_kernels_available()
    finally:
        del sys.modules["kernels"]
        if ours is not None:
            sys.modules["kernels"] = ours
    return transformers
