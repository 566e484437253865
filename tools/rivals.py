"""Attention over segments of different lengths by other libraries: what `bench_kernels.py` compares our kernels with.

Each rival has a function that returns why it cannot run here, or None, and one that returns function (q (B, Hq, D), K
and V in the rival's own form) -> like q, made once for given lengths (S,) of the S = B * Hkv segments.
"""

import importlib.util
import inspect

import torch
import torch.nn.functional as F

PAGE = 16  # slots per page of FlashInfer's cache, vLLM's default


def missing_16_bit_cuda(dtype, device):
    if device.type != "cuda":
        return "needs CUDA"
    return None if dtype.itemsize == 2 else "needs bf16 or fp16"


# ---------------------------------------------------------------- varlen attention of PyTorch


def heads_as_batch(lengths, group, device):
    """Each segment as a separate sequence. k and v: (n, D) without free slots.

    Some versions lack enable_gqa. The G heads of a group are then passed as G query tokens of one head, which is
    equivalent without a causal mask.
    """
    from torch.nn.attention.varlen import varlen_attn

    one_token = group == 1 or "enable_gqa" in inspect.signature(varlen_attn).parameters
    tokens, heads = (1, group) if one_token else (group, 1)
    segments, longest = len(lengths), int(lengths.max())
    ends_q = torch.arange(0, tokens * segments + 1, tokens, dtype=torch.int32, device=device)
    ends_k = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    options = {"enable_gqa": True} if heads > 1 else {}

    def call(q, k, v):
        rows = q.view(-1, heads, q.shape[-1])
        return varlen_attn(rows, k[:, None], v[:, None], ends_q, ends_k, tokens, longest, **options).view(q.shape)

    return call


# ---------------------------------------------------------------- FlexAttention


def flex_missing(device, wanted):
    if device.type != "cuda":
        return "needs CUDA"
    return None if wanted else "skipped by --no-flex"


def flex_over(lengths, group, device):
    """FlexAttention over heads padded to the longest; it skips blocks after each head's end. k and v: (B, Hkv, n, D).

    Segments are passed as the batch and a group's heads as query rows of one head, so that every group size gets
    FlexDecoding, the kernel that splits the keys. With heads as heads, their different masks would select the prefill
    kernel.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # each case compiles anew; dynamo stops after eight recompilations
    attend, ends, n = torch.compile(flex_attention, dynamic=False), lengths.to(device), int(lengths.max())
    mask = create_block_mask(lambda s, h, i, j: j < ends[s], len(ends), None, group, n, device=device)

    def call(q, k, v):
        rows = q.view(len(ends), 1, group, -1)  # (S, 1, G, D)
        return attend(rows, *(t.flatten(0, 1)[:, None] for t in (k, v)), block_mask=mask).view(q.shape)

    return call


# ---------------------------------------------------------------- FlashInfer


def flashinfer_missing(dtype, device):
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    return missing_16_bit_cuda(dtype, device)


def flashinfer_over(lengths, group, d, dtype, device):
    """FlashInfer with segments as requests of one KV head. k and v: `paged`.

    In a real step its plan would be rebuilt for every layer, with a synchronisation. Here it is built once, untimed.
    """
    import flashinfer

    ends = F.pad((-(-lengths // PAGE)).cumsum(0), (1, 0))
    tables = ends, torch.arange(int(ends[-1])), (lengths - 1) % PAGE + 1  # page offsets, pages, rows in last pages
    workspace = torch.zeros(2**27, dtype=torch.uint8, device=device)
    # tensor cores: usual from 4 query heads per KV head on; the other kernel lacks groups such as 7
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=group >= 4)
    tables = [t.int().to(device) for t in tables]
    wrapper.plan(*tables, group, 1, d, PAGE, q_data_type=dtype, kv_data_type=dtype)
    return lambda q, k, v: wrapper.run(q.view(-1, group, d), (k, v)).view(q.shape)


def paged(padded, lengths, size=PAGE):
    """Copy the first `lengths` rows of each segment, in order, into pages: (B, Hkv, n, D) -> (pages, size, 1, D)."""
    rows = F.pad(padded.flatten(0, 1), (0, 0, 0, -padded.shape[2] % size)).unflatten(1, (-1, size))
    taken = torch.arange(rows.shape[1]) < -(-lengths // size)[:, None]  # (S, pages)
    return rows[taken.to(rows.device)][:, :, None]


def last_slots(lengths):
    """Position of each segment's last row in `paged`: (page (S,), slot (S,), head)."""
    return (-(-lengths // PAGE)).cumsum(0) - 1, (lengths - 1) % PAGE, 0


# ---------------------------------------------------------------- pages in any order, one table per head


def scattered(tensors, lengths, size):
    """The pages of `paged`, in random order, as rows (N, D) of each tensor; a table (S, most pages) int32 of the pages
    of each segment, and the row of each segment's last slot (S,)."""
    device, counts = tensors[0].device, -(-lengths // size)
    order = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(0))
    pools = [paged(t, lengths, size)[order.to(device)].flatten(0, 2) for t in tensors]
    pages = (counts.cumsum(0) - counts)[:, None] + torch.arange(int(counts.max()))  # before they were scattered
    table = order.argsort()[pages.clamp(max=len(order) - 1)]
    last = table[torch.arange(len(lengths)), counts - 1] * size + (lengths - 1) % size
    return pools, table.int().to(device), last.to(device)
