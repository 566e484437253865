"""Operations on KV caches in which every head keeps its own tokens. They take tensors and offsets only, no models.

Each operation has a module with a plain PyTorch reference (the specification) and the public function; the Triton
kernels are in `*_triton.py`. Reading order: ragged_decode, ragged_pack, window_scores,
slot_scores.
"""

from .merge_states import merge_states, merge_states_ref
from .quantise import dequantised, quantise, quantise_ref
from .ragged_decode import (
    ragged_decode,
    ragged_decode_append,
    ragged_decode_append_ref,
    ragged_decode_ref,
    rotated,
)
from .ragged_decode_plan import DecodePlan, decode_plan, decode_plans
from .ragged_pack import ragged_pack, ragged_pack_ref
from .slot_scores import add_scores, add_scores_ref, evict, evict_ref
from .window_scores import window_scores, window_scores_ref
