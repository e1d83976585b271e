"""What is saved comes back to the bit, on any mesh; what is damaged is found and named."""

import contextlib
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_training import Rows

from tilescan.training import sharding
from tilescan.training.checkpoints import CheckpointError, Checkpoints, describe, is_full_disk
from tilescan.training.settings import MeshConfig


def some_state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "w": jnp.float32(rng.normal(size=(16, 8))),
            "b": jnp.bfloat16(rng.normal(size=8)),
        },
        "key": jax.random.key_data(jax.random.key(seed)),
        "step": jnp.int32(seed),
    }


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def rows_at(index):
    rows = Rows()
    rows.index = index
    return rows


@pytest.fixture
def opened():
    """`Checkpoints`, closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(*args, **kwargs):
            return stack.enter_context(contextlib.closing(Checkpoints(*args, **kwargs)))

        yield make


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    saver = Checkpoints(tmp_path / "ckpt", keep=3, config={"a": {"b": 1}})
    for step in (1, 2):
        saver.save(step, some_state(step), rows_at(10 * step))
    saver.wait()
    saver.close()
    return tmp_path / "ckpt"


def test_round_trip_is_exact(saved, opened):
    saver, rows = opened(saved), Rows()
    assert saver.steps() == [1, 2] and saver.config_at(2) == {"a": {"b": 1}}
    state = saver.restore(2, abstract(some_state()), rows)
    jax.tree.map(np.testing.assert_array_equal, state, some_state(2))
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, some_state())
    assert rows.index == 20


def test_only_the_newest_are_kept(tmp_path, opened):
    saver = opened(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        saver.save(step, some_state(step), Rows())
    saver.wait()
    assert saver.steps() == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


def test_what_a_killed_save_left_is_removed_before_anything_else(saved, opened):
    for name in ("3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"):
        (saved / name / "state").mkdir(parents=True)
        (saved / name / "state" / "half").write_text("x")
    (saved / "mine").mkdir()
    assert opened(saved).steps() == [1, 2]
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2", "mine"]


def test_nothing_in_a_checkpoint_is_a_pickle(saved):
    for path in saved.rglob("*"):
        if path.is_file():
            assert not path.suffix == ".pkl" and path.read_bytes()[:2] != b"\x80\x04"


def test_the_saved_values_are_those_of_the_call_though_the_buffers_are_donated(tmp_path, opened):
    """Saving goes on while the next steps overwrite the state's buffers in place."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    saver, state = opened(tmp_path, keep=9), {"x": jnp.zeros((512, 512))}
    for number in range(1, 6):
        state = step(state)
        saver.save(number, state, Rows())
        for _ in range(3):
            state = step(state)
    saver.wait()
    for number in range(1, 6):
        x = saver.restore(number, abstract(state))["x"]
        np.testing.assert_array_equal(x, np.full((512, 512), 4.0 * (number - 1) + 1))


MESHES = [MeshConfig(data=8), MeshConfig(data=1, fsdp=2, tensor=4), MeshConfig(data=2, tensor=4)]


@pytest.mark.parametrize("there", MESHES[1:])
def test_restore_on_another_mesh(tmp_path, there, opened):
    spec = P("fsdp", "tensor")
    here = NamedSharding(sharding.make_mesh(MeshConfig(data=1, fsdp=8)), spec)
    x = {"x": jax.device_put(jnp.arange(128.0).reshape(16, 8), here)}
    saver = opened(tmp_path)
    saver.save(1, x, Rows())
    saver.wait()
    place = NamedSharding(sharding.make_mesh(there), spec)
    got = saver.restore(1, abstract(x, place))
    assert got["x"].sharding == place
    np.testing.assert_array_equal(got["x"], x["x"])
    assert describe(got) == describe(x), "fingerprints do not depend on the mesh"


def test_fingerprint_sees_any_flipped_bit_and_any_swap():
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    before = describe({"x": jnp.asarray(x)})
    for i in (0, 17, 63):
        for bit in (0, 15, 31):
            flipped = x.view(np.uint32).copy()
            flipped[i] ^= np.uint32(1) << np.uint32(bit)
            assert describe({"x": jnp.asarray(flipped.view(np.float32))}) != before
    swapped = x[np.r_[1, 0, 2:64]]
    assert describe({"x": jnp.asarray(swapped)}) != before


