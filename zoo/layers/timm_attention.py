"""timm's HaloAttn, LambdaLayer and BottleneckAttn with the same parameters and a faster forward.

Instances are made from timm's own (`adopt`): the module object, its parameters, buffers, hooks and children stay, its
class changes, as torch.nn.utils.parametrize and lazy modules do it. What timm can build from the outside, such as
`reset_parameters` and `init_non_persistent_buffers`, is inherited.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from torch import Tensor, nn

from zoo import kernels
from zoo.layers.position import TableResize
from zoo.layers.sdpa import dot_product_attention

# The functions below are leaves for symbolic tracing (torch.fx.wrap), which could not follow their use of sizes, while
# the projections around them remain nodes of their own for timm's feature extraction.


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C): a view, dense where the map is channels-last."""
    return x.permute(0, 2, 3, 1)


def _map(x: Tensor) -> Tensor:
    """(B, H, W, heads, d) -> (B, heads * d, H, W), channels-last: no copy where x is dense."""
    return x.flatten(3).permute(0, 3, 1, 2)


def _round_up(pool: nn.Module) -> None:
    """Lets timm's 2x2 pooling keep the last row and column of odd maps, as the shortcut beside the layer does."""
    if type(pool) is nn.AvgPool2d:
        pool.ceil_mode, pool.count_include_pad = True, False


@torch.fx.wrap
def _halo(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    num_heads: int,
    dims: tuple[int, int],
    block: int,
    halo: int,
    scale: float,
    stride: int,
    scale_rel: bool,
) -> Tensor:
    queries = _pixels(q).unflatten(-1, (num_heads, dims[0]))
    keys, values = _pixels(kv).unflatten(-1, (num_heads, dims[0] + dims[1])).split(dims, dim=-1)
    out = kernels.halo_attention(
        queries, keys, values, height_rel, width_rel, block, halo, scale, stride=stride, scale_rel=scale_rel, mask=False
    )
    return _map(out)


class FastHaloAttn(HaloAttn):
    """timm's HaloAttn on zoo.kernels.halo_attention, for maps of any size.

    A border of zeros, halo wide, takes part in the attention as in timm; what pads a map to whole blocks does not.
    """

    @classmethod
    def adopt(cls, layer: Any) -> None:
        """Turns a HaloAttn into this class, in place."""
        layer.__class__ = cls
        _round_up(layer.pool)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim_out, H', W'), H' = ceil(H / stride); channels-last strides."""
        out = _halo(
            self.q(x),
            self.kv(x),
            self.pos_embed.height_rel,
            self.pos_embed.width_rel,
            self.num_heads,
            (self.dim_head_qk, self.dim_head_v),
            self.block_size,
            self.halo_size,
            self.scale,
            self.block_stride,
            self.scale_pos_embed,
        )
        return self.pool(out)


