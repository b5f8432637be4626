"""MACMD: dilated context gates, agreement of the scales and channel mixing across them.

Multi-dilated contextual Attention and Channel Mixer Decoding, Maurya et al., BMVC 2025
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UsageError
from zoo.features import ceil, resize
from zoo.heads.segmentation.base import Foreign, SegmentationHead
from zoo.heads.segmentation.layers import check_share, check_width
from zoo.heads.segmentation.macmd_layers import ContextBlock, ContextGate, Fusion, UpBlock
from zoo.heads.segmentation.macmd_mixing import Agreement, CrossScaleMixer

# Width of the finest map of the decoder.
_LAST = 32


class MACMD(SegmentationHead):
    """MACMD's decoder over four maps of any channels and sizes.

    The published program has quirks that its weights were trained with. They are options here; a file of the authors'
    (`weights` of `create_segmenter`) sets `rectified_gate`, and the others are off unless asked for.

    Args:
        channels: of the four maps; those that are no multiple of 4 get a 1x1 convolution to the next one.
        num_classes: of the logits.
        deep_supervision: in training, logits of the maps of an eighth and a quarter of the size too.
        drop_path: how often the channel mixing of an image is left out in training.
        grey_stem: images of one channel become three by a learned 1x1 convolution, BatchNorm and ReLU, as published;
            otherwise the encoder itself takes one channel.
        rectified_gate: gates weigh features after their ReLU, not before it: the published ReLU works in place.
        fresh_up_conv: the convolutions that bring coarse maps up to the finest are made anew, with random weights and
            the statistics of the batch, every time, and never trained: the published answers differ from call to call.
        token_side: side of the grid on which channels are mixed, whatever the images' size: published is a quarter of
            the image size that the network was built for, and no other size works. None is the finest map's own grid.
        sigmoid_outputs: answer sigmoids of the logits, to which the published losses apply softmax or sigmoid again.

    Raises:
        UsageError: there are not four maps, or an option is out of its range.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        deep_supervision: bool = True,
        drop_path: float = 0.05,
        grey_stem: bool = True,
        rectified_gate: bool = False,
        fresh_up_conv: bool = False,
        token_side: int | None = None,
        sigmoid_outputs: bool = False,
    ):
        super().__init__()
        if len(channels) != 4:
            raise UsageError(f"macmd takes maps of four levels, not of {len(channels)}: give levels=[4, 8, 16, 32]")
        check_share("drop_path", drop_path)
        if token_side is not None:
            check_width("token_side", token_side)
        self.deep_supervision, self.sigmoid_outputs = deep_supervision, sigmoid_outputs
        widths = [-(-width // 4) * 4 for width in channels]
        # The quarters of its convolutions ask for multiples of 4.
        self.fit = nn.ModuleList(
            nn.Identity() if width == given else nn.Conv2d(given, width, 1)
            for given, width in zip(channels, widths, strict=True)
        )
        c1, c2, c3, c4 = widths
        self.gates = nn.ModuleList(ContextGate(width, rectified_gate) for width in widths)
        self.bottleneck = ContextBlock(c4)
        self.agreement = Agreement(widths, c1, fresh_up_conv)
        self.mixer = CrossScaleMixer((c3, c2, c1), c1, drop_path, token_side)
        self.up = nn.ModuleList([UpBlock(c4, c3), UpBlock(2 * c3, c2), UpBlock(2 * c2, c1), UpBlock(2 * c1, _LAST)])
        self.fusion = Fusion(3 * c1, 2 * c1)
        supervised = (_LAST, c1, c2) if deep_supervision else (_LAST,)
        self.classifiers = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in supervised)

    def decode(self, features: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """The maps that classifiers look at, (B, C, h, w) at a half, a quarter and an eighth of `size`."""
        raw = [fit(map_) for fit, map_ in zip(self.fit, features, strict=True)]
        gated = [gate(map_) for gate, map_ in zip(self.gates, raw, strict=True)]
        deepest = self.bottleneck(gated[3])
        agreed = self.agreement([*gated[:3], deepest])
        m3, m2, m1 = self.mixer((raw[2], raw[1], raw[0]))
        d3 = self.up[0](deepest, m3.shape[2:])
        d2 = self.up[1](torch.cat([d3, m3], 1), m2.shape[2:])
        d1 = self.up[2](torch.cat([d2, m2], 1), m1.shape[2:])
        half = (ceil(size[0], 2), ceil(size[1], 2))
        return [self.up[3](self.fusion(d1, m1, agreed), half), d1, d2]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor | list[Tensor]:
        """See `SegmentationHead.forward`."""
        maps = self.decode(features, size)
        count = len(self.classifiers) if self.training else 1
        answers = [
            resize(classifier(map_), size) for classifier, map_ in zip(self.classifiers[:count], maps, strict=False)
        ]
        if self.sigmoid_outputs:
            answers = [answer.sigmoid() for answer in answers]
        return answers if self.training and self.deep_supervision else answers[0]

    @classmethod
    def stem(cls, in_chans: int, **options: Any) -> nn.Module | None:
        """See `SegmentationHead.stem`."""
        if in_chans != 1 or not options.get("grey_stem", True):
            return None
        return nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True))

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> Foreign | None:
        """See `SegmentationHead.read`: PVT_B*_MACMD as released."""
        if "decoder.apm.modulation_proj.0.weight" not in state:
            return None
        encoder = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
        rest = {}
        for key, value in state.items():
            # `ln1` of its decoder's blocks is never used.
            if key.startswith("backbone.") or re.match(r"decoder\.decoder\d\.ln1\.", key):
                continue
            rest[_renamed(key)] = value.flatten() if ".spatial_mix_" in key else value
        return Foreign(encoder, rest, {"rectified_gate": True}, absent=("head.agreement.climb.",))


