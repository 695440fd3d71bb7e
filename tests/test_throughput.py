"""FLOPs against counts by hand, peaks, waiting, memory, and a trace that can be opened."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
import toy
from toy import SHORT, run

from jaxsd.training.prefetch import Prefetch
from jaxsd.training.throughput import Meter, count_flops, peak_flops


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# --- FLOPs -----------------------------------------------------------------------------------


def linear(weight, x):
    return jnp.tanh(x @ weight.T).sum()


def test_a_linear_layer():
    """2 b i o; the gradient by weights once more, the gradient by inputs once more."""
    weight, x, once = zeros(7, 5), zeros(3, 5), 2 * 3 * 5 * 7
    assert count_flops(linear, weight, x) == once
    assert count_flops(jax.grad(linear), weight, x) == 2 * once
    assert count_flops(jax.grad(linear, (0, 1)), weight, x) == 3 * once


def test_a_batched_product():
    """Scores of attention: 2 b h q k d."""
    q, k = zeros(2, 3, 4, 8), zeros(2, 3, 6, 8)
    assert count_flops(lambda q, k: jnp.einsum("bhqd,bhkd->bhqk", q, k), q, k) == 2 * 6 * 24 * 8


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_convolution(stride, groups):
    """2 b h' w' k k i/g o, and as much for each of the two gradients, whatever the stride."""

    def conv(kernel, x):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.square(y).sum()

    kernel, x = zeros(6, 4 // groups, 3, 3), zeros(2, 8, 8, 4)
    once = 2 * 2 * (8 // stride) ** 2 * 9 * (4 // groups) * 6
    assert count_flops(conv, kernel, x) == once
    assert count_flops(jax.grad(conv), kernel, x) == 2 * once
    assert count_flops(jax.grad(conv, (0, 1)), kernel, x) == 3 * once


def test_loops_count_as_often_as_they_run():
    def scanned(weight, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ weight), None), x, length=11)[0].sum()

    weight, x, once = zeros(5, 5), zeros(3, 5), 2 * 3 * 5 * 5
    assert count_flops(scanned, weight, x) == 11 * once
    assert count_flops(jax.grad(scanned, (0, 1)), weight, x) == 3 * 11 * once
    assert count_flops(jax.jit(jax.vmap(scanned, (None, 0))), weight, zeros(4, 3, 5)) == 44 * once


def test_the_costliest_branch_counts():
    def either(weight, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ weight @ weight, lambda: x @ weight)

    assert count_flops(either, zeros(5, 5), zeros(3, 5)) == 2 * 2 * 3 * 5 * 5


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        *[("TPU v2", 22.5), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197)],
        *[("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918)],
        *[("TPU v6e", 918), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989)],
        *[("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA B200", 2250)],
        *[("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165)],
    ],
)
def test_peaks_are_known_by_the_names_that_jax_gives(kind, teraflops):
    assert peak_flops(kind) == teraflops * 1e12


def test_no_peak_is_made_up():
    assert peak_flops("cpu") is None and peak_flops("Radeon") is None


# --- The meter -------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("jaxsd.training.throughput.time.perf_counter", lambda: now[0])
    return now


def test_rates_are_of_the_steps_since_the_last_row_without_the_first(clock):
    flops = {2: 3e12, 4: 12e12}

    def flops_of(batch):
        clock[0] += 7 if batch is small else 0  # counting takes a while itself
        return flops[len(batch["x"])]

    meter = Meter(batch_size=8, flops_of=flops_of)
    small, large = {"x": jnp.zeros(2)}, {"x": jnp.zeros(4)}
    clock[0] += 60  # compilation
    meter.after(small, (), waited=50.0)  # for the very first batch
    for batch in (small, large, small):
        clock[0] += 1
        meter.after(batch, (), waited=50.25)
    with meter.aside():
        clock[0] += 1000
    clock[0] += 1
    row = meter.row(waited=50.5)
    assert row["images_per_second"] == 3 * 8 / 4
    assert row["images_per_second_per_device"] == 3 * 8 / 4 / 8  # devices
    assert row["tflops_per_device"] == pytest.approx((3 + 12 + 3) / 4 / 8)
    assert row["seconds_waiting"] == 0.5 and row["share_waiting"] == 0.125
    assert "share_of_peak" not in row  # of a CPU it isn't known
    clock[0] += 2
    meter.after(large, (), waited=51.5)
    row = meter.row(waited=51.5)
    assert row["images_per_second"] == 4 and row["share_waiting"] == 0.5


def test_the_share_of_the_peak_is_told_where_there_is_one(clock, monkeypatch):
    monkeypatch.setattr("jaxsd.training.throughput.peak_flops", lambda kind: 50e12)
    meter = Meter(batch_size=8, flops_of=lambda batch: 100e12)
    for _ in range(2):
        clock[0] += 1
        meter.after({"x": jnp.zeros(2)}, (), 0.0)
    assert meter.row(0.0)["share_of_peak"] == pytest.approx(100 / 8 / 50)


def test_memory_is_what_the_process_holds_where_devices_do_not_say():
    """In a process that holds little: by a shell, for it begins with the most of its maker."""
    code = (
        "import numpy as np; from jaxsd.training.throughput import memory_in_use as used;"
        "before = used(); held = np.ones(2**26); most = used(); del held;"
        "print(before, most, used())"
    )
    command = ["sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, most, after = map(float, done.stdout.split())
    assert 0.05 < before < 2 and most == after
    assert 0.45 < most - before < 0.55  # GiB; a half was held


def test_a_row_of_the_log_says_what_the_toy_costs(tmp_path):
    run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(0 <= row["share_waiting"] <= 1 for row in rows)
    # One product forward and one for its weights; see that the two columns agree
    flops = 2 * 2 * 8 * toy.SIZE * toy.SIZE
    for row in rows:
        steps = row["images_per_second"] / 8
        assert row["tflops_per_device"] * 1e12 * 8 == pytest.approx(flops * steps)
        assert row["images_per_second"] == pytest.approx(8 * row["images_per_second_per_device"])


def test_a_trace_of_some_steps_is_left(tmp_path):
    run(tmp_path, options=dataclasses.replace(SHORT, profile_steps=2, profile_start=3))
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


# --- Batches ahead ---------------------------------------------------------------------------


def test_batches_are_made_while_others_are_used():
    made = []

    def batches():
        for i in range(6):
            made.append(i)
            yield i

    ahead = Prefetch(batches(), place=lambda i: 10 * i, size=2)
    reader = iter(ahead)
    assert next(reader) == 0
    for _ in range(500):
        if len(made) == 4:  # one used, two ready, one in hand
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    assert list(reader) == [10, 20, 30, 40, 50]
    ahead.close()


def test_waiting_is_measured():
    def batches():
        for i in range(3):
            time.sleep(0.1)
            yield i

    ahead = Prefetch(batches(), place=lambda i: i)
    assert list(ahead) == [0, 1, 2]
    assert 0.25 < ahead.waited < 5
    ahead.close()

    ready = Prefetch(iter(range(3)), place=lambda i: i)
    for _ in ready:
        time.sleep(0.05)
    assert ready.waited < 0.05
    ready.close()


def test_what_goes_wrong_with_a_batch_is_raised_in_its_turn():
    def batches():
        yield 1
        raise InterruptedError("here")

    ahead = Prefetch(batches(), place=lambda i: i)
    reader = iter(ahead)
    assert next(reader) == 1
    with pytest.raises(InterruptedError, match="here"):
        next(reader)
    ahead.close()
    ahead = Prefetch(batches(), place=lambda i: i, give_up=lambda: True)
    assert list(ahead) == [1]
    ahead.close()


def test_an_endless_source_is_left_and_a_stuck_one_given_up():
    ahead = Prefetch(itertools.count(), place=lambda i: i)
    assert next(iter(ahead)) == 0
    ahead.close()
    assert not ahead._thread.is_alive()

    def stuck():
        yield 0
        time.sleep(3)

    ahead = Prefetch(stuck(), place=lambda i: i, give_up=lambda: True)
    begun = time.perf_counter()
    assert list(ahead) == [0]
    ahead.close()
    assert time.perf_counter() - begun < 2.5