@torch.fx.wrap
def _lambda_local(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    table = weight[:, 0, :, :, 0].permute(1, 2, 0).unsqueeze(-1)
    return _lambda(q, k, v, table, bias, num_heads)


@torch.fx.wrap
def _lambda_global(q: Tensor, k: Tensor, v: Tensor, table: Tensor, resize: TableResize, num_heads: int) -> Tensor:
    rows, columns = 2 * q.shape[2] - 1, 2 * q.shape[3] - 1
    table = resize(table.flatten(0, 1).unsqueeze(0), (rows, columns)).reshape(rows, columns, -1, 1)
    return _lambda(q, k, v, table, None, num_heads)


def _lambda(q: Tensor, k: Tensor, v: Tensor, table: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    queries = _pixels(q).unflatten(-1, (num_heads, -1))
    values = _pixels(v)
    position = kernels.lambda_attention(queries, values.unsqueeze(3), table)
    # Over positions, in float32 at least; in the order in which the map lies, so that its gradient does too.
    keys = _pixels(k).flatten(1, 2).softmax(dim=1, dtype=torch.promote_types(k.dtype, torch.float32)).to(v.dtype)
    content = keys.transpose(1, 2) @ values.flatten(1, 2)
    if bias is not None:
        content = content + bias.to(content.dtype)[:, None]  # the convolution adds it to every position lambda
    out = torch.baddbmm(position.flatten(1, 3), queries.flatten(1, 3), content)
    return _map(out.unflatten(1, position.shape[1:4]))


class FastLambdaLayer(LambdaLayer):
    """timm's LambdaLayer on zoo.kernels.lambda_attention; no position lambdas (key x value) are stored per pixel.

    The variant with relative positions takes maps of any size: its table is resized as tables of positions are. The
    buffer of indices, 2 * (H * W)^2 integers that are not part of the state, is dropped.
    """

    @classmethod
    def adopt(cls, layer: Any) -> None:
        """Turns a LambdaLayer into this class, in place."""
        layer.__class__ = cls
        _round_up(layer.pool)
        if layer.pos_emb is not None:
            layer.resize = TableResize(layer.pos_emb.shape[:2]).train(layer.training)
            if "rel_pos_indices" in layer._non_persistent_buffers_set:
                layer.rel_pos_indices = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # torch refuses to make the weight of conv_lambda, which has five dimensions, channels-last: it is shown four.
        def shown(tensor: Tensor) -> Tensor:
            return fn(tensor[..., 0]).unsqueeze(-1) if tensor.ndim == 5 else fn(tensor)

        return super()._apply(shown, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim_out, H', W'), H' = ceil(H / stride); channels-last strides."""
        q, k, v = self.qkv(x).split((self.num_heads * self.dim_qk, self.dim_qk, self.dim_v), dim=1)
        # Of a part of a map's channels, batch norm backward takes ten times a copy and cuDNN's batch norm together.
        q = self.norm_q(q.contiguous(memory_format=torch.channels_last))
        v = self.norm_v(v.contiguous(memory_format=torch.channels_last))
        if self.pos_emb is None:
            out = _lambda_local(q, k, v, self.conv_lambda.weight, self.conv_lambda.bias, self.num_heads)
        else:
            out = _lambda_global(q, k, v, self.pos_emb, self.resize, self.num_heads)
        return self.pool(out)


@torch.fx.wrap
def _bottleneck(
    qkv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    resize_height: TableResize,
    resize_width: TableResize,
    num_heads: int,
    dims: tuple[int, int],
    scale: float,
    scale_rel: bool,
) -> Tensor:
    """Attention with the logits scale * q.k + q.height_rel[u - i + H - 1] + q.width_rel[v - j + W - 1].

    The relative terms are products too, of q with the rows of the tables and a one-hot vector of the key's row or
    column. Appended to the channels of q and k they reach every fused attention kernel, which then stores neither the
    logits nor a bias of their size, forward or backward.
    """
    batch, _, height, width = qkv.shape
    sizes = (num_heads * dims[0], num_heads * dims[0], num_heads * dims[1])
    q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in _pixels(qkv).split(sizes, dim=-1))
    factor = 1.0 if scale_rel else 1.0 / scale
    rows = _by_offset(resize_height, height_rel, height) * factor
    columns = _by_offset(resize_width, width_rel, width) * factor
    rows = torch.einsum("byxhd,yjd->bhyxj", q, rows)
    columns = torch.einsum("byxhd,xjd->bhyxj", q, columns)
    spare = q.new_zeros(()).expand(batch, num_heads, height, width, -(dims[0] + height + width) % 8)
    q = torch.cat((q.permute(0, 3, 1, 2, 4), rows, columns, spare), dim=-1).flatten(2, 3)
    hot = torch.cat((_one_hot(height, k)[:, None].expand(-1, width, -1), _one_hot(width, k).expand(height, -1, -1)), -1)
    hot = F.pad(hot, (0, spare.shape[-1])).expand(batch, num_heads, -1, -1, -1)
    k = torch.cat((k.permute(0, 3, 1, 2, 4), hot), dim=-1).flatten(2, 3)
    out = dot_product_attention(q, k, v.flatten(1, 2).transpose(1, 2), scale=scale)
    return _map(out.transpose(1, 2).unflatten(1, (height, width)))


def _by_offset(resize: TableResize, table: Tensor, size: int) -> Tensor:
    """(2*n - 1, d), by offset -> (size, size, d), by query and key; the table is resized where n is not size."""
    table = resize(table[None], (1, 2 * size - 1))[0]
    place = torch.arange(size, device=table.device)
    return table[place - place[:, None] + (size - 1)]


def _one_hot(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


class FastBottleneckAttn(BottleneckAttn):
    """timm's BottleneckAttn on torch's scaled_dot_product_attention, for maps of any size.

    The tables of relative positions belong to one size of the map; at others they are resized, as tables of positions
    are.
    """

    @classmethod
    def adopt(cls, layer: Any) -> None:
        """Turns a BottleneckAttn into this class, in place."""
        layer.__class__ = cls
        _round_up(layer.pool)
        layer.resize_height = TableResize((1, layer.pos_embed.height_rel.shape[0])).train(layer.training)
        layer.resize_width = TableResize((1, layer.pos_embed.width_rel.shape[0])).train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, H, W) -> (B, dim_out, H', W'), H' = ceil(H / stride); channels-last strides."""
        out = _bottleneck(
            self.qkv(x),
            self.pos_embed.height_rel,
            self.pos_embed.width_rel,
            self.resize_height,
            self.resize_width,
            self.num_heads,
            (self.dim_head_qk, self.dim_head_v),
            self.scale,
            self.scale_pos_embed,
        )
        return self.pool(out)
