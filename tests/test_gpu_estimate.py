"""The estimator of programs for NVIDIA GPUs, on texts small enough to count by hand."""

import gpu_estimate
import pytest
from gpu_estimate import BETWEEN, GPUS, GpuProgram

H200 = GPUS["h200"]
WINDOW = "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f"
PROGRAM = f"""HloModule small, is_scheduled=true

%product (a: bf16[256,128], w: bf16[128,512]) -> bf16[256,512] {{
  %a = bf16[256,128]{{1,0}} parameter(0)
  %w = bf16[128,512]{{1,0}} parameter(1)
  ROOT %dot = bf16[256,512]{{1,0}} dot(%a, %w), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}
}}

%pixel (all: bf16[2,8,8,4]) -> f32[2,1,1,4] {{
  %all = bf16[2,8,8,4]{{3,2,1,0}} parameter(0)
  %wide = f32[2,8,8,4]{{3,2,1,0}} convert(%all)
  ROOT %first = f32[2,1,1,4]{{3,2,1,0}} slice(%wide), slice={{[0:2], [0:1], [0:1], [0:4]}}
}}

ENTRY %main (x: bf16[2,8,8,4], k: bf16[6,3,3,4], q: bf16[2,64,3,16], s: bf16[2,77,3,16]) -> () {{
  %x = bf16[2,8,8,4]{{3,2,1,0}} parameter(0)
  %k = bf16[6,3,3,4]{{3,2,1,0}} parameter(1)
  %q = bf16[2,64,3,16]{{3,2,1,0}} parameter(2)
  %s = bf16[2,77,3,16]{{3,2,1,0}} parameter(3)
  %y = (bf16[2,8,8,6]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %k), {WINDOW}, \
custom_call_target="__cudnn$convForward"
  %out = bf16[2,8,8,6]{{3,2,1,0}} get-tuple-element(%y), index=0
  %dk = (bf16[6,3,3,4]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %out), {WINDOW}, \
custom_call_target="__cudnn$convBackwardFilter"
  %dx = (bf16[2,8,8,4]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%out, %k), {WINDOW}, \
custom_call_target="__cudnn$convBackwardInput"
  %read = (bf16[2,3,64,16]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %s, %s), \
custom_call_target="__cudnn$fmhaSoftmax"
  %unread = (bf16[2,3,64,16]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %s, %s, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %p = bf16[256,128]{{1,0}} parameter(4)
  %r = bf16[128,512]{{1,0}} parameter(5)
  %fused = bf16[256,512]{{1,0}} fusion(%p, %r), kind=kCustom, calls=%product
  %blas = (bf16[256,512]{{1,0}}, s8[64]{{0}}) custom-call(%p, %r), \
custom_call_target="__cublas$gemm", backend_config={{"gemm_backend_config":\
{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}}}}
  %corner = f32[2,1,1,4]{{3,2,1,0}} fusion(%x), kind=kLoop, calls=%pixel
  ROOT %again = bf16[256,512]{{1,0}} copy(%fused)
}}
"""


def rows(**blocks):
    return {row.name: row for row in GpuProgram(PROGRAM, H200, blocks).rows}


def test_flop_and_kind():
    found = rows()
    met = 2 * 2 * (3 * 8 - 2) ** 2 * 4 * 6  # pairs of an output and a weight that meet an input
    assert [found[name].flops for name in ("y", "dk", "dx")] == [met] * 3
    assert found["read"].flops == 2 * 2 * (2 * 3 * 64 * 77 * 16)
    assert found["unread"].flops == 5 * 2 * (2 * 3 * 64 * 77 * 16)
    assert found["fused"].flops == found["blas"].flops == 2 * 256 * 128 * 512
    kinds = {name: row.kind for name, row in found.items()}
    assert kinds == {
        **dict.fromkeys(("y", "dk", "dx"), "convolution"),
        **dict.fromkeys(("read", "unread"), "attention"),
        **dict.fromkeys(("fused", "blas"), "product"),
        **dict.fromkeys(("corner", "again"), "other"),
    }


def test_bytes_are_those_that_are_read():
    found = rows()
    assert found["again"].bytes == 2 * 2 * 256 * 512
    assert found["blas"].bytes == 2 * (256 * 128 + 128 * 512 + 256 * 512)  # without room to work in
    assert found["corner"].bytes == 2 * 4 * 2 * 4  # one pixel, in float32: not the picture


def test_few_blocks_have_their_share_of_the_bandwidth():
    whole = 4 * 256 * 512 / H200.bandwidth
    assert rows()["again"].seconds == pytest.approx(whole + BETWEEN)
    assert rows(again=1000)["again"].seconds == pytest.approx(whole + BETWEEN)
    assert rows(again=33)["again"].seconds == pytest.approx(4 * whole + BETWEEN)


def test_collectives_that_kernels_hide():
    gather = "(f32[8,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%p), dimensions={0}"
    text = "\n".join(
        (
            "ENTRY %main (p: f32[8,16]) -> f32[64,16] {",
            "  %p = f32[8,16]{1,0} parameter(0)",
            f"  %first = {gather}",
            "  %work = f32[8,16]{1,0} fusion(%p), kind=kLoop, calls=%twice",
            "  %one = f32[64,16]{1,0} all-gather-done(%first)",
            f"  %second = {gather}",
            "  %two = f32[64,16]{1,0} all-gather-done(%second)",
            "  %sum = f32[8,16]{1,0} all-reduce-start(%work), to_apply=%add",
            "  ROOT %total = f32[8,16]{1,0} all-reduce-done(%sum)",
            "}",
        )
    )
    found = gpu_estimate.collectives(text)
    assert found["all-gather"] == [(4 * 64 * 16, True), (4 * 64 * 16, False)]
    assert found["all-reduce"] == [(4 * 8 * 16, False)]


def test_grids_are_found_by_instruction(tmp_path):
    """One kernel serves several instructions: its name does not tell which."""
    tmp_path.joinpath("module_1.jit_f.thunk_sequence.txt").write_text(
        "000: kCommandBuffer [source | sink]\n"
        "    001: kCustomKernel [source] fusion_1 grid: [6, 1, 1] threads: [1024, 1, 1] bytes\n"
        "    002: kConvolution [prev=001] kConvolution\n"
        "    003: kCustomKernel [prev=002] fusion_1 grid: [3, 4, 1] threads: [1024, 1, 1] bytes\n"
    )
    tmp_path.joinpath("module_1.jit_f.thunk_metadata.txt").write_text(
        "".join(
            f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n'
            f"    thunk_id: {number}\n  }}\n}}\n"
            for number, name in ((1, "fusion.1"), (2, "conv.5"), (3, "fusion.2"))
        )
    )
    assert gpu_estimate.grids(tmp_path) == {"fusion.1": 6, "fusion.2": 12}


def test_what_the_compiler_is_told_of_a_gpu():
    text = H200.description()
    assert 'device_description_str: "NVIDIA H200"' in text
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text
    assert "shared_memory_per_block_optin: 232448" in text  # 227 KiB
