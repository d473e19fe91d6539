"""Which tiles a problem gets: measured ones where the shape was tuned, otherwise a model of what a tile costs.

The model: a tile has about as many rows as an expert; few rows are a stream of weights, read by narrow tiles of which there
are at least as many as processors; many are arithmetic, done in the largest tiles that registers hold.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FEW = 4  # tokens up to which experts may be read for each alone
APART = 0.938  # of their experts at least that are different ones, by what an H100 took
DIRECT_ROWS = 16  # T*k up to which programs find their rows from the ids alone
XPU = ("pvc", "bmg", "xpu", "generic")
LARGE = ("h100", "h200", "b200")  # 227 KiB of shared memory, tile copies in hardware


@dataclass(frozen=True)
class Tile:
    """One product's tile. columns: of the weight, gate and up together; group: row tiles of an expert that share its weights
    in L2; split: stretches of the inner dimension; programs: for each processor, 0 for one a tile; halves: tiles at most
    half full have half the rows; registers: of a thread of an XPU, 0 for the compiler's choice."""

    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8
    split: int = 1
    programs: int = 0
    descriptors: bool = False
    halves: bool = False
    registers: int = 0


@dataclass(frozen=True)
class Config:
    """rows: of both products' tiles, 1 for `vector`; direct: rows are found from the ids, without a sort; permute:
    x's rows are copied in the order of their experts first, so that hardware can copy or load tiles of them."""

    rows: int
    direct: bool
    first: Tile
    second: Tile
    permute: bool = False

    @staticmethod
    def of(data: Mapping[str, Any]) -> "Config":
        """From JSON, the inverse of `dataclasses.asdict`."""
        return Config(
            data["rows"], data["direct"], Tile(**data["first"]), Tile(**data["second"]), data.get("permute", False)
        )


@dataclass(frozen=True)
class Problem:
    """tokens, top_k, experts, hidden, intermediate; gated: two columns of the first weight for each of its result;
    element: bytes; device: as in the names of the config files; processors: of the device; layout: of gate and up; reads:
    how an XPU reads weights, "rows" or "columns" in blocks (whichever the inner dimension is), or by "pointers"; result: bytes
    of an element of the result; vector: whether `vector` can take such weights."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    element: int
    device: str
    processors: int
    layout: str = "halves"
    reads: str = "rows"
    result: int = 2
    vector: bool = False

    @property
    def shape(self) -> str:
        """The key of a shape in a config file."""
        kind = "gated" if self.gated else "plain"
        return f"E{self.experts}_k{self.top_k}_H{self.hidden}_I{self.intermediate}_{kind}_{self.element * 8}bit"


@lru_cache(maxsize=64)
def _tuned(folder: Path, device: str) -> Mapping[str, Mapping[str, Any]]:
    file = folder / f"{device}.json"
    return json.loads(file.read_text()) if file.exists() else {}  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def user_folder() -> Path:
    """Where `braze tune` keeps what it measured; read before the configs of the package."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "braze" / "configs"


def choose_config(problem: Problem, folders: Sequence[Path] | None = None) -> Config:
    """The tuned config of the nearest number of tokens, where the shape was tuned for this device; else the model's.

    folders: of config files, the first that knows the shape decides; by default the user's, then the package's.
    """
    return _choose(problem, (user_folder(), CONFIGS) if folders is None else tuple(folders))


@lru_cache(maxsize=4096)
def _choose(problem: Problem, folders: tuple[Path, ...]) -> Config:
    for folder in folders:
        by_tokens = _tuned(folder, problem.device).get(problem.shape)
        if by_tokens:
            rows = 1 if apart(problem) else max(1, problem.tokens)
            nearest = min(by_tokens, key=lambda t: max(int(t), rows) / min(int(t), rows))
            found = Config.of(by_tokens[nearest])
            if found.rows > 1 or apart(problem):
                return found
            break
    return model(problem)


def apart(p: Problem) -> bool:
    """Whether `vector` pays: hardly two of a few tokens can be expected to share an expert, whose weights it reads twice."""
    used = p.experts * (1 - (1 - p.top_k / p.experts) ** p.tokens)
    return p.vector and 1 <= p.tokens <= FEW and used >= APART * p.tokens * p.top_k


def model(p: Problem) -> Config:
    """A config for a problem that nobody measured."""
    from braze.kernels.triton import xpu_tiles

    rows = p.tokens * p.top_k
    each = rows / max(1, min(p.experts, rows))
    direct = rows <= DIRECT_ROWS
    if p.device in XPU:
        return xpu_tiles.choose(p, direct)
    if apart(p):
        return Config(1, True, *_vector(p))
    if p.element == 4 or p.device not in LARGE:
        tile = Tile(64, 32, 4, 2) if p.element == 4 else Tile(128, 32, 8, 2) if each > 14 else Tile(64, 64, 4, 2)
        return Config(64 if each > 14 else 16, direct, tile, tile)
    if direct:
        return Config(16, True, *_streaming(p, min(rows, p.experts)))
    if each <= 14:
        tile = Tile(64, 256, 4, 3, group=1)
        return Config(16, False, tile, tile)
    if each <= 28:
        tile = Tile(64, 256, 4, 3, group=2, descriptors=True)
        return Config(32, False, tile, tile)
    if each <= 100:
        tile = Tile(128, 64, 4, 4, descriptors=True)
        return Config(64, False, tile, tile)
    if each <= 300:
        wide = Tile(256, 64, 8, 4, group=16, descriptors=True, halves=True)
        return Config(128, False, wide, Tile(128, 64, 4, 3, group=16, descriptors=True, halves=True))
    first = Tile(256, 64, 8, 4, group=16, programs=1, descriptors=True)
    return Config(128, False, first, Tile(256, 64, 8, 3, group=16, descriptors=True))


def _vector(p: Problem) -> tuple[Tile, Tile]:
    """Tiles for few tokens: a few rows of weights a program, of a length that leaves few lanes idle, 8192 elements at most."""
    length = _length(p.intermediate)
    slots = 1 << (p.top_k - 1).bit_length()
    least = 8 if slots > 1 else 4 if p.hidden >= 4096 else 2  # of one expert alone: enough programs for all processors
    rows = max(slots, least if length >= 512 else 32)
    first = Tile(8 if p.gated else 4, _length(p.hidden), 4, 1)
    return first, Tile(rows // slots, min(length, 8192 // rows), 4, 1)


def _length(inner: int) -> int:
    """Elements of a row that a program reads at a time."""
    fits = (n for n in (1024, 512, 256) if -(-inner // n) * n <= 1.1 * inner)
    return next(fits, 256)


def _streaming(p: Problem, active: int) -> tuple[Tile, Tile]:
    """Tiles for a few rows of `active` experts: enough programs that every processor reads weights from the start."""
    columns = p.intermediate * (2 if p.gated else 1)
    width = 64 if active * columns // 64 >= 1.5 * p.processors else 32
    split = 2 if active * p.hidden // 64 < 1.5 * p.processors and p.intermediate >= 512 else 1
    second = (64, 128, 4, 4) if p.intermediate % (256 * split) else (64, 256, 4, 3)
    return Tile(width, 128, 4, 4 if width == 32 else 3, group=1), Tile(*second, group=1, split=split)
