"""The attention registry: one file a mechanism, all behind one contract."""

from zoo.attention.base import Attention
from zoo.attention.efficient import EfficientAttention
from zoo.attention.fewer_projections import EfficientParamsAttention, OptimisedAttention, SuperAttention
from zoo.attention.focused_linear import FocusedLinearAttention
from zoo.attention.grouped_query import GroupedQueryAttention
from zoo.attention.halo import HaloAttention
from zoo.attention.head_embedding import HeadEmbeddingAttention
from zoo.attention.hedgehog import HedgehogAttention
from zoo.attention.inverse_distance import InverseDistanceAttention
from zoo.attention.lambda_layer import LambdaAttention
from zoo.attention.local_relation import LocalRelationAttention
from zoo.attention.moba import MobaAttention
from zoo.attention.mosa import MosaAttention
from zoo.attention.multi_scale_window import MultiScaleWindowAttention
from zoo.attention.multi_token import MultiTokenAttention
from zoo.attention.neural import NeuralAttention
from zoo.attention.normalized import NormalizedAttention
from zoo.attention.persistent_memory import PersistentMemoryAttention
from zoo.attention.registry import (
    AttentionSpec,
    attention_spec,
    create_attention,
    list_attentions,
    register_attention,
    with_defaults,
)
from zoo.attention.rela import GatedRectifiedAttention, RectifiedAttention
from zoo.attention.relational import RelationalAttention
from zoo.attention.routing import RoutingAttention
from zoo.attention.selective import SelectiveAttention
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
    "EfficientAttention",
    "EfficientParamsAttention",
    "FocusedLinearAttention",
    "GatedRectifiedAttention",
    "GroupedQueryAttention",
    "HaloAttention",
    "HeadEmbeddingAttention",
    "HedgehogAttention",
    "InverseDistanceAttention",
    "LambdaAttention",
    "LocalRelationAttention",
    "MobaAttention",
    "MosaAttention",
    "MultiScaleWindowAttention",
    "MultiTokenAttention",
    "NeuralAttention",
    "NormalizedAttention",
    "OptimisedAttention",
    "PersistentMemoryAttention",
    "RectifiedAttention",
    "RelationalAttention",
    "RoutingAttention",
    "SelectiveAttention",
    "ShiftedWindowAttention",
    "SingleHeadAttention",
    "SoftmaxAttention",
    "SparseFixedAttention",
    "SparseStridedAttention",
    "SuperAttention",
    "ThresholdRelativeAttention",
    "UniformAttention",
    "WindowAttention",
    "attention_spec",
    "create_attention",
    "list_attentions",
    "register_attention",
    "with_defaults",
]
