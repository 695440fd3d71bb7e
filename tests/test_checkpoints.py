"""A checkpoint is found whole or not at all, and a finished one is never lost."""

import contextlib
import logging
import resource
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_pipeline import compilations

from jaxsd.checkpoints import Checkpoints, Keep, restore_params
from jaxsd.checksums import write_checksums
from jaxsd.errors import JaxsdError

KEEP = Keep()


class State(NamedTuple):
    step: jax.Array
    params: dict[str, jax.Array]
    ema: dict[str, jax.Array]
    opt_state: Any


def state_of(step: int, size: int = 8) -> State:
    rng = np.random.default_rng(step)
    params, ema, moment = (
        {
            name: jnp.asarray(rng.standard_normal((size, size), np.float32))
            for name in ("a.weight", "b")
        }
        for _ in range(3)
    )
    return State(jnp.int32(step), params, ema, (jnp.int32(step), {"mu": moment}, ()))


@contextlib.contextmanager
def opened(folder, keep=KEEP):
    checkpoints = Checkpoints(folder, keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save(folder, *steps, keep=KEEP, metrics=None):
    with opened(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), metrics(step) if metrics else None)


def kept(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_restores(folder, step):
    with opened(folder) as checkpoints:
        assert checkpoints.latest == step
        assert_same(checkpoints.restore(state_of(0)), state_of(step))


# --- What is there ---------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cut", [(24, False), (8 << 10, True)])
def test_devices_share_in_writing_large_arrays_alone(rows, cut, tmp_path):
    """For each piece of an array a program runs: of small ones these took most of a save."""
    everywhere = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec())
    state = jax.device_put(state_of(1)._replace(params={"w": jnp.ones((rows, 259))}), everywhere)
    with opened(tmp_path / "c") as checkpoints:
        with compilations() as programs:
            checkpoints.save(1, state)
        assert bool(programs) == cut
        checkpoints.wait()
        assert_same(checkpoints.restore(state), state)


def test_what_was_saved_as_orbax_saves_by_itself_is_read(tmp_path):
    """As checkpoints were written before small arrays were left whole."""
    everywhere = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec())
    state = jax.device_put(state_of(3), everywhere)
    items = state._asdict() | {"counters": {"step": state.step}}
    del items["step"]
    saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(**saved))
    write_checksums(tmp_path / "3", ignored=("_CHECKPOINT_METADATA",))
    assert_restores(tmp_path, 3)
    assert_same(restore_params(tmp_path), state.ema)


def test_the_newest_state_comes_back_bit_for_bit(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest is None and checkpoints.restore(state_of(0)) is None
    save(tmp_path, 3, 7)
    assert_restores(tmp_path, 7)
    assert {"params", "ema", "opt_state", "counters"} <= {
        p.name for p in (tmp_path / "7").iterdir()
    }


def test_shapes_are_enough_to_restore_and_say_where(tmp_path):
    """Saved by four devices, a quarter each; restored on two, split the other way."""
    four, two = (jax.make_mesh((n,), ("x",), devices=jax.devices()[:n]) for n in (4, 2))
    state = jax.device_put(state_of(5), NamedSharding(four, PartitionSpec()))
    rows = NamedSharding(four, PartitionSpec("x"))
    state = state._replace(params=jax.device_put(state.params, rows))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, state)
    columns = NamedSharding(two, PartitionSpec(None, "x"))

    def like(array):
        where = columns if array.ndim == 2 else NamedSharding(two, PartitionSpec())
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    with opened(tmp_path) as checkpoints:
        restored = checkpoints.restore(jax.tree.map(like, state))
    assert_same(restored, state_of(5))
    assert restored.params["b"].sharding == columns
    assert restored.params["b"].addressable_shards[0].data.shape == (8, 4)


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_parameters_alone_are_restored_without_knowing_the_rest(tmp_path, place):
    folder = tmp_path / "checkpoints"
    save(folder, 3, 7)
    assert_same(restore_params(tmp_path / place), state_of(7).ema)
    assert_same(restore_params(tmp_path / place, step=3, which="params"), state_of(3).params)
    half = restore_params(tmp_path / place, dtype="bfloat16")
    assert half["b"].dtype == jnp.bfloat16
    where = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
    split = restore_params(tmp_path / place, sharding=where)
    assert split["b"].sharding == where
    assert_same(split, state_of(7).ema)


def test_parameters_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(JaxsdError, match="has no checkpoint; there is none"):
        restore_params(tmp_path)
    save(tmp_path, 3, 7)
    with pytest.raises(JaxsdError, match="no checkpoint of step 5; there are 3, 7"):
        restore_params(tmp_path, step=5)
    with pytest.raises(JaxsdError, match="has no 'emma'; write 'ema' or 'params'"):
        restore_params(tmp_path, which="emma")
    (tmp_path / "7" / "ema" / "manifest.ocdbt").unlink()
    with pytest.raises(JaxsdError, match=r"7 is damaged \(ema/manifest.ocdbt: .*there are 3, 7"):
        restore_params(tmp_path)


