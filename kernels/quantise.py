"""Rows of keys and values in 8 bits: codes and a scale per row (a slot belongs to one head, so per slot and head).

    x = scale * codes      scale = max |x| / largest code, in fp16      codes: int8, -127 .. 127, or float8_e4m3fn

A row of D channels takes D + 2 bytes instead of 2 * D. One scale per row costs the kernels one multiplication per slot,
of a score or a weight, instead of one per element. NOTES.md has the errors of other choices.
"""

import torch

CODES = {torch.int8: 127, torch.float8_e4m3fn: 448}  # the codes' types, and the largest code of each
SMALLEST = 2**-24  # scale of a row of zeros, so that nothing is divided by 0


def quantise_ref(x, dtype):
    """The specification of `quantise`: row by row."""
    rows, largest = x.reshape(-1, x.shape[-1]).float(), CODES[dtype]
    codes, scale = torch.empty(rows.shape, dtype=dtype, device=x.device), rows.new_empty(len(rows), dtype=torch.float16)
    for i, row in enumerate(rows):
        scale[i] = (row.abs().max() / largest).clamp(min=SMALLEST)
        wanted = (row / scale[i].float()).clamp(-largest, largest)
        codes[i] = (wanted.round() if dtype == torch.int8 else wanted).to(dtype)  # both: half to even
    return codes.view(x.shape), scale.view(x.shape[:-1])


def quantise(x, dtype):
    """x (..., D) -> codes (..., D) in dtype, int8 or float8_e4m3fn, and scale (...) fp16. Rounds half to even.

    A row with NaN or infinity gets such a scale, so that it does not become finite. ValueError for another dtype.
    """
    if dtype not in CODES:
        raise ValueError(f"dtype {dtype} has no codes; give {' or '.join(map(str, CODES))}")
    x, largest = x.float(), CODES[dtype]
    scale = (x.abs().amax(-1) / largest).clamp(min=SMALLEST).half()
    codes = (x / scale[..., None].float()).clamp_(-largest, largest)
    return (codes.round_() if dtype == torch.int8 else codes).to(dtype), scale


def dequantised(codes, scale, dtype):
    """codes (..., D) and scale (...) -> rows (..., D) in dtype. Without a scale (None) `codes` are the rows."""
    return codes if scale is None else codes.to(dtype) * scale[..., None].to(dtype)


def has_e4m3(device):
    """True if Triton computes with float8_e4m3fn there: compute capability 8.9 or higher, or the interpreter."""
    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)
