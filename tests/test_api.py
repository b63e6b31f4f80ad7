"""The public face: names, drop-in functions, explain, supports, warmup."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest
from backends import using
from compare import check_forward
from needs import needs_nvrtc

import cuflash
from cuflash import dtypes, questions
from cuflash.call import bind
from cuflash.errors import ArgumentError, KeywordError, UnsupportedError


def test_public_names():
    assert set(cuflash.__all__) <= set(dir(cuflash))
    for name in cuflash.__all__:
        assert getattr(cuflash, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(cuflash, "nothing")  # noqa: B009


def test_importing_is_light():
    """No framework, no command line, nothing of CUDA: `import cuflash` is for laptops as well."""
    code = (
        "import sys, cuflash; print([m for m in ('torch', 'jax', 'cupy', 'cuda', 'rich', 'typer') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_signature_is_the_contract():
    parameters = inspect.signature(cuflash.attention).parameters
    assert (
        list(parameters)
        == (
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k page_table scale causal "
            "window_size softcap alibi_slopes sink score_mod mask_mod block_mask dropout_p seed offset deterministic "
            "split_size kernel_options out aux"
        ).split()
    )
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in "qkv")
    defaults = {name: p.default for name, p in parameters.items() if name not in "qkv"}
    given = {"causal": False, "window_size": (-1, -1), "softcap": 0.0, "dropout_p": 0.0, "offset": 0,
             "deterministic": False, "aux": ()}  # fmt: skip
    assert defaults == {name: given.get(name) for name in defaults}


def test_backward_takes_the_arguments_of_the_forward():
    forward = list(inspect.signature(cuflash.attention).parameters.values())
    parameters = inspect.signature(cuflash.attention_backward).parameters
    arrays, keywords = "dout q k v out lse", [p for p in forward if p.name not in ("q", "k", "v", "out", "aux")]
    assert " ".join(p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY) == arrays
    assert [parameters[p.name] for p in keywords] == keywords, "names, kinds, defaults and types"
    assert list(parameters)[6 + len(keywords) :] == ["dlse", "captured_grads", "dq", "dk", "dv"]
    assert cuflash.AttentionGrads._fields == ("dq", "dk", "dv", "dsink", "dcaptured")


def test_result_depends_on_aux_alone(rng):
    q = rng.standard_normal((1, 4, 2, 32)).astype(np.float16)
    assert isinstance(cuflash.attention(q, q, q), np.ndarray)
    result = cuflash.attention(q, q, q, aux=["max_logit"])
    assert isinstance(result, cuflash.AttentionOutput)
    assert result.lse is None and result.dropout_mask is None and result.max_logit.shape == (1, 2, 4)
    assert cuflash.AttentionOutput._fields == ("out", "lse", "max_logit", "dropout_mask")


@pytest.mark.parametrize("window", [(-1, -1), (None, None), [-1, -1], (10**12, 10**12)])
def test_spellings_of_no_window(window, rng):
    q = rng.standard_normal((1, 4, 2, 32)).astype(np.float16)
    np.testing.assert_array_equal(cuflash.attention(q, q, q, window_size=window), cuflash.attention(q, q, q))


def test_a_window_wider_than_32_bits_on_a_kernel(rng):
    q = rng.standard_normal((1, 70, 2, 64)).astype(np.float16)
    with using("emulator"):
        wide = cuflash.attention(q, q, q, window_size=(2**40, 2**31 - 1))
        np.testing.assert_array_equal(wide, cuflash.attention(q, q, q))
        causal = cuflash.attention(q, q, q, window_size=(2**31, 2**40), causal=True)
        np.testing.assert_array_equal(causal, cuflash.attention(q, q, q, causal=True))


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-30, np.float32(0.3), 2])
def test_any_finite_scale(scale, rng):
    q = rng.standard_normal((1, 40, 2, 64)).astype(np.float16)
    for backend in ("auto", "emulator"):
        with using(backend):
            result = cuflash.attention(q, q, q, scale=scale, aux=("lse", "max_logit"))
        check_forward(q, q, q, result.out, result.lse, result.max_logit, scale=float(scale))


# --- drop-in names ------------------------------------------------------------------------------------------------

FLASH_ATTN_2 = {
    "flash_attn_func": (
        "q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn_qkvpacked_func": (
        "qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
        "deterministic=False, return_attn_probs=False"
    ),
    "flash_attn_kvpacked_func": (
        "q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None"
    ),
    "flash_attn_varlen_qkvpacked_func": (
        "qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
        "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
    ),
    "flash_attn_varlen_kvpacked_func": (
        "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", FLASH_ATTN_2)
def test_positional_order_and_defaults_are_flash_attns(name):
    parameters = inspect.signature(getattr(cuflash, name)).parameters.values()
    if "kvcache" in name:
        ours = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert {"page_table", "cu_seqlens_q", "score_mod", "mask_mod", "attention_chunk", "learnable_sink"} < ours
    theirs = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    bare = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in theirs]
    assert ", ".join(bare) == FLASH_ATTN_2[name]


def test_drop_ins_take_mods(rng):
    qkv = rng.standard_normal((14, 3, 4, 32)).astype(np.float16)
    cu, bias = np.array([0, 7, 14], np.int32), rng.standard_normal((4, 13)).astype(np.float32)
    given = {"score_mod": lambda s, b, h, i, j: s + bias[h, i - j + 6], "mask_mod": lambda b, h, i, j: (i + j) % 3 != 0}
    given["block_mask"] = cuflash.create_block_mask(lambda b, h, i, j: i >= j, None, None, 7, 7)
    q, k, v = (qkv[:, i] for i in range(3))
    expected = cuflash.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, **given | {"block_mask": None})
    dense = qkv.reshape(2, 7, 3, 4, 32)
    for out in (
        cuflash.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, **given),
        cuflash.flash_attn_varlen_qkvpacked_func(qkv, cu, 7, **given),
        cuflash.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 7, 7, **given),
        cuflash.flash_attn_func(*(dense[:, :, i] for i in range(3)), **given),
        cuflash.flash_attn_qkvpacked_func(dense, **given),
        cuflash.flash_attn_kvpacked_func(dense[:, :, 0], dense[:, :, 1:], **given),
    ):
        np.testing.assert_array_equal(out.reshape(expected.shape), expected)


def test_dense_drop_ins(rng):
    import cuflash as flash_attn

    qkv = rng.standard_normal((2, 7, 3, 4, 32)).astype(np.float16)
    q, k, v = (qkv[:, :, i] for i in range(3))
    slopes = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    expected = cuflash.attention(
        q, k, v, scale=0.5, causal=True, window_size=(4, 0), softcap=2.0, alibi_slopes=slopes, aux=("lse",)
    )
    arguments = (0.0, 0.5, True, (4, 0), 2.0, slopes, True, True)
    for out, lse, probabilities in (
        flash_attn.flash_attn_func(q, k, v, *arguments),
        flash_attn.flash_attn_qkvpacked_func(qkv, *arguments),
        flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], *arguments),
    ):
        np.testing.assert_array_equal(out, expected.out)
        np.testing.assert_array_equal(lse, expected.lse)
        assert probabilities is None
    np.testing.assert_array_equal(
        flash_attn.flash_attn_func(q, k, v, causal=True), cuflash.attention(q, k, v, causal=True)
    )


def test_varlen_drop_ins(rng):
    qkv = rng.standard_normal((11, 3, 4, 32)).astype(np.float16)
    q, k, v = (qkv[:, i] for i in range(3))
    cu = np.array([0, 4, 4, 11], np.int32)
    expected = cuflash.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=0.5, causal=True, aux=("lse",))
    for out, lse, _ in (
        cuflash.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, 0.0, 0.5, True, return_attn_probs=True),
        cuflash.flash_attn_varlen_qkvpacked_func(qkv, cu, 7, 0.0, 0.5, True, return_attn_probs=True),
        cuflash.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 7, 7, 0.0, 0.5, True, return_attn_probs=True),
    ):
        np.testing.assert_array_equal(out, expected.out)
        np.testing.assert_array_equal(lse, expected.lse)


def test_drop_ins_refuse_what_no_kernel_does(rng):
    q = rng.standard_normal((2, 7, 4, 32)).astype(np.float16)
    flat, cu = q.reshape(-1, 4, 32), np.array([0, 7, 14], np.int32)
    with pytest.raises(ArgumentError, match=r"dropout_p=0\.1 with NumPy.*cuflash\.attention\(.*seed="):
        cuflash.flash_attn_func(q, q, q, 0.1)
    with pytest.raises(ArgumentError, match=r"qkv\.shape=\(2, 7, 4, 32\) must have 5 dimensions, \[batch, len, 3"):
        cuflash.flash_attn_qkvpacked_func(q)
    with pytest.raises(ArgumentError, match=r"kv\.shape=\(14, 4, 32\) must have 4 dimensions, \[total, 2"):
        cuflash.flash_attn_varlen_kvpacked_func(flat, flat, cu, cu, 7, 7)
    with pytest.raises(ArgumentError, match="kv is a list"):
        cuflash.flash_attn_kvpacked_func(q, [q, q])


# --- explain ------------------------------------------------------------------------------------------------------


def test_explain_on_the_host(rng):
    q = rng.standard_normal((2, 70, 4, 64)).astype(np.float16)
    explained = cuflash.explain(q, q, q, causal=True, seed=3, deterministic=True)
    assert explained.backend == "reference" and "emulator" in explained.fallback
    assert "fallback" in str(explained)
    with using("emulator", "sm_86"):
        explained = cuflash.explain(q, q, q, causal=True)
    assert explained.backend == "emulator" and explained.kernel == "forward_sm80" and explained.fallback == ""
    assert explained.grid == (1, 4, 2)
    assert "kHeadDim=64" in explained.variant and "struct Variant" in explained.source
    assert "#include" not in explained.source and any("c++17" in o for o in explained.options)
    assert 0 < explained.shared_bytes <= 99 * 1024 and explained.workspace_bytes == 0
    assert not any("loads of" in reason for reason in explained.why)
    with using("emulator"):
        narrow = cuflash.explain(*[q[..., 1:]] * 3)
    assert any("loads of 2 bytes" in reason for reason in narrow.why), narrow.why
    text = str(explained)
    for word in ("emulator", "forward_sm80", "1 x 4 x 2", "kHeadDim=64", "bytes"):
        assert word in text
    markup = explained._repr_html_()
    assert markup.startswith("<table>") and "forward_sm80" in markup and "&lt;" in markup and "<script" not in markup


def test_explain_takes_attentions_keywords_alone():
    q = np.ones((1, 2, 1, 8), np.float16)
    with pytest.raises(TypeError, match="casual"):
        cuflash.explain(q, q, q, casual=True)


def test_the_backward_is_explained_as_it_runs(rng):
    """Workspace, grids and refusals; nothing runs."""
    starts = np.array([0, 30, 100], np.int32)
    q = rng.standard_normal((100, 4, 64)).astype(np.float16)
    k = v = rng.standard_normal((100, 2, 64)).astype(np.float16)
    keywords = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "sink": np.ones(4, np.float32), "softcap": 3.0}
    assert cuflash.explain(q, k, v, backward=True, **keywords).backend == "reference"
    assert cuflash.explain(q, k, v, backward=True, score_mod=lambda s, *_: s, **keywords).backend == "reference"
    with using("emulator"):
        result = cuflash.attention(q, k, v, **keywords, aux=("lse",))
        explained = cuflash.explain(q, k, v, backward=True, **keywords)
        bind.PREPARED.clear()
        cuflash.attention_backward(result.out, q, k, v, result.out, result.lse, **keywords)
        (prepared,) = bind.PREPARED.values()
    plan = prepared.plan
    assert explained.kernel == "backward_sm80" and explained.grid == plan.steps[1].grid
    assert (
        explained.workspace_bytes
        == plan.workspace_bytes
        == sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in plan.workspace.values())
    )
    assert len(explained.why) - 1 == len(plan.steps) == 4 and "backward_cast" in explained.why[2]
    assert explained.source.count("kKeysHeld = true") and explained.source.count("kAccumulateDq = true")
    with using("emulator"):
        apart = cuflash.explain(q, k, v, backward=True, **keywords, deterministic=True)
    assert "queries held" in apart.why[2] and "deterministic=True" in apart.why[-1]
    assert apart.workspace_bytes < explained.workspace_bytes


# --- supports and warmup ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", dtypes.bfloat16, dtypes.bfloat16.numpy, np.float16, np.dtype("float32")])
def test_supported(dtype):
    support = cuflash.supports(
        dtype=dtype, head_dim=80, head_dim_v=256, arch="sm_90", cu_seqlens=True, causal=True, sink=True, lse=True,
        dropout_p=0.0, page_table=None,
    )  # fmt: skip
    assert support and support.reason == ""


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"dtype": "float64"}, "NumPy reference"),
        ({"dtype": "int8"}, "float16, bfloat16, float32"),
        ({"head_dim": 257}, "head_dim=257: head dims go from 1 to 256"),
        ({"head_dim_v": 512}, "head_dim_v=512"),
        ({"arch": "sm_75"}, "compute capability 8.0"),
        ({"page_table": True, "backward": True}, "page_table: keys in pages have no gradients"),
        ({"split_size": 64, "dropout_p": 0.1}, "split_size: dropout is of training"),
        ({"split_size": 64, "cu_seqlens_k": True}, "split_size: packed keys (cu_seqlens_k) are not split"),
    ],
)
def test_unsupported_says_why(changed, reason):
    support = cuflash.supports(**{"dtype": "bfloat16", "head_dim": 64, **changed})
    assert not support and reason in support.reason
    if "dtype" not in changed or changed["dtype"] != "float64":
        with pytest.raises(UnsupportedError):
            cuflash.warmup(**{"dtype": "bfloat16", "head_dim": 64, "arch": "sm_80", **changed})


def test_supports_refuses_nonsense():
    with pytest.raises(ArgumentError, match="feature 'casual' is not a keyword"):
        cuflash.supports(dtype="float16", head_dim=64, casual=True)
    with pytest.raises(ArgumentError, match="head_dim=0 must be a positive int"):
        cuflash.supports(dtype="float16", head_dim=0)
    with pytest.raises(ArgumentError, match="dtype='bf16' must be one of"):
        cuflash.supports(dtype="bf16", head_dim=64)


def test_supports_knows_every_keyword_and_torch_dtypes():
    keywords = set(inspect.signature(cuflash.attention).parameters) - set("qkv")
    assert keywords - {"seed", "offset", "aux"} <= set(questions.FEATURES)
    torch = pytest.importorskip("torch")
    assert cuflash.supports(dtype=torch.bfloat16, head_dim=64)


def test_supports_and_attention_agree():
    """Each keyword that supports refuses, attention refuses too, and the other way round."""
    q = np.ones((1, 2, 1, 64), np.float16)
    block_mask = cuflash.create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 2, 2)
    values = {"page_table": np.zeros((1, 1), np.int32), "block_mask": block_mask, "dropout_p": 0.1, "split_size": 64,
              "kernel_options": {"a": 1}, "score_mod": lambda s, *a: s, "mask_mod": lambda *a: True, "softcap": 1.0,
              "causal": True, "window_size": (1, 1), "deterministic": True, "scale": 1.0}  # fmt: skip
    with using("emulator"):
        for name, value in values.items():
            supported = cuflash.supports(dtype="float16", head_dim=64, **{name: value})
            lengths = {"seqused_k": [2]} if name == "page_table" else {}
            try:
                cuflash.explain(q, q, q, seed=1, **{name: value}, **lengths)
            except UnsupportedError:
                assert not supported, name
            else:
                assert supported, name


def test_warmup_compiles_what_the_call_needs(rng):
    compiled = []
    q = rng.standard_normal((1, 3, 1, 24)).astype(np.float16)
    before = cuflash.config.on_compile
    with using("emulator"):
        cuflash.warmup(dtype=np.float16, head_dim=24, causal=True)
        cuflash.config.on_compile = compiled.append
        try:
            cuflash.attention(q, q, q, causal=True)
        finally:
            cuflash.config.on_compile = before
    assert not compiled


@needs_nvrtc
def test_warmup_compiles_what_the_backward_needs(rng):
    compiled = []
    q = rng.standard_normal((1, 3, 1, 24)).astype(np.float16)
    keywords = {"causal": True, "sink": np.ones(1, np.float32), "alibi_slopes": np.ones(1, np.float32)}
    before = cuflash.config.on_compile
    with using("emulator"):
        features = dict.fromkeys(keywords, True)
        assert cuflash.supports(dtype=np.float16, head_dim=24, backward=True, **features)
        cuflash.warmup(dtype=np.float16, head_dim=24, backward=True, **features)
        cuflash.config.on_compile = compiled.append
        try:
            out, lse, *_ = cuflash.attention(q, q, q, aux=("lse",), **keywords)
            cuflash.attention_backward(out, q, q, q, out, lse, captured_grads=True, **keywords)
        finally:
            cuflash.config.on_compile = before
    assert not compiled


def test_backward_shapes_and_numbers_compile_nothing(rng):
    """Lengths, batch, heads, scale, windows, seeds, rates, sinks in numbers: one set of kernels."""
    compiled = []
    before = cuflash.config.on_compile

    def call(batch, q_len, k_len, heads, **keywords):
        q, dout = rng.standard_normal((2, batch, q_len, heads, 24)).astype(np.float16)
        k, v = rng.standard_normal((2, batch, k_len, 1, 24)).astype(np.float16)
        keywords = {"dropout_p": 0.1, "seed": 1} | keywords
        out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
        cuflash.attention_backward(dout, q, k, v, out, lse, **keywords)

    with using("emulator"):
        call(1, 5, 5, 1)
        cuflash.config.on_compile = compiled.append
        try:
            call(2, 7, 140, 3, causal=True, scale=0.0)
            call(1, 9, 3, 2, window_size=(3, 1), softcap=9.0, dropout_p=0.7, seed=2**60, offset=4)
            call(1, 1, 1, 1, scale=-2.0, alibi_slopes=np.ones(1, np.float32))
        finally:
            cuflash.config.on_compile = before
    assert not compiled


def test_warmup_without_a_gpu(monkeypatch):
    cuflash.warmup(dtype="bfloat16", head_dim=64, arch="sm_80")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match=r"CuPy.*pip install 'cuflash\[cuda"):
        cuflash.warmup(dtype="bfloat16", head_dim=64)


def test_threads_calling_at_once(rng):
    """Eight threads, cold tables, calls of different kinds: each gets its own answer."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [rng.standard_normal((1, 3 + i % 5, 2, 32)).astype(np.float16) for i in range(40)]
    expected = [cuflash.attention(x, x, x, causal=True, scale=0.1 + i) for i, x in enumerate(inputs)]
    bind.PREPARED.clear()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(cuflash.attention, x, x, x, causal=True, scale=0.1 + i) for i, x in enumerate(inputs)]
        for call, want in zip(calls, expected, strict=True):
            np.testing.assert_array_equal(call.result(), want)


