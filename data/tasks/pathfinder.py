"""Pathfinder: are two discs joined by one dashed contour, among others that distract?

Linsley et al. 2018 (arXiv 1805.08315); Tay et al. 2021 (Long Range Arena, arXiv 2011.04006), whose
settings these are: sizes 32, 64, 128 (Path-X) and 256, contours of 6 (easy), 9 and 14 (hard)
segments. The images are made here (see `data.contours`), once, and kept in the cache's folder.
"""

import functools
import os
import pathlib
import sys
import zipfile

import numpy as np

from tilescan.data.batches import Batch
from tilescan.data.clients import cache_dir
from tilescan.data.tasks.base import FixedTask
from tilescan.data.tasks.contours import Settings, draw

VERSION = 1  # of the images that the cache holds; to be raised when the rules change
BLOCK = 500  # images of a file

_BY_SIZE = {
    32: dict(padding=1, length=2, thickness=0.5, margins=(1,), radius=1.5, distance=7,
             continuity=1.0, distractor_segments=20, contrast=(1.5, 2.0)),
    64: dict(padding=1, length=5, thickness=1.0, margins=(1,), radius=2.5, distance=12,
             continuity=1.8, distractor_segments=22, contrast=(0.8, 0.8)),
    128: dict(padding=1, length=5, thickness=1.5, margins=(2, 3), radius=3.0, distance=20,
              continuity=1.8, distractor_segments=35, contrast=(0.9, 0.9)),
    256: dict(padding=22, length=5, thickness=2.0, margins=(3,), radius=5.0, distance=27,
              continuity=1.8, distractor_segments=30, contrast=(1.0, 1.0)),
}  # fmt: skip


def settings(size: int = 32, segments: int = 14) -> Settings:
    """Returns the Long Range Arena's settings for a size.

    Raises:
      ValueError: a size that it does not have, or too few segments.
    """
    if size not in _BY_SIZE:
        raise ValueError(f"size={size} must be one of {', '.join(map(str, _BY_SIZE))}")
    if segments < 3:
        raise ValueError(f"segments={segments} must be at least 3; published: 6, 9 and 14")
    return Settings(size, segments, **_BY_SIZE[size])


def example(s: Settings, seed: int, index: int) -> tuple[np.ndarray, int]:
    """Makes (image uint8 [S, S], label): a function of its arguments alone."""
    drawing = draw(s, np.random.default_rng((seed, index)))
    return drawing.image, drawing.label


@functools.lru_cache(maxsize=2)
def _splits(s: Settings, examples: int, seed: int) -> dict[str, Batch]:
    """Makes or reads the images of the three splits."""
    blocks = [_block(s, seed, b, examples) for b in range(-(-examples // BLOCK))]
    images, labels = (np.concatenate(parts)[:examples] for parts in zip(*blocks, strict=True))
    tenth = np.arange(examples) % 10
    chosen = {"train": tenth < 8, "validation": tenth == 8, "test": tenth == 9}
    return {
        split: {"images": images[which], "labels": labels[which]} for split, which in chosen.items()
    }


def block_file(s: Settings, seed: int, block: int) -> pathlib.Path:
    """Returns where images BLOCK * block and following are kept once they are made."""
    folder = cache_dir() / "pathfinder" / f"{s.size}-{s.segments}-seed{seed}-v{VERSION}"
    return folder / f"{block:05d}.npz"


def _block(s: Settings, seed: int, block: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images [N, S, S], labels [N]) of a block: BLOCK of them, or fewer in the last."""
    path, first = block_file(s, seed, block), block * BLOCK
    wanted = min(BLOCK, examples - first)
    try:
        with np.load(path) as kept:
            images, labels = kept["images"], kept["labels"]
        if len(images) >= wanted:
            return images, labels
    except (FileNotFoundError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        pass  # not made yet, or damaged

    # Made anew, and written whole.
    print(f"making Pathfinder images {first} to {first + wanted - 1} of {examples}, "
          f"{s.size} x {s.size}", file=sys.stderr, flush=True)  # fmt: skip
    made = [example(s, seed, first + i) for i in range(wanted)]
    images = np.stack([image for image, _ in made])
    labels = np.asarray([label for _, label in made], np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}-{os.getpid()}.npz")
    np.savez_compressed(partial, images=images, labels=labels)
    os.replace(partial, path)
    return images, labels


def pathfinder(
    size: int = 32,
    segments: int = 14,
    examples: int = 20_000,
    integers: bool = False,
    data_seed: int = 0,
) -> FixedTask:
    """Tells whether two discs are joined by a dashed contour, in images of size^2 pixels.

    Of ten images in a row, the first eight are for training, then one for validation, one for test.
    At first use they are made: some 30 a second and core of size 32 or 256, but only one to four of
    64 or 128, where contours rarely find room.

    Args:
      size: 32, 64, 128 (Path-X) or 256.
      segments: of the two contours; 6, 9 and 14 are published as easy, intermediate and hard.
      examples: how many in all; published: 200,000.
      integers: pixels as tokens 0..255; else as real numbers -1..1, [B, T, 1].
      data_seed: which images; not the training seed, so that seeds compare.
    """
    if examples < 10:
        raise ValueError(f"examples={examples} must be at least 10: a tenth is for validation")
    s = settings(size, segments)

    def present(arrays: Batch) -> Batch:
        pixels = arrays["images"].reshape(len(arrays["images"]), -1)
        if integers:
            tokens = pixels.astype(np.int32)
        else:
            tokens = (pixels.astype(np.float32) / 127.5 - 1)[..., None]
        return {"tokens": tokens, "labels": arrays["labels"].astype(np.int32)}

    load = functools.partial(_splits, s, examples, data_seed)
    return FixedTask("pathfinder", load, present, size**2, 256, 2, None if integers else 1)


TASKS = {"pathfinder": pathfinder}
