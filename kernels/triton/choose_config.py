"""Which tiles a problem gets: measured ones where the shape was tuned, otherwise a model of what a tile costs.

The model: a product takes the longer of its bytes and its operations, in whole rounds of the device's processors; the tile's
rows should be about the rows that an expert has, its columns as few as keep every processor reading.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DIRECT_ROWS = 128  # T*k up to which programs find their rows from the ids alone


@dataclass(frozen=True)
class Tile:
    """One product's tile. columns: of the weight, gate and up together; group: row tiles that share weights in L2;
    split: stretches of the inner dimension; programs: for each processor, 0 for one a tile."""

    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    programs: int = 0
    descriptors: bool = False


@dataclass(frozen=True)
class Config:
    """rows: of both products' tiles; direct: rows are found from the ids, without a sort."""

    rows: int
    direct: bool
    first: Tile
    second: Tile

    @staticmethod
    def of(data: Mapping[str, Any]) -> "Config":
        """From JSON, the inverse of `dataclasses.asdict`."""
        return Config(data["rows"], data["direct"], Tile(**data["first"]), Tile(**data["second"]))


@dataclass(frozen=True)
class Problem:
    """tokens, top_k, experts, hidden, intermediate; gated: two columns of the first weight for each of its result;
    element: bytes; device: as in the names of the config files; processors: of the device."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    element: int
    device: str
    processors: int

    @property
    def shape(self) -> str:
        """The key of a shape in a config file."""
        kind = "gated" if self.gated else "plain"
        return f"E{self.experts}_k{self.top_k}_H{self.hidden}_I{self.intermediate}_{kind}_{self.element * 8}bit"


@lru_cache(maxsize=64)
def _tuned(folder: Path, device: str) -> Mapping[str, Mapping[str, Any]]:
    file = folder / f"{device}.json"
    return json.loads(file.read_text()) if file.exists() else {}  # type: ignore[no-any-return]


def user_folder() -> Path:
    """Where `braze tune` keeps what it measured; read before the configs of the package."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "braze" / "configs"


def choose_config(problem: Problem, folders: Sequence[Path] | None = None) -> Config:
    """The tuned config of the nearest number of tokens, where the shape was tuned for this device; else the model's."""
    for folder in (user_folder(), CONFIGS) if folders is None else folders:
        by_tokens = _tuned(folder, problem.device).get(problem.shape)
        if by_tokens:
            rows = max(1, problem.tokens)
            nearest = min(by_tokens, key=lambda t: max(int(t), rows) / min(int(t), rows))
            return Config.of(by_tokens[nearest])
    return model(problem)


def model(p: Problem) -> Config:
    """A config for a problem that nobody measured."""
    rows = p.tokens * p.top_k
    each = rows / min(p.experts, max(1, rows))
    if p.element == 4:
        small = Tile(64, 32, 4, 2)
        return Config(16 if each <= 16 else 64, rows <= DIRECT_ROWS, small, small)
    if p.device == "xpu":
        tile = Tile(128, 32, 8, 2) if each <= 32 else Tile(128, 32, 16, 2)
        return Config(16 if each <= 32 else 64, rows <= DIRECT_ROWS, tile, tile)
    if each <= 24:
        active = min(rows, p.experts)
        return Config(
            16,
            rows <= DIRECT_ROWS,
            _narrow(p, active, p.intermediate * (2 if p.gated else 1), p.hidden, 1),
            _narrow(p, active, p.hidden, p.intermediate, 8),
        )
    if each <= 96:
        tile_rows = 32 if each <= 40 else 64
        return Config(tile_rows, False, Tile(128, 64, 4, 4, descriptors=True), Tile(128, 64, 4, 4, descriptors=True))
    return Config(128, False, Tile(256, 64, 8, 3, descriptors=True), Tile(256, 64, 8, 3, descriptors=True))


def _narrow(p: Problem, active: int, columns: int, inner: int, most: int) -> Tile:
    """A tile for few rows: few enough columns, and a split of at most `most`, that two rounds of programs all read."""
    depth = 128 if inner % 128 == 0 else 64
    width = (
        128 if active * columns // 128 >= 4 * p.processors else 64 if active * columns // 64 >= 2 * p.processors else 32
    )
    programs = max(1, active * columns // width)
    split = 1
    while split < most and programs * split < 2 * p.processors and inner // (2 * split) >= 4 * depth:
        split *= 2
    return Tile(width, depth, 4, 4, group=1, split=split)
