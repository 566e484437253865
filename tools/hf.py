"""Import transformers although this project has a package called `kernels`.

transformers 5 uses Hugging Face's package `kernels` if a distribution of that name is installed. The import then finds
ours, which is first on the path, and fails; transformers has no option against that. So `kernels` is made impossible
to import while transformers checks for it; transformers caches the result of that check.
"""

import sys


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