def big_file(step_folder):
    return max((step_folder / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())


def damage(kind, folder):
    target = big_file(folder)
    content = target.read_bytes()
    if kind == "truncated":
        target.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        middle = len(content) // 2
        target.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    elif kind == "missing":
        shutil.rmtree(folder / "state")
    elif kind == "meta":
        (folder / "meta" / "metadata").write_text('{"arrays": {')


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "meta"])
def test_damage_is_named_with_the_step_that_remains(saved, kind, opened):
    damage(kind, saved / "2")
    saver = opened(saved)
    with pytest.raises(CheckpointError) as error:
        saver.restore(2, abstract(some_state()), Rows())
    assert str(saved / "2") in str(error.value)
    assert "Step 1 is intact: set train.resume_step=1" in str(error.value)
    jax.tree.map(
        np.testing.assert_array_equal, saver.restore(1, abstract(some_state())), some_state(1)
    )


def test_values_other_than_the_saved_ones_are_found(saved, opened):
    """Damage that the files' own checks do not see: here, the sum that was kept is another."""
    file = saved / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    meta["arrays"]["params/w"][2] += 1
    file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="values of params/w are not .*Step 1 is intact"):
        opened(saved).restore(2, abstract(some_state()), Rows())


def test_damage_everywhere_says_that_nothing_remains(saved, opened):
    for step in (1, 2):
        damage("truncated", saved / str(step))
    with pytest.raises(CheckpointError, match="No earlier checkpoint can be read"):
        opened(saved).restore(2, abstract(some_state()), Rows())


def test_another_model_is_named_by_its_first_array(saved, opened):
    wider = some_state() | {"params": {"w": jnp.zeros((16, 9)), "b": jnp.zeros(8, jnp.bfloat16)}}
    with pytest.raises(CheckpointError) as error:
        opened(saved).restore(2, abstract(wider))
    assert "params/w: [[16, 8], 'float32'] there, [[16, 9], 'float32'] here" in str(error.value)


def test_a_full_disk_is_foreseen(saved, monkeypatch, opened):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    saver = opened(saved)
    with pytest.raises(CheckpointError) as error:
        saver.save(3, some_state(3), Rows())
    assert "is full: the checkpoint of step 3 needs" in str(error.value)
    assert f"The last good checkpoint is {saved / '2'}" in str(error.value)
    assert saver.steps() == [1, 2]


def test_full_disk_is_recognised_through_its_causes():
    assert is_full_disk(OSError(errno.ENOSPC, "x")) and not is_full_disk(OSError(errno.EPERM, "x"))
    outer = RuntimeError("save failed")
    outer.__cause__ = ValueError("write: No space left on device")
    assert is_full_disk(outer) and not is_full_disk(None)


def test_a_save_under_way_is_not_called_good_before_it_is(opened, tmp_path):
    saver = opened(tmp_path / "ckpt", keep=3, config={})
    saver.save(1, some_state(), rows_at(1))
    saver.wait()
    large = {"w": jax.random.normal(jax.random.key(0), (2048, 2048))}
    saver.save(2, large, rows_at(2))
    told = saver.standing()
    good = max(int(p.name) for p in saver.directory.iterdir() if p.name.isdigit())
    assert f"The last good checkpoint is {saver.path(good)}:" in told


def test_small_arrays_that_devices_share_are_written_by_no_program(opened, tmp_path, caplog):
    """Not in slices, each of which a program would cut for each shape and device."""
    shared = NamedSharding(sharding.make_mesh(MeshConfig(data=8)), P())
    state = {"w": jax.device_put(np.ones((48, 7), np.float32), shared)}
    saver = opened(tmp_path / "ckpt")
    with jax.log_compiles():
        saver.save(1, state, rows_at(0))
        saver.wait()
    assert "_fingerprints" in caplog.text and "jit(slice)" not in caplog.text