def test_a_state_of_another_training_is_refused_and_stays(tmp_path):
    save(tmp_path, 3)
    with opened(tmp_path) as checkpoints:
        for like in (state_of(0, size=4), state_of(0)._replace(opt_state={"nu": jnp.zeros(2)})):
            with pytest.raises(JaxsdError, match="3 is no state of this training") as caught:
                checkpoints.restore(like)
            assert "\n" not in str(caught.value)
    assert_restores(tmp_path, 3)


# --- What stays ------------------------------------------------------------------------------


def test_the_newest_are_kept_across_starts(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    assert kept(tmp_path) == [3, 4]
    save(tmp_path, 5)
    assert kept(tmp_path) == [4, 5]
    save(tmp_path, 6, 7, 8, keep=Keep(newest=1))
    assert kept(tmp_path) == [8]


def test_every_nth_stays(tmp_path):
    save(tmp_path, *range(2, 15, 2), keep=Keep(newest=2, every=4))
    assert kept(tmp_path) == [4, 8, 12, 14]


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 1.5, 6: None, 7: 5.0}


@pytest.mark.parametrize("highest, best", [(False, 2), (True, 7)])
def test_the_best_is_kept_beside_the_newest(tmp_path, highest, best):
    def metrics(step):
        return {"other": 0.0} | ({} if LOSSES[step] is None else {"eval/loss": LOSSES[step]})

    keep = Keep(newest=1, best="eval/loss", highest=highest)
    for part in (range(1, 4), range(4, 8)):  # the best is known on resuming too
        save(tmp_path, *part, keep=keep, metrics=metrics)
    assert kept(tmp_path) == sorted({best, 7})


def test_a_finished_checkpoint_is_not_written_again(tmp_path):
    save(tmp_path, 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state_of(4))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@contextlib.contextmanager
def no_file_above(size):
    """As on a full disk, the system refuses to write on; here beyond `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("noticed", ["wait", "save", "check", "close"])
def test_a_save_that_fails_is_one_line_and_costs_nothing(tmp_path, noticed):
    size = 512
    checkpoints = Checkpoints(tmp_path, Keep(newest=1))
    checkpoints.save(3, state_of(3, size))
    checkpoints.wait()
    with pytest.raises(
        JaxsdError, match=r"cannot save step 7 in .*: File too large; .*step 3 is complete"
    ) as caught:
        with no_file_above(size * size):
            checkpoints.save(7, state_of(7, size))
            if noticed == "check":
                while True:  # until the thread is done
                    checkpoints.check()
            getattr(checkpoints, noticed)(*((8, state_of(8, size)) if noticed == "save" else ()))
    assert "\n" not in str(caught.value)
    with contextlib.suppress(JaxsdError):
        checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    with opened(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(state_of(0, size)), state_of(3, size))


def test_what_is_hidden_of_failed_saves_is_hidden_no_longer_than_that(tmp_path):
    def set_up():
        return sys.unraisablehook, [*logging.getLogger("absl").filters]

    before = set_up()
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state_of(3))
        assert set_up() != before
    assert set_up() == before


# --- Damage ----------------------------------------------------------------------------------


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder):
    file = largest(folder / "params")
    file.write_bytes(file.read_bytes()[:-7])


def remove(folder):
    largest(folder / "opt_state").unlink()


def flip(folder):
    file = largest(folder / "ema")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


DAMAGES = [truncate, remove, flip, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path, damage, capsys):
    save(tmp_path, 3, 7)
    damage(tmp_path / "7")
    files = [path.relative_to(tmp_path / "7") for path in (tmp_path / "7").rglob("*")]
    assert_restores(tmp_path, 3)
    [line] = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / '7'} is damaged" in line and "step 3 is used" in line
    aside = tmp_path / "damaged" / "7"  # and nothing of it is lost
    assert [path.relative_to(aside) for path in aside.rglob("*")] == files
    save(tmp_path, 7)
    assert_restores(tmp_path, 7)
    damage(tmp_path / "7")
    assert_restores(tmp_path, 3)
    assert sorted(path.name for path in aside.parent.iterdir()) == ["7", "7_"]


def test_every_damaged_one_is_named_and_an_older_one_found(tmp_path, capsys):
    save(tmp_path, 3, 7, 9, keep=Keep(newest=3))
    flip(tmp_path / "9")
    truncate(tmp_path / "7")
    assert_restores(tmp_path, 3)
    nine, seven = capsys.readouterr().err.splitlines()
    assert "other bytes" in nine and "bytes)" in seven and "of" in seven


def test_if_all_are_damaged_nothing_is_touched(tmp_path):
    save(tmp_path, 3, 7)
    remove(tmp_path / "3"), truncate(tmp_path / "7")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(JaxsdError, match=r"all checkpoints in .*step 7: .*step 3: ") as caught:
        Checkpoints(tmp_path)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_was_cut_off_is_not_there(tmp_path):
    save(tmp_path, 3)
    torn = tmp_path / "6.orbax-checkpoint-tmp"
    (torn / "params").mkdir(parents=True)
    (torn / "params" / "manifest.ocdbt").write_bytes(b"\0")
    save(tmp_path, 6)
    assert not torn.exists()
    assert_restores(tmp_path, 6)
