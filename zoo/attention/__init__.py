"""The attention registry: one file a mechanism, all behind one contract."""

from zoo.attention.base import Attention
from zoo.attention.focused_linear import FocusedLinearAttention
from zoo.attention.halo import HaloAttention
from zoo.attention.lambda_layer import LambdaAttention
from zoo.attention.local_relation import LocalRelationAttention
from zoo.attention.moba import MobaAttention
from zoo.attention.mosa import MosaAttention
from zoo.attention.multi_scale_window import MultiScaleWindowAttention
from zoo.attention.registry import (
    AttentionSpec,
    attention_spec,
    create_attention,
    list_attentions,
    register_attention,
    with_defaults,
)
from zoo.attention.relational import RelationalAttention
from zoo.attention.routing import RoutingAttention
from zoo.attention.single_head import SingleHeadAttention
from zoo.attention.softmax import SoftmaxAttention
from zoo.attention.sparse import SparseFixedAttention, SparseStridedAttention
from zoo.attention.threshold_relative import ThresholdRelativeAttention
from zoo.attention.uniform import UniformAttention
from zoo.attention.window import CrossWindowAttention, ShiftedWindowAttention, WindowAttention

__all__ = [
    "Attention",
    "AttentionSpec",
    "CrossWindowAttention",
    "FocusedLinearAttention",
    "HaloAttention",
    "LambdaAttention",
    "LocalRelationAttention",
    "MobaAttention",
    "MosaAttention",
    "MultiScaleWindowAttention",
    "RelationalAttention",
    "RoutingAttention",
    "ShiftedWindowAttention",
    "SingleHeadAttention",
    "SoftmaxAttention",
    "SparseFixedAttention",
    "SparseStridedAttention",
    "ThresholdRelativeAttention",
    "UniformAttention",
    "WindowAttention",
    "attention_spec",
    "create_attention",
    "list_attentions",
    "register_attention",
    "with_defaults",
]
