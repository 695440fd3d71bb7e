"""The estimator of programs for TPUs, on texts small enough to count by hand."""

import jax
import jax.numpy as jnp
import pytest
import tpu_bundles as bundles
import tpu_estimate as estimate

PROGRAM = """HloModule small, is_scheduled=true, num_partitions=4

%product (a: bf16[256,128], w: bf16[128,512]) -> bf16[256,512] {
  %a = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = bf16[256,512]{1,0} convolution(%a, %w), dim_labels=bf_io->bf
}

%body (b: (s32[], f32[40,100])) -> (s32[], f32[40,100]) {
  %b = (s32[], f32[40,100]{1,0:T(8,128)}) parameter(0)
  %x = f32[40,100]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %twice = f32[40,100]{1,0:T(8,128)} add(%x, %x)
  %sum = f32[40,100]{1,0:T(8,128)} all-reduce(%twice), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %back = (s32[], f32[40,100]{1,0:T(8,128)}) tuple(%i, %sum)
}

%condition (c: (s32[], f32[40,100])) -> pred[] {
  %c = (s32[], f32[40,100]{1,0:T(8,128)}) parameter(0)
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p: bf16[256,128], q: bf16[128,512], r: f32[40,100]) -> bf16[256,512] {
  %p = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %fusion.1 = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%p, %q), kind=kOutput, calls=%product, \
backend_config={"window_config":{"iteration_bounds":["2","3"]},"estimated_cycles":"3000"}
  %gathered = (bf16[64,8]{1,0}, bf16[256,8]{1,0}) all-gather-start(%s), dimensions={0}
  %done = bf16[256,8]{1,0:T(8,128)} all-gather-done(%gathered)
  %picture = f32[1,8,8,2]{3,2,1,0} convolution(%u, %k), window={size=3x3 pad=1_1x1_1}, \
dim_labels=b01f_01io->b01f, backend_config={"estimated_cycles":"1500"}
  %loop = (s32[], f32[40,100]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[256,512]{1,0:T(8,128)(2,1)} copy(%fusion.1)
}
""".replace(
    "  %picture", "  %u = f32[1,8,8,4] parameter(3)\n  %k = f32[3,3,4,2] parameter(4)\n  %picture"
)


CHIP = estimate.CHIPS["v5e"]


def rows(**options):
    return {row.name: row for row in estimate.Program(PROGRAM, CHIP, **options).rows}


def test_flop_bytes_and_cycles():
    found = rows()
    product = found["fusion.1"]
    assert product.flops == 2 * 256 * 128 * 512
    assert product.bytes == 2 * 256 * 128 + 2 * 256 * 512  # q is in vector memory
    assert product.seconds == pytest.approx(3000 / 1.5e9)
    assert found["out"].bytes == 2 * 2 * 256 * 512
    assert found["out"].seconds == pytest.approx(4 * 256 * 512 / 819e9)  # roofline


def test_what_pads_a_convolution_is_no_arithmetic():
    meeting = (3 * 8 - 2) ** 2  # pairs of an output and a weight that meet an input
    assert rows()["picture"].flops == 2 * meeting * 4 * 2


def test_a_loop_counts_as_often_as_it_runs():
    twice = rows()["twice"]
    assert twice.count == 7
    padded = 4 * 40 * 128
    assert twice.bytes == 3 * padded  # what is added to itself is read twice
    total = estimate.Program(PROGRAM, CHIP).seconds
    apart = 3000 / 1.5e9 + 1500 / 1.5e9 + (4 * 256 * 512 + 7 * 3 * padded) / 819e9
    assert total == pytest.approx(apart)


def test_bytes_of_collectives():
    found = estimate.collectives(PROGRAM)
    assert found["all-reduce"] == [(4 * 40 * 100, False)]
    assert [sent.bytes for sent in found["all-gather"]] == [2 * 256 * 8]


