"""Published numbers stand where the paper has them, and every claim can go both ways."""

import pytest

from tilescan.experiments.harness import registry as papers
from tilescan.experiments.harness import tables
from tilescan.experiments.harness.claims import Effect
from tilescan.experiments.harness.records import Record, Records
from tilescan.experiments.papers import flash_attention
from tilescan.experiments.papers.flash_attention import published

ENVIRONMENT = {"backend": "cpu"}
SHAPE = {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32", "window": 256, "block": 128}


def record(kind, cell, result, seed=0, **settings):
    settings = {"kind": kind, **settings}
    return Record("flash_attention", cell, "", settings, seed, result, 1.0, ENVIRONMENT)


def runtime(length, direction, **medians):
    result = {n: {"median_ms": v, "samples_ms": [v, v]} for n, v in medians.items()}
    cell = f"runtime-{direction}-T{length}"
    return record("runtime", cell, result, length=length, direction=direction, **SHAPE)


def memory(length, direction, **sizes):
    result = {name: {"temp_bytes": value} for name, value in sizes.items()}
    cell = f"memory-{direction}-T{length}"
    return record("memory", cell, result, length=length, direction=direction, **SHAPE)


def claim(name, *made):
    found = flash_attention.PAPER.claims(Records(list(made)))
    return next(c for c in found if c.name == name)


def test_published_times_are_the_papers():
    both, forward = published.MS["forward_backward"], published.MS["forward"]
    plain = published.PLAIN_MS
    assert published.at(1024, both["standard"]) == 8.29
    assert published.at(8192, both["standard"]) == "out of memory"
    assert published.at(16384, both["standard"]) is None
    assert published.at(65536, both["tiled"]) == 9341.3
    assert published.at(4096, both["block_sparse"]) == 4.12
    assert published.at(128, forward["tiled"]) == 0.04
    assert published.at(4096, forward["standard"]) == 36.33
    assert published.at(100, forward["tiled"]) is None
    assert published.at(4096, plain["forward"]["standard"]) == 16.47
    assert published.at(65536, plain["forward_backward"]["block_sparse"]) == 50.39
    assert published.at(2048, published.MEGABYTES["forward_backward"]["standard"]) == 4416
    for rows in (*published.MS.values(), *plain.values(), *published.MEGABYTES.values()):
        assert len(rows["tiled"]) == len(rows["block_sparse"]) == len(published.LENGTHS) == 10
        assert rows["standard"][-1] == "out of memory" and len(rows["standard"]) in (7, 8)


def test_published_ratios_need_both_numbers():
    rows = published.PLAIN_MS["forward_backward"]
    assert published.over(4096, rows, "standard", "tiled") == 50.44 / 30.09
    assert published.over(8192, rows, "standard", "tiled") is None  # out of memory
    assert published.over(100, rows, "tiled", "block_sparse") is None


@pytest.mark.parametrize(
    ("tiled", "status"), [(10.0, "shown"), (14.0, "not shown"), (30.0, "not shown")]
)
def test_faster_is_decided_at_the_longest_length_that_both_ran(tiled, status):
    made = [
        runtime(512, "forward", standard=1.0, tiled=9.0),
        runtime(4096, "forward", standard=20.0, tiled=tiled),
        runtime(8192, "forward", tiled=1.0),
    ]
    found = claim("faster, forward", *made)
    assert found.status == status and "4096" in found.evidence


def test_standard_attention_that_runs_out_of_memory_decides_nothing():
    made = runtime(4096, "forward", tiled=5.0)
    made.result["standard"] = {"error": "out of memory"}
    assert claim("faster, forward", made).evidence == "its measurements are missing"
    table = next(t for t in flash_attention.PAPER.tables(Records([made])) if "forward" in t.name)
    assert "out of memory" in table.to_markdown()


@pytest.mark.parametrize(("sparse", "status"), [(10.0, "shown"), (40.0, "not shown")])
def test_block_sparse_must_follow_the_live_fraction(sparse, status):
    made = [
        runtime(1024, "forward_backward", tiled=10.0, block_sparse=9.0),
        runtime(4096, "forward_backward", tiled=100.0, block_sparse=sparse),
    ]
    assert claim("block-sparse", *made).status == status


@pytest.mark.parametrize(("power", "status"), [(1, "shown"), (2, "not shown")])
def test_linear_memory_is_a_slope(power, status):
    made = [
        memory(n, "forward", standard=n**2, tiled=100 * n**power, windowed=n, block_sparse=n)
        for n in (512, 1024, 2048, 4096)
    ]
    found = claim("linear memory, forward", *made)
    assert found.status == status and "standard 2.00" in found.evidence
    table = next(
        t for t in flash_attention.PAPER.tables(Records(made)) if t.name == "memory-forward"
    )
    assert table.rows[-1][1] == pytest.approx(2.0)
    assert table.rows[-1][2] == pytest.approx(power)


def traffic(kind, **changes):
    settings = {"length": 1024, "head_dim": 64, "on_chip": 98304} | changes
    moved = settings.pop("forward", 50)
    standard = settings.pop("standard", 600)
    result = {
        "block_q": 64, "block_k": 64, "visits": 4, "forward": moved, "forward_backward": 100,
        "standard_forward": 200, "standard_forward_backward": standard,
    }  # fmt: skip
    return record(kind, f"{kind}-{settings}", result, **settings)


@pytest.mark.parametrize(("standard", "status"), [(600, "shown"), (300, "not shown")])
def test_less_traffic_compares_with_the_published_ratio(standard, status):
    made = traffic("io", standard=standard)
    assert claim("less traffic", made).status == status
    table = next(t for t in flash_attention.PAPER.tables(Records([made])) if t.name == "io")
    row = dict(zip([c.heading for c in table.columns], table.rows[1], strict=True))
    assert row["standard, published"] == 35.3 and row["tiled, published"] == 4.4
    assert row["standard / tiled, static"] == standard / 100


def test_less_traffic_is_not_judged_by_another_shape():
    made = traffic("io", on_chip=8192)
    assert claim("less traffic", made).evidence == "its measurements are missing"


@pytest.mark.parametrize(
    ("powers", "status"),
    [
        ((-1, 2, 1), "shown"),
        ((0, 2, 1), "not shown"),
        ((-1, 1, 1), "not shown"),
        ((-1, 2, 0), "not shown"),
    ],
)
def test_traffic_must_have_the_powers_of_the_bound(powers, status):
    of_memory, of_length, of_sparsity = powers
    made = [traffic("io", on_chip=m, forward=1e9 * m**of_memory) for m in (8192, 65536)]
    made.append(traffic("io", forward=1))  # larger than N d: the bound does not speak of it
    made += [
        traffic("io_length", length=n, on_chip=16384, forward=n**of_length) for n in (512, 4096)
    ]
    for factors, live in ((0, 0.1), (1, 0.2)):
        once = 2 * 1024 * 64
        result = {"live_fraction": live, "visits": 1, "forward": once + 1e6 * live**of_sparsity,
                  "matmul_flops": 1}  # fmt: skip
        made.append(
            record("io_sparse", f"s{factors}", result, length=1024, head_dim=64, factors=factors)
        )
    assert claim("traffic follows the bound", *made).status == status
    drawn = flash_attention.PAPER.figures(Records(made))
    assert {"io-on-chip", "io-sparse"} <= set(drawn)


def test_memory_that_the_compiler_refuses_is_named():
    made = [memory(n, "forward", standard=n**2, tiled=n) for n in (1024, 2048)]
    made[1].result["standard"] = {"error": "out of memory"}
    found = claim("linear memory, forward", *made)
    assert found.evidence == "its measurements are missing"  # one point has no slope
    assert "out of memory" in flash_attention.PAPER.tables(Records(made))[0].to_markdown()


def test_ratios_show_their_spread_over_rounds():
    made = runtime(4096, "forward", standard=20.0, tiled=10.0)
    made.result["standard"]["samples_ms"] = [19.0, 21.0]
    found = claim("faster, forward", made)
    assert found.evidence == "2.00 ± 0.14 at length 4096"
    # The effect is the paper's without dropout and padding (table 18), and that of each round.
    assert found.effect == Effect(16.47 / 8.42, [1.9, 2.1])


def test_memory_of_the_longest_published_length_has_an_effect():
    made = [memory(n, "forward_backward", standard=n**2, tiled=n) for n in (2048, 4096, 8192)]
    assert claim("linear memory, forward + backward", *made).effect == Effect(17024 / 836, [4096])
    forward = [memory(n, "forward", standard=n**2, tiled=n) for n in (2048, 4096)]
    assert claim("linear memory, forward", *forward).effect is None


def test_rows_name_the_records_that_they_show():
    made = Records([runtime(n, "forward", standard=2.0, tiled=1.0) for n in (512, 1024)])
    (table,) = flash_attention.PAPER.tables(made)
    assert table.sources == [("runtime-forward-T512",), ("runtime-forward-T1024",)]


def test_runtime_table_has_published_and_measured_columns_side_by_side():
    made = Records([runtime(1024, "forward_backward", standard=20.0, tiled=10.0, block_sparse=5.0)])
    table = next(t for t in flash_attention.PAPER.tables(made))
    kinds = [column.kind for column in table.columns[1:7]]
    assert kinds == 2 * [tables.PUBLISHED, tables.PUBLISHED, tables.MEASURED]
    row = dict(zip([c.heading for c in table.columns], table.rows[0], strict=True))
    other = "Table 11 with dropout and padding"  # like for like is Table 20
    assert row["standard (ms), published"] == 3.67 and row["standard (ms), measured"] == 20.0
    assert row[f"standard, {other} (ms), published"] == 8.29
    assert row["standard / tiled, published"] == pytest.approx(3.67 / 2.29)
    assert row[f"standard / tiled, {other}, published"] == pytest.approx(8.29 / 2.55)
    assert row["standard / tiled, measured"] == tables.Spread(2.0, 0.0, 2)


def test_no_records_give_no_tables_and_no_figures_but_every_claim():
    empty = Records([])
    assert flash_attention.PAPER.tables(empty) == []
    assert set(flash_attention.PAPER.figures(empty).values()) == {""}
    statuses = {c.status for c in flash_attention.PAPER.claims(empty)}
    assert {s for s in statuses if not s.startswith("needs scale: ")} == {"not shown"}
    assert "needs scale: 8 GPUs and OpenWebText" in statuses


def test_accelerator_scale_is_the_papers_grid():
    config = papers.load_config("flash_attention", "accelerator")
    assert config.runtime.lengths == tuple(2**k for k in range(7, 17))
    assert (config.runtime.batch, config.runtime.heads, config.runtime.head_dim) == (16, 8, 64)
