"""Dual attention: some heads move values about, the others relations between query and key, and symbols of the keys.

Source: Altabaa, Lafferty, "Disentangling and Integrating Relational and Sensory Information in Transformer
Architectures", arXiv 2405.16727, sections 2 and 3. The authors' relative symbols are offsets on a line; here they are
the sum of one for the offset of rows and one for that of columns.

What a relational head gathers, sum_j w_ij r_ij with r_ij = q'_i k'_j, is q'_i (sum_j w_ij k'_j), and a sum of relative
symbols needs of the weights only their sums over rows and columns. So no map of all pairs is formed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention._heads import join_heads, masked_softmax, product, split_heads
from zoo.attention._pairs import places
from zoo.attention.base import Attention, Grid, check_heads, logit_bias, zero_without_keys
from zoo.attention.registry import register_attention
from zoo.errors import UsageError
from zoo.kernels.precision import without_autocast
from zoo.layers.sdpa import dot_product_attention


class RelativeSymbols(nn.Module):
    """One vector for each offset of rows up to `reach`, one for each of columns, and one for pairs with a prefix."""

    def __init__(self, dim: int, reach: int, prefixed: bool):
        super().__init__()
        self.reach = reach
        self.rows = nn.Parameter(torch.randn(2 * reach + 1, dim))
        self.columns = nn.Parameter(torch.randn(2 * reach + 1, dim))
        self.prefix = nn.Parameter(torch.randn(1, dim)) if prefixed else None

    def table(self, table: Tensor, side: int) -> Tensor:
        """(side, side, dim): the symbol of key m for query n; offsets beyond the reach count as the reach."""
        place = torch.arange(side, device=table.device)
        index = (place[None, :] - place[:, None]).clamp(-self.reach, self.reach) + self.reach
        # The gradient of a symbol sums over all pairs that share it, one after the other in the dtype of the table:
        # in bfloat16 such a sum stops growing at some hundred terms.
        return table.to(torch.promote_types(table.dtype, torch.float32))[index].to(table.dtype)


class SymbolLibrary(nn.Module):
    """Symbols that tokens retrieve by attention from a learned library (the paper's symbolic attention)."""

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.q = nn.Linear(dim, dim, bias=False)
        self.templates = nn.Parameter(torch.randn(size, dim))
        self.values = nn.Parameter(torch.randn(size, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, tokens, dim) -> symbols of the same shape."""
        logits = self.q(x) @ self.templates.to(x.dtype).T * x.shape[-1] ** -0.5
        return logits.softmax(dim=-1).to(x.dtype) @ self.values.to(x.dtype)


@register_attention(
    "relational",
    paper="Disentangling and Integrating Relational and Sensory Information in Transformer Architectures, "
    "arXiv 2405.16727",
    supports=("key_mask", "bias", "prefix"),
    prefix="mix",
    # 8 heads, 4 of them relational, on a square grid: projections, weights, what each kind of head gathers; symbols.
    cost="4*N*C**2 + N**2*C + N**2*C/2 + N**2*(2*C + 8*N**0.5 + 4) + N*C*(2 + N**0.5) + 33*C**2",
)
class RelationalAttention(Attention):
    """Softmax attention in some heads; in the others o_i = sum_j w_ij (W_r r_ij + W_s s_ij), then two projections.

    r_ij are the n products q'_i k'_j / sqrt(d') of further projections, one for each relation, s_ij the symbol of key j
    for query i. Ordinary and relational heads have a projection each, whose answers lie side by side.

    Args:
        dim: channels of x.
        num_heads: heads of both kinds; divides `dim_out`.
        dim_out: channels of the answer; `dim` unless given.
        relational_heads: how many of the heads are relational; half of them, at least 1, unless given.
        num_relations: relations n; as many as relational heads unless given. They share these heads' channels.
        symmetric: whether q' and k' are one projection.
        max_offset: symbols are offsets on the grid; those beyond this many rows or columns count as this many.
        library_size: instead of offsets, so many symbols from which the content of a key retrieves its own.
        qkv_bias: biases in the projections to q, k and v; the relations have none.
        attn_drop, proj_drop: dropout of the weights and of the answer.
        proj: whether the projections follow.
        grid_size, num_prefix_tokens: as `create_attention` takes them. All pairs with a prefix token have one symbol.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        dim_out: int | None = None,
        relational_heads: int | None = None,
        num_relations: int | None = None,
        symmetric: bool = False,
        max_offset: int = 16,
        library_size: int | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj: bool = True,
        grid_size: Grid = (14, 14),
        num_prefix_tokens: int = 0,
    ):
        super().__init__(dim, dim_out, grid_size, num_prefix_tokens)
        self.num_heads = num_heads
        self.head_dim = check_heads("relational", self.dim_out, num_heads)
        self.scale = self.head_dim**-0.5
        related = max(1, num_heads // 2) if relational_heads is None else relational_heads
        self.relational_heads, self.plain_heads = related, num_heads - related
        self.num_relations = max(1, related) if num_relations is None else num_relations
        if not 0 <= related <= num_heads or self.num_relations < 1 or max_offset < 1:
            raise UsageError(
                f"attention 'relational': relational_heads={relational_heads}, num_relations={num_relations}, "
                f"max_offset={max_offset}; 0 to {num_heads} relational heads, the others at least 1"
            )
        width = related * self.head_dim
        if width % self.num_relations:
            raise UsageError(
                f"attention 'relational': num_relations={num_relations} does not divide the {width} channels of the "
                f"relational heads; valid: {[n for n in range(1, width + 1) if width % n == 0 and n <= 64]}"
            )
        if library_size is not None and library_size < 1:
            raise UsageError(f"attention 'relational': library_size={library_size}; valid: None, or at least 1")
        self.relation_dim = width // self.num_relations
        self.qk = nn.Linear(dim, 2 * self.dim_out, bias=qkv_bias)
        plain = self.plain_heads * self.head_dim
        self.v = nn.Linear(dim, plain, bias=qkv_bias) if plain else None
        self.relate = nn.Linear(dim, width * (1 if symmetric else 2), bias=False) if related else None
        self.relation_weight = (
            nn.Parameter(torch.empty(related, self.head_dim, self.num_relations)) if related else None
        )
        if self.relation_weight is not None:
            nn.init.kaiming_uniform_(self.relation_weight, a=5**0.5)
        self.symbol_proj = nn.Linear(dim, width, bias=False) if related else None
        prefixed = num_prefix_tokens > 0
        self.offsets = RelativeSymbols(dim, max_offset, prefixed) if related and library_size is None else None
        self.library = SymbolLibrary(dim, library_size) if related and library_size is not None else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(plain, plain) if proj and plain else nn.Identity()
        self.relational_proj = nn.Linear(width, width) if proj and related else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x (B, P + H*W, dim) -> (B, P + H*W, dim_out); see `Attention` for the rest.

        The heads of a bias are the ordinary ones, then the relational ones.
        """
        plain = self.plain_heads
        q, k = split_heads(self.qk(x), 2 * self.num_heads).chunk(2, dim=1)
        added = logit_bias(key_mask, bias, q.dtype)
        first, second = added, added
        if added is not None and added.shape[1] > 1:
            first, second = added[:, :plain], added[:, plain:]
        parts: list[Tensor] = []
        if self.v is not None:
            out = self.attend(q[:, :plain], k[:, :plain], split_heads(self.v(x), plain), first)
            parts.append(self.proj(join_heads(zero_without_keys(out, key_mask))))
        if self.relate is not None:
            grid = self.token_grid(x, grid)
            out = self.gather(x, q[:, plain:], k[:, plain:], grid, second)
            parts.append(self.relational_proj(join_heads(zero_without_keys(out, key_mask))))
        return self.proj_drop(torch.cat(parts, dim=-1))

    def head_layers(self) -> list[tuple[nn.Module, int]]:
        both = ((self.proj, self.plain_heads), (self.relational_proj, self.relational_heads))
        return [(layer, heads) for layer, heads in both if heads]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
        drop = self.attn_drop.p if self.training else 0.0
        return dot_product_attention(q, k, v, attn_mask=added, dropout_p=drop)

    def gather(self, x: Tensor, q: Tensor, k: Tensor, grid: tuple[int, int], added: Tensor | None) -> Tensor:
        """Answers (B, relational heads, tokens, head_dim) before their projection."""
        heads, width = q.shape[1], self.relational_heads * self.head_dim
        related = self.relate(x)
        left, right = related[..., :width], related[..., -width:]
        carried = [right[:, None].expand(-1, heads, -1, -1)]
        if self.library is not None:
            carried.append(split_heads(self.symbol_proj(self.library(x)), heads))
        else:
            carried.append(self.marks(grid, right.dtype, x.device).expand(x.shape[0], heads, -1, -1))
        got = self.attend(q, k, torch.cat(carried, dim=-1), added)
        relations = self.relations(left, got[..., :width])
        out = product(relations, self.relation_weight.to(relations.dtype).transpose(-2, -1)).to(got.dtype)
        symbols = got[..., width:]
        return out + (symbols if self.library is not None else self.spell(symbols, grid))

    def relations(self, left: Tensor, right: Tensor) -> Tensor:
        """Gathered relations (B, heads, tokens, n): left (B, tokens, C'), right (B, heads, tokens, C'); float32."""
        shape = (self.num_relations, self.relation_dim)
        wide = torch.promote_types(left.dtype, torch.float32)
        pairs = left.to(wide)[:, None].unflatten(-1, shape) * right.to(wide).unflatten(-1, shape)
        return pairs.sum(dim=-1) * self.relation_dim**-0.5

    def marks(self, grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """(P + H*W, 1 + H + W): whether a key is a prefix token, which row and which column it is in."""
        y, x = places(grid, device)
        rows = y[:, None] == torch.arange(grid[0], device=device)[None, :]
        columns = x[:, None] == torch.arange(grid[1], device=device)[None, :]
        cells = F.pad(torch.cat([rows, columns], dim=1).to(dtype), (1, 0, self.num_prefix_tokens, 0))
        first = torch.arange(cells.shape[0], device=device)[:, None] < self.num_prefix_tokens
        return torch.cat([first.to(dtype), cells[:, 1:]], dim=1)

    def spell(self, marks: Tensor, grid: tuple[int, int]) -> Tensor:
        """Weighted symbols (B, heads, tokens, head_dim) from the weights of prefix, rows and columns."""
        prefix, (height, width) = self.num_prefix_tokens, grid
        heads, dim = self.relational_heads, self.head_dim
        rows = self.offsets.table(self.symbol_proj(self.offsets.rows), height).unflatten(-1, (heads, dim))
        columns = self.offsets.table(self.symbol_proj(self.offsets.columns), width).unflatten(-1, (heads, dim))
        cells = marks[:, :, prefix:].unflatten(2, (height, width))
        out = torch.einsum("bhyxk,ykhd->bhyxd", cells[..., 1 : 1 + height], rows)
        out = out + torch.einsum("bhyxk,xkhd->bhyxd", cells[..., 1 + height :], columns)
        out = out.flatten(2, 3)
        alone = self.offsets.prefix
        if alone is not None:
            alone = self.symbol_proj(alone).unflatten(-1, (heads, dim)).transpose(0, 1)
            out = out + marks[:, :, prefix:, :1] * alone
            share = marks[:, :, :prefix, : 1 + height].sum(dim=-1, keepdim=True)
            out = torch.cat([share * alone, out], dim=2)
        return out

    def attention_map(
        self, x: Tensor, grid: Grid | None = None, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """float32 weights (B, heads, queries, keys), the ordinary heads first."""
        q, k = split_heads(self.qk(x), 2 * self.num_heads).chunk(2, dim=1)
        with without_autocast(x):
            logits = (q.float() * self.scale) @ k.float().transpose(-2, -1)
        return masked_softmax(logits, key_mask, bias)
