"""A memory bank in the manner of PatchCore: how far is every place of an image from all that good images showed?

Towards Total Recall in Industrial Anomaly Detection - https://arxiv.org/abs/2106.08265
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import UsageError
from zoo.heads.anomaly.base import AnomalyHead, AnomalyOutput, Progress
from zoo.heads.anomaly.maps import gaussian, resize, top_mean

# Distances to so many entries of the bank are held at once for every place.
BLOCK = 4096


class MemoryBank(AnomalyHead):
    """Distance of every place from its nearest neighbours in a bank of places of good images.

    Places of all maps are averaged over their neighbours, brought to the finest grid and concatenated. The bank is a
    greedy k-centre choice of them, made on random projections.

    Args:
        channels: of the maps.
        coreset: share of the places seen that the bank keeps.
        bank_size: the most places that the bank keeps.
        max_places: places held while learning; of more, an equal share of what was and will be seen is drawn.
        neighbours: nearest entries whose mean distance counts.
        pool: side of the local mean, odd; 1 for none. Beyond the border are zeros.
        normalize: whether only the direction of a place's vector counts, not its length, which light changes. The paper
            does without.
        sigma: of the Gaussian that smooths the map, in pixels of the image; 0 for none.
        top: share of the places, the farthest, whose mean distance is the score; 0 for the farthest alone. Smoothing
            has no part in it: a defect of one place would drown.
        seed: of the draws.

    Raises:
        UsageError: a number is out of range.
    """

    needs_gradient = False
    bank: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        coreset: float = 0.01,
        bank_size: int = 20_000,
        max_places: int = 200_000,
        neighbours: int = 1,
        pool: int = 3,
        normalize: bool = False,
        sigma: float = 4.0,
        top: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        for name, share in (("coreset", coreset), ("top", top)):
            if not 0 <= share <= 1 or (name == "coreset" and not share):
                raise UsageError(f"{name}={share}: give a share in [0, 1]; the coreset's is above 0")
        for name, count in (("bank_size", bank_size), ("max_places", max_places), ("neighbours", neighbours)):
            if count < 1:
                raise UsageError(f"{name}={count}: it must be at least 1")
        if not sigma >= 0:
            raise UsageError(f"sigma={sigma}: give pixels, 0 for no smoothing")
        self.coreset, self.bank_size, self.max_places = coreset, bank_size, max_places
        if pool < 1 or pool % 2 == 0:
            raise UsageError(f"pool={pool}: give an odd side, 1 for no local mean")
        self.neighbours, self.sigma, self.top, self.seed = neighbours, sigma, top, seed
        self.pool, self.normalize = pool, normalize
        self.register_buffer("bank", torch.zeros(0, sum(channels)))
        self._reservoir = Reservoir(max_places, seed)

    def places(self, features: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, h, w) -> (B, sum of C, H, W) on the finest grid."""
        grid = (max(map_.shape[2] for map_ in features), max(map_.shape[3] for map_ in features))
        # With zeros beyond the border. Few places are cut off as those there are, so a bank covers them badly: left at
        # their full length they are the farthest places of most good images, and those make the score.
        near = [F.avg_pool2d(map_, self.pool, 1, self.pool // 2) for map_ in features]
        places = torch.cat([resize(map_, grid) for map_ in near], dim=1)
        return F.normalize(places, dim=1) if self.normalize else places

    def update(self, features: Sequence[Tensor]) -> None:
        places = self.places([map_.float() for map_ in features])
        self._reservoir.add(places.permute(0, 2, 3, 1).flatten(0, 2))

    def finalize(self, progress: Progress | None = None) -> None:
        """Makes the bank of what was shown; with nothing new it stays as it is.

        Raises:
            UsageError: nothing was ever shown.
        """
        if self._reservoir.seen:
            places = self._reservoir.take()
            wanted = min(self.bank_size, max(1, round(self.coreset * self._reservoir.seen)), len(places))
            device = self.bank.device
            self.bank = places[k_centres(places.to(device), wanted, self.seed, progress)].to(device)
            self._reservoir = Reservoir(self.max_places, self.seed)
        elif not self._ready:
            raise UsageError("the memory bank was shown no image: call update with good ones first")
        super().finalize()

    def detect(self, features: Sequence[Tensor], size: tuple[int, int]) -> AnomalyOutput:
        places = self.places(features)
        far = nearest(places.permute(0, 2, 3, 1).flatten(0, 2), self.bank, self.neighbours)
        far = far.view(places.shape[0], 1, places.shape[2], places.shape[3])
        maps = resize(far, size)
        return AnomalyOutput(top_mean(far, self.top), gaussian(maps, self.sigma) if self.sigma > 0 else maps)

    def get_extra_state(self) -> dict[str, Any]:
        """What was seen and is no bank yet, so that a run which is killed while it fills goes on."""
        return self._reservoir.state()

    def set_extra_state(self, state: Any) -> None:
        self._reservoir.load(state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}bank")
        if loaded is not None and loaded.shape[1:] == self.bank.shape[1:]:
            # How many places a bank keeps is known only when it is made.
            self.bank = self.bank.new_empty(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Reservoir:
    """At most `size` rows drawn evenly from all rows ever added, on the CPU."""

    def __init__(self, size: int, seed: int):
        self.size, self.seen = size, 0
        self._seed = seed
        self._rows: list[Tensor] = []
        self._keys: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Rows (N, C)."""
        # The rows with the smallest random keys are an even draw, whatever came in which batch.
        self._rows.append(rows.detach().cpu())
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.seen)
        self._keys.append(torch.rand(len(rows), generator=generator))
        self.seen += len(rows)
        if sum(map(len, self._rows)) > 1.5 * self.size:
            self._shrink()

    def _shrink(self) -> None:
        rows, keys = torch.cat(self._rows), torch.cat(self._keys)
        if len(rows) > self.size:
            kept = keys.topk(self.size, largest=False).indices.sort().values
            rows, keys = rows[kept], keys[kept]
        self._rows, self._keys = [rows], [keys]

    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which `load` goes on; empty where nothing was seen."""
        if not self.seen:
            return {}
        self._shrink()
        return {"rows": self._rows[0], "keys": self._keys[0], "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.seen = int(state.get("seen", 0))
        self._rows = [state["rows"].cpu()] if self.seen else []
        self._keys = [state["keys"].cpu()] if self.seen else []

    def take(self) -> Tensor:
        """What is held, (at most size, C), in the order in which it came."""
        self._shrink()
        return self._rows[0]


def k_centres(rows: Tensor, count: int, seed: int = 0, progress: Progress | None = None, width: int = 128) -> Tensor:
    """Indices (count,), on the CPU, of rows (N, C) chosen in turn, each the farthest from all chosen before.

    Distances are those of random projections to `width` dimensions, and the first row is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    if rows.shape[1] > width:
        rows = rows @ torch.randn(rows.shape[1], width, generator=generator).to(rows.device) / width**0.5
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    squares = rows.square().sum(dim=1)
    distances = torch.full_like(squares, float("inf"))
    while len(chosen) < count:
        last = chosen[-1]
        torch.minimum(distances, squares + squares[last] - 2 * (rows @ rows[last]), out=distances)
        chosen.append(int(distances.argmax()))
        if progress is not None and (len(chosen) % 64 == 0 or len(chosen) == count):
            progress(len(chosen), count)
    return torch.tensor(chosen)


def nearest(rows: Tensor, bank: Tensor, neighbours: int) -> Tensor:
    """Mean Euclidean distance (N,) of rows (N, C) from their nearest neighbours in the bank (M, C), all float32."""
    squares, indices = [], []
    # From the middle of the bank: what all places have in common would take the digits that tell them apart.
    centre = bank.mean(dim=0)
    near_rows = rows - centre
    for start, block in zip(range(0, len(bank), BLOCK), (bank - centre).split(BLOCK), strict=True):
        # Which are near, by one product; the square of a row is the same for all of its neighbours.
        found = block.square().sum(dim=1) - 2 * (near_rows @ block.t())
        found, index = found.topk(min(neighbours, len(block)), dim=1, largest=False)
        squares.append(found)
        indices.append(index + start)
    best = torch.cat(squares, dim=1)
    best = best.topk(min(neighbours, best.shape[1]), dim=1, largest=False).indices
    near = bank[torch.cat(indices, dim=1).gather(1, best)]
    # How near, by differences: those of squares lose half of the digits of small distances.
    return (rows[:, None] - near).norm(dim=2).mean(dim=1)
