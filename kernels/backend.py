"""Which implementation runs, and the checks that all operations share."""

import torch

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def choose_backend(backend, device):
    """ "auto", "triton" or "torch" for tensors on a device -> "torch", so far the only one. Never a silent fallback.

    ValueError: an unknown name; "triton", whose kernels do not exist yet.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise ValueError(f"backend 'triton' has no kernels yet (the tensors are on {device}); use 'torch'")
    return "torch"


def check_alike(**tensors):
    """All of one floating dtype and on one device, their last dimension without gaps; ValueError names the odd one."""
    (first_name, first), *_ = tensors.items()
    if first.dtype not in DTYPES:
        raise ValueError(f"{first_name} is {first.dtype}; use one of {', '.join(map(str, DTYPES))}")
    for name, t in tensors.items():
        if t.dtype != first.dtype:
            raise ValueError(f"{name} is {t.dtype} but {first_name} is {first.dtype}; make them equal")
        if t.device != first.device:
            raise ValueError(f"{name} is on {t.device} but {first_name} on {first.device}; move one of them")
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ValueError(f"{name} has non-contiguous rows (strides {t.stride()}); call .contiguous()")
