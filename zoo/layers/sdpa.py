"""torch's fused attention, without cuDNN's where its gradients cannot be relied on or a mask makes it slow."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_OTHERS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


@register_notrace_function  # it looks at the device
def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """`scaled_dot_product_attention`; where a GPU takes gradients or adds a mask, by any backend but cuDNN's.

    cuDNN's is the first choice of torch 2.11 on Hopper. With a mask and 64, 192, ... keys its gradient of q is NaN as
    soon as a row's logits are all small (pytorch issue 196678): networks of 8 x 8 tokens ran into that after a hundred
    steps. Without a mask stripes of 16 tokens ended in an illegal memory access. Answers without gradients are right;
    with a mask, in windows of 49 tokens, they take three times as long as from the next backend.
    A backend that is switched off stays off, but in torch.compile. As with every choice of torch's backends, threads
    share it: one that computes at the same time may still get cuDNN's.

    Args:
        q, k, v: (B, heads, queries or keys, head_dim).
        attn_mask: added to the logits, broadcastable to (B, heads, queries, keys).
        dropout_p: dropout of the weights.
        scale: of the logits, 1 / sqrt(head_dim) unless given.
    """
    if not torch.jit.is_scripting() and q.is_cuda and (attn_mask is not None or torch.is_grad_enabled()):
        return _without_cudnn(q, k, v, attn_mask, dropout_p, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)


def _without_cudnn(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, scale: float | None
) -> Tensor:
    # What asks for the flags is no part of a compiled graph.
    chosen = list(_OTHERS) if torch.compiler.is_compiling() else [one for one, on in _OTHERS.items() if on()]
    with sdpa_kernel(chosen or [SDPBackend.CUDNN_ATTENTION]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
