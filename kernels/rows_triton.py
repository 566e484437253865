"""What the decode kernels do with single rows: rotation (RoPE), quantisation, codes, scales, work records. As in
PyTorch, to the bit, with two exceptions: a GPU may fuse a multiplication and an addition of the rotation, and Triton's
interpreter truncates to bf16 instead of rounding."""

import triton
import triton.language as tl

from .quantise import SMALLEST

FLOOR = tl.constexpr(SMALLEST)


@triton.jit
def quantised(x, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """A row x [DP], fp32, 0 in padding -> codes [DP] in DTYPE and their scale, fp16; see quantise.py.

    Codes are rounded before they are converted, which is then exact. Triton's interpreter does not round to e4m3
    correctly: 127.7 becomes 64.
    """
    largest: tl.constexpr = LARGEST * 1.0
    top = tl.max(tl.abs(x), 0) + tl.sum(x * 0.0, 0)  # the sum is NaN if x has NaN or infinity: none gets lost
    scale = tl.maximum(tl.div_rn(top, largest), FLOOR, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    codes = tl.clamp(tl.div_rn(x, scale.to(tl.float32)), -largest, largest)
    spacing = 1.0  # distance of neighbouring codes; e4m3 has 3 bits after the first, down to 2^-9
    if not DTYPE.is_int8():
        power = (codes.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^exponent
        spacing = tl.maximum(power * 0.125, 0.001953125)
    shift = 12582912.0 * spacing  # 1.5 * 2^23 of them: the sum is rounded to a multiple, half to even
    return ((codes + shift) - shift).to(DTYPE), scale


@triton.jit
def scales_of(k_scale, v_scale, first, end, BN: tl.constexpr):
    """Scales [BN] of a tile of slots. Requested one tile ahead: 2-byte loads cannot be asynchronous copies."""
    slot = first + tl.arange(0, BN)
    return tl.load(k_scale + slot, slot < end, 0.0), tl.load(v_scale + slot, slot < end, 0.0)


@triton.jit
def unpacked(pairs, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """Pairs of codes, int16 [BN, DP / 2] -> the even and the odd channels in DTYPE, exactly.

    Triton's layout of V in shared memory has units of 8 neighbouring elements, of which an asynchronous copy takes one.
    With pairs these are 16 bytes, and the transposed load that the tensor cores need exists for 16-bit elements only.
    """
    even, odd = pairs.to(tl.int8), (pairs >> 8).to(tl.int8)
    return even.to(CODE, bitcast=True).to(DTYPE), odd.to(CODE, bitcast=True).to(DTYPE)


@triton.jit
def apart(x):
    """x [M, DP] -> its even and its odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def together(even, odd):
    """The inverse of `apart`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def rotated(x, at, there, cos, sin, col, D: tl.constexpr):
    """Load rows of x at offsets at + col and rotate them: x * cos + roll(x, D/2) * sin, in fp32 (cos and sin too),
    rounded once to x's dtype."""
    straight = tl.load(x + at + col, there, 0.0).to(tl.float32)
    rolled = tl.load(x + at + (col + D // 2) % D, there, 0.0).to(tl.float32)
    return (straight * cos + rolled * sin).to(x.dtype.element_ty)


@triton.jit
def item_of(work):
    """This program's row of `DecodePlan.items`: segment, split, first, size, start, cap. Independent loads."""
    at = work + 6 * tl.program_id(0)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def rows_of(segment, heads, times, G: tl.constexpr, M: tl.constexpr):
    """This program's M of the segment's T * G query rows: index r, position in q (B, T, Hq) flattened, valid mask."""
    r = tl.program_id(1) * M + tl.arange(0, M)  # r = t * G + g
    place = ((segment // heads * times + r // G) * heads + segment % heads) * G + r % G
    return r, place, r < times * G