@pytest.mark.parametrize(
    ("call", "keyword", "said"),
    [
        (cuflash.attention, "is_causal", r"attention\(\) got an unexpected keyword .*: did you mean causal"),
        (cuflash.attention, "softmax_scale", "did you mean scale?"),
        (cuflash.attention, "casual", "did you mean causal?"),
        (cuflash.attention, "mask", "pass mask_mod=f, .*scaled_dot_product_attention"),
        (cuflash.attention, "attn_mask", "pass mask_mod=f"),
        (cuflash.attention, "bias", r"pass score_mod=cuflash.mods.bias\(bias\)"),
        (cuflash.attention, "cu_seqlens", "did you mean cu_seqlens_q and cu_seqlens_k?"),
        (cuflash.attention, "block_table", "did you mean page_table?"),
        (cuflash.attention, "return_lse", r"pass aux=\('lse',\)"),
        (cuflash.attention, "enable_gqa", "pass nothing: k and v may have fewer heads"),
        (cuflash.attention, "xyzzy", "it takes alibi_slopes, aux, block_mask, "),
        (cuflash.explain, "is_causal", r"explain\(\) got .*did you mean causal"),
        (cuflash.flash_attn_func, "sm_scale", "did you mean softmax_scale?"),
        (cuflash.flash_attn_func, "is_causal", "did you mean causal?"),
        (cuflash.flex_attention, "softmax_scale", "did you mean scale?"),
        (cuflash.flex_attention, "mask_mod", "pass block_mask=cuflash.create_block_mask"),
        (cuflash.scaled_dot_product_attention, "mask", "did you mean attn_mask?"),
        (cuflash.dot_product_attention, "attn_mask", "did you mean mask?"),
        (cuflash.dot_product_attention, "causal", "did you mean is_causal?"),
    ],
)
def test_a_wrong_keyword_is_answered_with_the_one_meant(call, keyword, said):
    x = np.ones((1, 2, 2, 8), np.float32)
    with pytest.raises(TypeError, match=said) as raised:
        call(x, x, x, **{keyword: True})
    assert isinstance(raised.value, KeywordError)


def test_a_type_error_of_the_callers_own_stays_one():
    def broken(score, b, h, q_idx, kv_idx):
        return len(3)

    x = np.ones((1, 2, 2, 8), np.float32)
    with pytest.raises(Exception) as raised:
        cuflash.attention(x, x, x, score_mod=broken)
    assert not isinstance(raised.value, KeywordError)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'v'"):
        cuflash.attention(x, x)
