"""Our kernels on the workbench: loaded with a call, a function replaced, wrong and right, beside the shipped one."""

from __future__ import annotations

import numpy as np
import pytest

import cuflash
from cuflash import workbench
from cuflash.errors import ArgumentError, EmulatorError

RNG = np.random.default_rng(20260)


def arrays(*shapes: tuple[int, ...], dtype=np.float16) -> list[np.ndarray]:
    return [RNG.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.fixture(scope="module")
def base() -> workbench.Kernel:
    q, k, v = arrays((1, 70, 2, 32), (1, 200, 1, 32), (1, 200, 1, 32))
    return workbench.load("forward_sm80", q, k, v, aux=("lse", "max_logit"))


def test_the_shipped_kernel_is_right_and_answers_as_attention_does(base: workbench.Kernel) -> None:
    check = base.check()
    assert check and [x.name for x in check.results] == ["out", "lse", "max_logit"]
    given = [base.problem.arrays[n] for n in "qkv"]
    ours, shipped = base.run(), cuflash.attention(*given, aux=("lse", "max_logit"))
    assert type(ours) is type(shipped)
    np.testing.assert_allclose(ours.lse, shipped.lse, atol=1e-5)


def test_a_wrong_softmax_is_found_and_its_element_named(base: workbench.Kernel) -> None:
    """O is not rescaled where a tile raises the maximum: only rows of which a later tile does are wrong."""
    before = base.function("OnlineSoftmax::update")
    wrong = base.replace_function("OnlineSoftmax::update", before.replace("x *= rescale[row];", ""))
    check = wrong.check()
    assert not check
    worst = check.worst
    assert worst.name == "out" and 0 < worst.wrong < worst.count and worst.error > worst.allowed
    b, i, h, d = worst.index
    assert worst.where == f"sequence {b}, row {i}, head {h}, column {d}"
    assert worst.got == wrong.run().out[worst.index]
    lse = next(x for x in check.results if x.name == "lse")
    assert lse.wrong == 0  # l is right


def test_a_header_is_replaced_and_its_faults_reported_by_its_lines(base: workbench.Kernel) -> None:
    """The lanes of a quad disagree whether to look at each other's maxima."""
    whole = base.text("tile/softmax.cuh")
    old = "maximum[i] = quad_max(tile_maximum[i]);"
    new = f"if (tile_maximum[i] > maximum[i]) {old}"
    broken = base.replace("tile/softmax.cuh", whole.replace(old, new))
    with pytest.raises(EmulatorError) as raised:
        broken.check()
    report = str(raised.value)
    assert report.startswith("divergence: ")
    # The report names where lanes are, one of them in a helper; and shows a line of the changed file.
    vote = "if (hw::any(far)) "
    line = whole[: whole.index(vote)].count("\n") + 1
    assert "at shfl_xor (tile/fragment.cuh:" in report
    assert f"is at any (tile/softmax.cuh:{line})" in report and f"  > {line:4d} |     {vote}" in report
    assert new not in base.text("tile/softmax.cuh")


def test_counters_tell_a_cheaper_softmax_from_a_dearer(base: workbench.Kernel) -> None:
    """The sum over the quad after every tile, and not once at the end: the same result, more exchanges."""
    dear = base.edit("tile/softmax.cuh", "      sum[row] += x;\n    });", "      sum[row] += x;\n    });\n" + QUAD_SUM)
    dear = dear.edit("tile/softmax.cuh", "quad_sum(sum[row]), scale, sink)", "sum[row], scale, sink)")
    assert dear.check()
    found = dear.diff(base)
    before, after = found.counters["shfl_xor"]
    assert after > 1.5 * before
    assert found.counters["mma_m16n8k16_f16"][0] == found.counters["mma_m16n8k16_f16"][1]
    assert "sum[row], scale, sink)" in found.text


QUAD_SUM = """
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) {
      // `sum` is of all columns here: what this tile adds is summed over the quad now.
      float all = 0.0f;
      s.for_each([&](float& x, i32 row, i32) { all += row == i ? x : 0.0f; });
      sum[i] += quad_sum(all) - all;
    }
"""


def test_a_score_mod_of_a_cell(base: workbench.Kernel) -> None:
    """`Mods::score`, which a call's score_mod was traced to, written by hand."""
    q, k, v = (base.problem.arrays[n] for n in "qkv")
    slope = np.float32(0.25)
    kernel = workbench.load("forward_sm80", q, k, v, score_mod=lambda s, b, h, i, j: s - slope * (i - j))
    assert kernel.check()
    text = kernel.function("Mods::score")
    assert "score" in text
    flat = kernel.replace_function("Mods::score", text[: text.index("{")] + "{ return s; }")
    np.testing.assert_allclose(flat.run(), base.run().out, atol=2e-3)


def test_packed_sequences_are_named_by_number_and_row() -> None:
    (x,) = arrays((50, 1, 32))
    starts = np.array([0, 20, 50], np.int32)
    kernel = workbench.load("forward_sm80", x, x, x, cu_seqlens_q=starts, cu_seqlens_k=starts)
    assert kernel.check()
    assert kernel._where("out", (27, 0, 5)) == "sequence 1, row 7, head 0, column 5"
    assert kernel._where("lse", (0, 3)) == "sequence 0, row 3, head 0"


def test_the_backward_runs_with_all_its_kernels() -> None:
    q, k, dout = arrays((1, 40, 1, 32), (1, 70, 1, 32), (1, 40, 1, 32))
    kernel = workbench.load("backward_sm80", q, k, k, dout=dout, causal=True)
    assert len(kernel.specs) > 1
    check = kernel.check()
    assert check and [x.name for x in check.results] == ["dq", "dk", "dv"], check
    assert kernel.run().dk.shape == k.shape
    assert workbench.timeline(kernel.trace()).kernel == "backward_sm80"  # of three launches, the one with most to see


def test_the_kernel_for_hopper_and_that_for_few_queries() -> None:
    q, k = arrays((1, 130, 1, 64), (1, 200, 1, 64))
    hopper = workbench.load("forward_sm90", q, k, k, causal=True)
    assert hopper.problem.arch == "sm_90a" and hopper.check()
    assert any(name.startswith("wgmma") for name in hopper.counters().matrix_instructions)
    backward = workbench.load("backward_sm90", q, k, k, dout=q, causal=True)
    assert backward.problem.arch == "sm_90a" and backward.check()
    assert any(name.startswith("wgmma") for name in backward.counters().matrix_instructions)
    decode = workbench.load("decode_sm80", q[:, :1], k, k, split_size=64)
    assert [spec.name for spec in decode.specs] == ["decode_sm80", "combine"] and decode.check()
    # An edit of a file that both include is in both.
    both = decode.edit("base.cuh", "constexpr float kLn2", "constexpr float kLn2Times2 = 1.5f;\nconstexpr float kLn2")
    assert all("kLn2Times2" in workbench.jobs.edited(s, both._edits, "decode_sm80.cu").text("emu") for s in both.specs)
    assert both.check()
    # One of the Variant is of the kernel that is looked at: others have one of their own.
    alone = decode.edit("variant.cuh", "struct Variant {", "struct Variant {\n  static constexpr int kMine = 1;")
    texts = [workbench.jobs.edited(s, alone._edits, "decode_sm80.cu").text("emu") for s in alone.specs]
    assert ["kMine" in text for text in texts] == [True, False]


def test_captured_arrays_and_frameworks() -> None:
    torch = pytest.importorskip("torch")
    q, k = (torch.from_numpy(x).to(torch.bfloat16) for x in arrays((1, 30, 2, 32), (1, 40, 2, 32)))
    bias = torch.tensor([0.5, -1.0])
    kernel = workbench.load("forward_sm80", q, k, k, score_mod=lambda s, b, h, i, j: s + bias[h] * (i - j))
    assert kernel.check()
    out = kernel.run()
    assert out.dtype == torch.bfloat16 and out.shape == q.shape


@pytest.mark.parametrize(
    ("name", "keywords", "says"),
    [
        ("decode_sm80", {}, "does not run 'decode_sm80' on sm_80; it runs forward_sm80"),
        ("backward_sm80", {}, "pass dout="),
        ("forward_sm80", {"dout": np.zeros((1, 4, 1, 32), np.float16)}, "leave out dout="),
        ("forward_sm80", {"out": np.zeros((1, 4, 1, 32), np.float16)}, "out= is not taken"),
        ("forward_sm80", {"window_size": (-5, 0)}, "window_size"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(name: str, keywords: dict, says: str) -> None:
    x = np.zeros((1, 4, 1, 32), np.float16)
    with pytest.raises(ArgumentError, match=says):
        workbench.load(name, x, x, x, **keywords)


def test_tiles_are_numbers_of_the_variant(base: workbench.Kernel) -> None:
    """Keys come in tiles of 32, and not of 64, where `variant.cuh` says so: more meetings, the same result."""
    small = base.edit("variant.cuh", "kBlockK = 64", "kBlockK = 32")
    assert small.check() and small.counters().barriers > base.counters().barriers


@pytest.mark.gpu
def test_a_version_runs_on_a_gpu(base: workbench.Kernel) -> None:
    assert base.on("cuda").check()
    assert base.edit("tile/softmax.cuh", "sum[row] += x;", "sum[row] += x + 0.0f;").on("cuda").check()
    assert base.bench(repeats=5).median > 0


def test_what_is_nearly_named_is_told(base: workbench.Kernel) -> None:
    with pytest.raises(ArgumentError, match=r"there is OnlineSoftmax::update \(tile/softmax.cuh\)"):
        base.function("Softmax::update")
    with pytest.raises(ArgumentError, match=r"take 'tile/softmax\.cuh'"):
        base.replace("softmax.cuh", "")


def test_bind_is_for_kernels_of_ones_own(base: workbench.Kernel) -> None:
    with pytest.raises(ArgumentError, match="load forward_sm80 again"):
        base.bind(grid=1)