_Text = str | Callable[[re.Match[str]], str]


def _shifted(pattern: str) -> Callable[[re.Match[str]], str]:
    """Replacement with the first number less one, as ours count from 0."""
    return lambda match: pattern.format(int(match[1]) - 1, *match.groups()[1:])


_RULES: Sequence[tuple[str, _Text]] = (
    (r"^conv\.", "stem."),
    (r"\.dilation_(\d)\.", _shifted(".branches.{}.")),
    (r"^decoder\.ag(\d)\.", _shifted("head.gates.{}.")),
    (r"\.W_g\.", ".context."),
    (r"\.psi\.", ".gate."),
    (r"^decoder\.acb\.conv\.conv\.", "head.bottleneck.context."),
    (r"^decoder\.acb\.", "head.bottleneck."),
    (r"^decoder\.apm\.", "head.agreement."),
    (r"\.channel_proj\.", ".project."),
    (r"\.attention_proj\.", ".score."),
    (r"\.modulation_proj\.", ".modulate."),
    (r"\.up_blocks\.(\d)\.block\.0\.", _shifted(".climb.{}.local.")),
    (r"\.up_blocks\.(\d)\.block\.1\.", _shifted(".climb.{}.norm.")),
    (r"\.up_blocks\.(\d)\.block\.3\.", _shifted(".climb.{}.project.")),
    (r"^decoder\.ccm\.", "head.mixer."),
    (r"\.projections\.", ".project."),
    (r"\.final_projections\.", ".restore."),
    (r"^head\.mixer\.ln1\.", "head.mixer.norm."),
    (r"^head\.mixer\.channel\.", "head.mixer.mixer."),
    (r"\.spatial_mix_k$", ".mix_key"),
    (r"\.spatial_mix_r$", ".mix_receptance"),
    (r"^decoder\.decoder(\d)\.", _shifted("head.up.{}.")),
    (r"\.conv_local\.conv\.", ".local.0."),
    (r"\.conv_local\.norm\.", ".local.1."),
    (r"\.proj\.conv\.", ".project.0."),
    (r"\.proj\.norm\.", ".project.1."),
    (r"^(head\.up\.\d)\.conv\.conv\.", r"\1.expand.0."),
    (r"^(head\.up\.\d)\.conv\.norm\.", r"\1.expand.1."),
    (r"^decoder\.ffb\.fusion_conv\.", "head.fusion.fuse."),
    (r"^decoder\.ffb\.bn\.", "head.fusion.norm."),
    (r"^decoder\.ffb\.output_conv\.", "head.fusion.output."),
    (r"^decoder\.ffb\.", "head.fusion."),
    (r"\.(?:ca|channel_attention)\.", ".channel_gate."),
    (r"\.(?:sa|spatial_attention)\.", ".spatial_gate."),
    (r"^out_head\.", "head.classifiers.0."),
    (r"^out_head3\.", "head.classifiers.1."),
    (r"^out_head2\.", "head.classifiers.2."),
)


def _renamed(key: str) -> str:
    """Our name for an entry of the authors'."""
    for pattern, text in _RULES:
        key = re.sub(pattern, text, key)
    return key
