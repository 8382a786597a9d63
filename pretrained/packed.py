"""Linear layers whose weights lie in the order in which oneDNN reads them: decoding on a CPU."""

import functools
import time

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import widen


def linear_weight(module):
    """W (out, in) of a linear layer, also the transposed one of transformers' GPT-2; else None."""
    if type(module).__name__ == "Conv1D":
        return module.weight.T
    return module.weight if type(module) is nn.Linear else None


class PackedLinear(nn.Module):
    """A linear layer for decoding on a CPU, its W in the order in which oneDNN reads it.

    oneDNN or MKL would bring W into such an order in every pass, and with few rows this takes
    longer than their product. It gives the same numbers to rounding, has no gradient, and keeps W
    only where it is asked to.
    """

    def __init__(self, W, bias=None, keep=None):
        super().__init__()
        # for passes of about 8 rows
        packed = torch.ops.mkldnn._reorder_linear_weight(W.detach().contiguous(), 8)
        if keep is not None:
            self.weight, self.packed = keep, packed
        else:
            self.packed = nn.Parameter(packed, requires_grad=False)  # so that it counts as W did
        self.bias = bias

    def forward(self, x):
        return self.times(x, self.bias)

    def times(self, x, bias=None):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def __reduce__(self):  # torch cannot copy packed weights
        return PackedLinear, (self.packed.to_dense(), self.bias, getattr(self, "weight", None))


def packed_logits(rows, h, unembed):
    """`CPHead.logits` by a PackedLinear, of whose bias the head knows nothing."""
    return widen(rows.times(h.contiguous()))


def can_pack(dtype):
    """Whether oneDNN has products in this type for this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@functools.cache
def bfloat16_is_faster(device):
    """Whether products in bfloat16 are faster: on GPUs that have it, and by a trial on a CPU."""
    if device.type == "mps":
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, W = torch.ones(128, 512, dtype=dtype), torch.ones(2048, 512, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            F.linear(x, W)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
