"""Weights as 16-bit numbers: half the file, and what that costs, measured.

Only the stored weights change. Every runtime widens them when it opens the file and computes in float32 as before, so
there is no overflow inside the network, no slow path on processors without 16-bit arithmetic, and no calibration that
could go wrong; there is no gain in speed either.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from zoo.errors import UsageError
from zoo.export.check import ExportError, check_images, open_session, outputs_of

# Below this a tensor weighs nothing in the file, and constants of the arithmetic stay exact.
SMALLEST = 1024
IMAGES = 32


@dataclass(frozen=True)
class Loss:
    """What a smaller file costs, against torch in float32.

    Attributes:
        images: how many were compared.
        source: "validation images", or "test patterns" where the run's own images cannot be read.
        map: largest difference of a map, as a part of the largest map value of its image.
        score: largest difference of a score, as a part of the threshold.
        changed: images whose label good or defect became the other one.
    """

    images: int
    source: str
    map: float
    score: float
    changed: int

    def __str__(self) -> str:
        return (
            f"16-bit weights, over {self.images} {self.source}: maps differ by up to {self.map:.1e} of their largest "
            f"value, scores by {self.score:.1e} of the threshold; {self.changed} labels changed"
        )

    def as_json(self) -> str:
        """For the metadata."""
        return json.dumps(asdict(self))


def halve(model: Any) -> None:
    """Stores the large float32 weights of an ONNX model as float16, in place, each with a cast back to float32.

    Raises:
        ExportError: a weight is beyond the range of float16.
    """
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for stored in model.graph.initializer:
        if stored.data_type != TensorProto.FLOAT or np.prod(stored.dims) < SMALLEST:
            continue
        values = numpy_helper.to_array(stored)
        name = stored.name
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ExportError(
                f"the weight {name} holds {np.abs(values).max():.3g}, which 16 bits cannot: export without"
            )
        stored.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT, name=f"{name}.widen"))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def measure(content: bytes, network: nn.Module, data: Mapping[str, Any], shape: tuple[int, ...], limit: float) -> Loss:
    """Compares a serialised graph with the network it came from.

    Args:
        data: hyperparameters of the run's data; their validation images are used where they can be read.
        shape: (C, H, W) of the patterns that stand in for them.
        limit: the threshold.
    """
    images, source = validation_images(data), "validation images"
    if not images:
        images, source = [check_images(1, shape, seed) for seed in range(10)], "test patterns"
    session = open_session(content)
    maps, scores, changed = 0.0, 0.0, 0
    for image in images:
        score, anomaly_map = outputs_of(network, image)
        found_score, found_map = session.run(None, {"images": image})
        maps = max(maps, float(np.abs(found_map - anomaly_map).max() / max(np.abs(anomaly_map).max(), 1e-12)))
        scores = max(scores, float(np.abs(found_score - score).max() / max(abs(limit), 1e-12)))
        changed += int(((found_score > limit) != (score > limit)).sum())
    if not np.isfinite([maps, scores]).all():
        raise ExportError("with 16-bit weights the network gives NaN or infinite maps: export without")
    return Loss(len(images), source, maps, scores, changed)


def validation_images(data: Mapping[str, Any]) -> list[np.ndarray]:
    """Up to 32 validation images of a run, good ones and synthetic defects, or tiles of them where the run has tiles,
    each uint8 (1, C, H, W); none where its folder is gone.
    """
    if not data:
        return []
    from zoo.data import AnomalyDetection
    from zoo.data.tiling import split

    # Beside its own arguments Lightning keeps what the command line made the data with.
    arguments = {name: value for name, value in data.items() if not name.startswith("_")} | {"num_workers": 0}

    # The good ones come first, and a loss is about both sides of the threshold.
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}
    # How the data splits its images was said when the run began.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        for batch in AnomalyDetection(**arguments).val_dataloader():
            pixels, labels = batch["image"], batch["label"]
            if batch.get("tile") is not None:
                pixels = split(pixels, batch["tile"], batch["tile_overlap"])[0]
                labels = labels.expand(len(pixels))
            for image, label in zip(pixels, labels.tolist(), strict=True):
                if len(found[label]) < IMAGES // 2:
                    found[label].append(image[None].numpy())
            if min(map(len, found.values())) == IMAGES // 2:
                break
    except (UsageError, OSError):
        return []
    finally:
        logger.setLevel(level)
    return found[0] + found[1]
