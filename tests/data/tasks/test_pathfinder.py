"""Pathfinder: the label is what a flood along the contours finds; images are kept and repeat."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tilescan.data import tasks
from tilescan.data.tasks import pathfinder
from tilescan.data.tasks.contours import cross, draw

ZOOM = 8


@pytest.fixture(scope="module")
def drawings():
    """(settings, drawing) of several sizes and difficulties."""
    made = []
    for size, segments, count in ((32, 14, 12), (32, 6, 12), (64, 6, 8), (128, 9, 2), (256, 14, 3)):
        s = pathfinder.settings(size, segments)
        made += [(s, draw(s, np.random.default_rng((size, segments, i)))) for i in range(count)]
    return made


def clean_mask(s, contour, width=1):
    """The contour alone, enlarged, its gaps closed: bool [ZOOM * S, ZOOM * S]."""
    picture = Image.new("1", (s.size * ZOOM, s.size * ZOOM))
    points = [((x + 0.5) * ZOOM, (y + 0.5) * ZOOM) for y, x in contour.points]
    ImageDraw.Draw(picture).line(points, fill=1, width=width)
    return np.asarray(picture)


def flooded(mask, start):
    """What is connected with a place, over edges and corners."""
    reached, edge = np.zeros_like(mask), [start]
    while edge:
        y, x = edge.pop()
        if 0 <= y < len(mask) and 0 <= x < len(mask) and mask[y, x] and not reached[y, x]:
            reached[y, x] = True
            edge += [(y + dy, x + dx) for dy, dx in itertools.product((-1, 0, 1), repeat=2)]
    return reached


def test_a_flood_from_one_disc_reaches_the_other_where_the_label_is_1(drawings):
    for s, drawing in drawings:
        both = clean_mask(s, drawing.contours[0]) | clean_mask(s, drawing.contours[1])
        start, end = (
            tuple(int((c + 0.5) * ZOOM) for c in centre) for centre in drawing.discs
        )  # fmt: skip
        reached = flooded(both, start)
        assert reached.sum() > s.segments * s.length * ZOOM / 2
        assert reached[end] == drawing.label
    labels = [drawing.label for _, drawing in drawings]
    assert 10 < sum(labels) < len(labels) - 10


def test_contours_have_their_segments_gaps_and_distance(drawings):
    for s, drawing in drawings:
        first, second = drawing.contours
        apart = np.hypot(*np.subtract(first.points[0], second.points[0]))
        assert apart == pytest.approx(s.distance, abs=1)
        for contour in drawing.contours:
            points = np.asarray(contour.points)
            assert len(points) == s.segments + 1
            # A step is a segment and its gap of two margins; coordinates are rounded up twice.
            steps = np.hypot(*np.diff(points[1:], axis=0).T)
            smallest = s.length + 2 * min(s.margins)
            assert smallest - 3 < steps.min() and steps.max() < s.length + 2 * max(s.margins) + 3


def test_lines_stay_apart_and_discs_are_white(drawings):
    for s, drawing in drawings:
        one, two = (contour.lines / s.contrast[0] for contour in drawing.contours)
        assert not ((one > 0.5) & (two > 0.5)).any()
        strong = np.maximum(one, two) > 0.6
        assert (drawing.image[strong] > 60).all()
        assert not drawing.image[0, 0] and drawing.image.max() == 255
        for y, x in drawing.discs:
            assert drawing.image[y, x] > 0.45 * 255
        # Something else is drawn, too: those that distract.
        others = (drawing.image > 60) & (np.maximum(one, two) < 0.05)
        assert others.sum() > 10


def test_segments_turn_by_less_than_the_continuity_allows(drawings):
    for s, drawing in drawings:
        for contour in drawing.contours:
            steps = np.diff(np.asarray(contour.points[1:], float), axis=0)
            angles = np.arctan2(steps[:, 0], steps[:, 1])
            turns = np.abs((np.diff(angles) + np.pi) % (2 * np.pi) - np.pi)
            # The direction of a step is between those of two segments.
            assert np.mean(turns < np.pi / 2 / s.continuity) > 0.8


def test_lines_that_cross_or_touch_are_found():
    assert cross([(0, 0), (2, 2)], [(0, 2), (2, 0)])
    assert cross([(0, 0), (0, 4), (4, 4)], [(2, 6), (2, 3)])
    assert cross([(0, 0), (0, 4)], [(0, 4), (3, 3)])
    assert cross([(0, 0), (0, 4)], [(0, 3), (0, 6)])
    assert not cross([(0, 0), (0, 4)], [(0, 5), (0, 6)])
    assert not cross([(0, 0), (0, 4)], [(1, 0), (1, 4)])
    assert not cross([(0, 0), (2, 2)], [(0, 1), (1, 2)])


def test_an_image_depends_on_seed_and_index_alone():
    s = pathfinder.settings(32, 6)
    image, label = pathfinder.example(s, 3, 5)
    again = pathfinder.example(s, 3, 5)
    np.testing.assert_array_equal(image, again[0])
    assert image.dtype == np.uint8 and image.shape == (32, 32) and label == again[1]
    assert not np.array_equal(image, pathfinder.example(s, 3, 6)[0])
    assert not np.array_equal(image, pathfinder.example(s, 4, 5)[0])


def test_images_are_made_once_in_blocks_and_split(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TILESCAN_CACHE", str(tmp_path))
    monkeypatch.setattr(pathfinder, "BLOCK", 8)
    pathfinder._splits.cache_clear()
    make = lambda examples, **o: tasks.get("pathfinder", segments=6, examples=examples, **o)
    datasets = make(20, integers=True).datasets(batch_size=2, seed=0)
    assert capsys.readouterr().err.count("making Pathfinder images") == 3
    s = pathfinder.settings(32, 6)
    expected = [pathfinder.example(s, 0, i) for i in range(20)]
    for split, numbers in (("validation", (8, 18)), ("test", (9, 19))):
        batch = datasets[split].batch(0)
        for row, number in enumerate(numbers):
            np.testing.assert_array_equal(batch["tokens"][row], expected[number][0].ravel())
            assert batch["labels"][row] == expected[number][1]
    found = {datasets["train"].batch(i)["tokens"].tobytes() for i in range(8)}
    assert len(found) == 8

    # Other tasks read the files; a damaged one is made again; a longer task goes on.
    pathfinder._splits.cache_clear()
    pathfinder.block_file(s, 0, 1).write_bytes(b"half")
    real = make(20).datasets(batch_size=2, seed=0)["test"].batch(0)["tokens"]
    assert capsys.readouterr().err.count("making") == 1
    assert real.shape == (2, 1024, 1) and real.dtype == np.float32
    np.testing.assert_allclose(real[0, :, 0], expected[9][0].ravel() / 127.5 - 1, atol=1e-6)
    make(22).datasets(batch_size=2, seed=0)
    assert "images 16 to 21 of 22" in capsys.readouterr().err
    pathfinder._splits.cache_clear()


def test_sizes_that_are_not_published_are_refused():
    with pytest.raises(ValueError, match="size=48 must be one of 32, 64, 128, 256"):
        tasks.get("pathfinder", size=48)
    with pytest.raises(ValueError, match="segments=2 must be at least 3"):
        tasks.get("pathfinder", segments=2)
    with pytest.raises(ValueError, match="examples=9 must be at least 10"):
        tasks.get("pathfinder", examples=9)