def test_a_collective_beside_products_is_counted_once():
    """Its steps are in computations of their own: the same instruction on the same channel."""
    gather = "  %all-gather.{} = bf16[16,8]{{1,0}} all-gather(%x), channel_id={}, dimensions={{0}}"
    begun = f"%fused_computation.1 (x: bf16[1,8]) -> bf16[16,8] {{\n{gather.format(1, 7)}\n}}"
    goes_on = f"%async_collective_fusion.2 (x: bf16[1,8]) -> u32[] {{\n{gather.format(2, 7)}\n}}"
    entry = "ENTRY %main (x: bf16[1,8]) -> bf16[16,8] {"
    text = "\n".join((begun, goes_on, entry, gather.format(3, 8), gather.format(4, 8), "}"))
    found = estimate.collectives(text)["all-gather"]
    assert found == [(2 * 16 * 8, True)] + [(2 * 16 * 8, False)] * 2


def test_bundles_take_the_place_of_cycles():
    counted = estimate.Bundles(always=9000, seldom=600, rounds=4)
    seconds = rows(bundles={"fusion.1": counted})["fusion.1"].seconds
    busy, memory = (9000 + 600 / 3) / 1.5e9, (2 * 256 * 128 + 2 * 256 * 512) / 819e9
    assert seconds == pytest.approx(max(busy, memory) + min(busy, memory) / 4)


BUNDLES = """
     0   :  { %1 = vld [vmem:[%a]] }
   0x1   : > { %2 = vadd.f32 %1, %1 }
   0x2   : >> { %3 = vmul.f32 %2, %2 }
   0x3   : >> { %4 = scmp.ge.s32.totalorder %i, 5 /* loop exit test */ }
   0x4   :  {}
   0x5   : > { %5 = scmp.ge.s32.totalorder %j, 3 /* loop exit test */ }
   0x6   :  { %6 = vst [vmem:[%b]], %3 }
"""


def test_bundles_of_nested_loops():
    # One before and one after; three times: two and, five times, two and an empty one.
    # The outer loop's rounds are less the two that fill and drain a pipeline.
    assert bundles.count(BUNDLES) == (1 + 3 * (2 + 5 * 3) + 1, 0, 1)


NEIGHBOURS = """
     0   :  { %1 = vld [vmem:[%a]] }
   0x1   : > { %2 = vadd.f32 %1, %1 }
   0x2   : > { %3 = scmp.ge.s32.totalorder %i, 20 /* loop exit test */ }
   0x3   :  { %4 = snop 0 }
   0x4   : > { %5 = sbr.rel (!%3) target bundleno = 1 (0x1), region = 5 }
   0x5   : > { %6 = vadd.f32 %1, %1 }
   0x6   : > { %7 = scmp.ge.s32.totalorder %j, 4 /* loop exit test */ }
   0x7   : > { %8 = sbr.rel (!%7) target bundleno = 5 (0x5), region = 6 }
   0x8   :  { %9 = vst [vmem:[%b]], %6 }
"""


def test_bundles_of_loops_that_follow_each_other():
    # Four of the first, one of which came from outside and keeps its mark; three of the second.
    assert bundles.count(NEIGHBOURS)[:2] == (1 + 20 * 4 + 4 * 3 + 1, 0)


def test_what_kernels_do_in_one_step_of_the_grid_counts_once():
    kernel = "  %kernel = f32[8,128]{1,0:T(8,128)} custom-call()\n  ROOT %out"
    counted = estimate.Bundles(always=9000, seldom=600, rounds=4)
    program = estimate.Program(PROGRAM.replace("  ROOT %out", kernel), CHIP, {"kernel": counted})
    row = next(row for row in program.rows if row.name == "kernel")
    memory = 8 * 128 * 4 / 819e9
    assert row.seconds == pytest.approx((9000 + 600 / 4) / 1.5e9 + memory / 4)


def test_a_program_compiled_for_a_chip_is_understood(tpus):
    where = jax.sharding.SingleDeviceSharding(tpus("v5e:2x2")[0])
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=where)
    text = jax.jit(jnp.dot).lower(x, x).compile().as_text()
    program = estimate.Program(text, CHIP)
    assert program.flops == 2 * 1024**3
    assert 1 <= program.seconds * CHIP.flops / program.flops < 4
