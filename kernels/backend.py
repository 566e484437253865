"""Backend selection, and the checks that all operations share."""

import importlib.util
import math
import os

import torch

from .quantise import has_e4m3

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD_DIM = 256  # limit of the Triton kernels; larger values were neither compiled nor tested


def interpreted():
    """True if Triton runs kernels in its interpreter, on a CPU: TRITON_INTERPRET=1, read when triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(backend, device, dtype, inputs=(), stored=None):
    """Resolve backend ("auto", "triton" or "torch") for tensors of a dtype on a device -> "triton" or "torch".

    "auto" selects Triton for CUDA tensors that it supports, otherwise PyTorch. "triton" never falls back: it raises
    ValueError if triton is not installed, for float64, for tensors on the wrong device (it must be CUDA, or the CPU
    with TRITON_INTERPRET=1), for head dimensions above 256, for a lazily negated view, and for an input that requires a
    gradient while autograd is on, and for float8_e4m3fn arenas where the GPU has no such type. inputs: tensors
    (..., D); stored: dtype of the arenas.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    why = None
    if importlib.util.find_spec("triton") is None:
        why = "triton is not installed; install it or use 'torch'"
    elif dtype == torch.float64:
        why = "its kernels compute in fp32, not in torch.float64; use 'torch'"
    elif device.type != ("cpu" if interpreted() else "cuda"):
        where = "in the interpreter it needs CPU tensors" if interpreted() else "it needs CUDA or TRITON_INTERPRET=1"
        why = f"the tensors are on {device}; {where}, otherwise use 'torch'"
    elif stored == torch.float8_e4m3fn and not has_e4m3(device):
        why = "this GPU has no float8_e4m3fn (compute capability 8.9 or higher has it); use int8 or 'torch'"
    elif any(t.shape[-1] > HEAD_DIM for t in inputs):
        why = f"its kernels support head dimensions up to {HEAD_DIM}, not {inputs[0].shape[-1]}; use 'torch'"
    elif any(t.is_neg() for t in inputs):
        why = "its kernels cannot read an input that is a lazily negated view; call .resolve_neg()"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        why = "its kernels have no backward pass and an input requires a gradient; use torch.no_grad() or 'torch'"
    if why and backend == "triton":
        raise ValueError(f"backend 'triton': {why}")
    return "torch" if why else "triton"


def head_and_token_strides(*tensors):
    """Strides of the first two dimensions of (H, T, D) tensors, in units of `align` elements, and `align`.

    A kernel multiplies them by the constant `align`, which tells the compiler that rows are aligned, so that it emits
    16-byte loads. The stride of a dimension of size 1 has no effect.
    """
    strides = [16 if n == 1 else s for t in tensors for n, s in zip(t.shape[:2], t.stride()[:2], strict=True)]
    align = math.gcd(16, *strides)
    return [s // align for s in strides], align


def check_alike(**tensors):
    """ValueError, naming the tensor, unless all have one floating dtype, one device and a contiguous last dimension."""
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


def check_tables(tables, ndim, device=None):
    """ValueError unless all {name: table} are non-empty int32 tensors of one shape, (S,) or, for ndim 2, (L, S), and on
    `device`, by default the device of the first."""
    first, *_ = tables.values()
    for t in tables.values():
        if not (
            isinstance(t, torch.Tensor) and t.dtype == torch.int32 and t.shape == first.shape and t.ndim == ndim
            and t.device == (device or first.device) and t.numel()
        ):  # fmt: skip
            found = ", ".join(f"{name} is {_described(table)}" for name, table in tables.items())
            shape = "(S,)" if ndim == 1 else "(L, S)"
            raise ValueError(f"{found}; give int32 tensors {shape}, on {device or 'one device'}")


def _described(t):
    return f"{t.dtype} {tuple(t.shape)} on {t.device}" if isinstance(t, torch.Tensor) else f"of type {type(t).__name__}"
