"""Reading in chunks, layer by layer or whole, is the parallel forward."""

import jax
import numpy as np
import pytest
from tiny_writers import tiny_writer

from tilescan.decoding import reader as reader_lib
from tilescan.decoding.reader import Reader, chunks, room_for
from tilescan.models.language_model import unroll_params

TEXT = np.random.default_rng(1).integers(0, 256, (2, 90)).astype(np.int32)


def check(reader, params, splits, batch=2):
    model, text = reader.model, TEXT[:batch, : splits[-1]]
    expected = jax.jit(lambda t: model.apply({"params": params}, t)[0])(text)
    reading, start = reader.start(batch, 20), 0
    for stop in splits:
        logits, reading = reader.read(reading, text[:, start:stop])
        np.testing.assert_allclose(logits, expected[:, stop - 1], atol=1e-3)
        assert reading.used == stop <= reading.room
        start = stop


def test_chunks_and_rooms_are_of_few_sizes():
    assert list(chunks(1100)) == [512, 512, 64, 8, 1, 1, 1, 1]
    assert list(chunks(3)) == [1, 1, 1]
    rooms = sorted({room_for(n) for n in range(1, 3000)})
    assert rooms == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072]
    assert all(room_for(n) >= n for n in range(1, 3000))


def test_layer_by_layer_is_the_parallel_forward(monkeypatch):
    monkeypatch.setattr(reader_lib, "CHUNKS", (4, 1))
    writer = tiny_writer()
    reader = Reader(writer.model, writer.params)
    assert len(reader.layers) == 2
    check(reader, writer.params, [5, 9, 10], batch=1)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "pattern,fields",
    [
        (("attention", "mlp"), dict(n_kv_heads=1)),
        (("attention", "mlp"), dict(scan_layers=False)),
        (("local_attention:5", "mamba"), dict(position="learned", max_len=128)),
        (("attention", "mamba2"), dict(position="rope_interleaved", expand=4)),
    ],
)
def test_every_kind_of_state_grows_and_reads_on(pattern, fields, whole):
    fields = dict(fields)
    if "expand" in fields:
        fields["mixers"] = {"mamba2": {"head_dim": 16, "expand": fields.pop("expand")}}
    writer = tiny_writer.__wrapped__(*pattern, **fields)
    reader = Reader(writer.model, writer.params)
    if whole:
        reader.layers, reader.params = None, writer.params
    check(reader, writer.params, [43, 89, 90])


@pytest.mark.slow
def test_layers_of_an_unrolled_model_are_those_of_the_scan():
    import dataclasses

    from tilescan.models import LanguageModel

    writer = tiny_writer("attention", "mlp")
    config = dataclasses.replace(writer.model.config, scan_layers=False)
    unrolled = unroll_params(config, writer.params)
    one = Reader(writer.model, writer.params)
    other = Reader(LanguageModel(config), unrolled)
    results = [r.read(r.start(2, 20), TEXT[:, :9])[0] for r in (one, other)]
    np.testing.assert_array_equal(*results)
