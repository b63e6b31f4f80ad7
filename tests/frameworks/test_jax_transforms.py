"""Attention under JAX's transformations, on the CPU: values, gradients, devices, and what is refused.

Expected values are those of NumPy arrays, so every test asks for the same bits or for a few of float32's last ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from backends import using
from samples import sample

import cuflash
from cuflash import dtypes
from cuflash.errors import ArgumentError, UnsupportedError

jax = pytest.importorskip("jax")
jnp = jax.numpy

from cuflash.autograd import jax_call, jax_ffi  # noqa: E402  (it imports JAX)

FLOATS = ("q", "k", "v", "alibi_slopes", "sink")
GRADIENTS = ["reference"] + ["emulator"] * bool(cuflash.supports(dtype="float32", head_dim=16, backward=True))


@pytest.fixture(params=GRADIENTS)
def differentiating(request):
    """The backends that have gradients."""
    with using("auto" if request.param == "reference" else request.param):
        yield request.param


def dense(rng, dtype=np.float32, batch=2) -> dict[str, np.ndarray]:
    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "q": draw(batch, 7, 4, 16), "k": draw(batch, 9, 2, 16), "v": draw(batch, 9, 2, 8),
        "alibi_slopes": rng.uniform(0, 1, 4).astype(np.float32), "sink": draw(4),
    }  # fmt: skip


def split(arrays):
    """(arrays with a gradient, lengths), as JAX's."""
    given = {name: jnp.asarray(x) for name, x in arrays.items()}
    return {n: x for n, x in given.items() if n in FLOATS}, {n: x for n, x in given.items() if n not in FLOATS}


def loss(floats, lengths=None, weights=1.0, **keywords):
    """Uses every element of out and every finite one of lse, each in its own way."""
    result = cuflash.attention(**floats, **(lengths or {}), causal=True, softcap=2.0, aux=("lse",), **keywords)
    lse = jnp.where(jnp.isfinite(result.lse), result.lse, 0)
    return (jnp.sin(result.out) * weights).sum() + jnp.cos(lse).sum()


def expected_gradients(arrays):
    """dq, dk, dv, dslopes, dsink of `loss` by NumPy arrays and `attention_backward`."""
    keywords = dict(arrays, causal=True, softcap=2.0)
    out, lse, *_ = cuflash.attention(**keywords, aux=("lse",))
    dlse = np.where(np.isfinite(lse), -np.sin(np.where(np.isfinite(lse), lse, 0)), 0).astype(np.float32)
    q, k, v = (keywords.pop(name) for name in "qkv")
    grads = cuflash.attention_backward(np.cos(out), q, k, v, out, lse, **keywords, dlse=dlse, captured_grads=True)
    return dict(zip(FLOATS, (grads.dq, grads.dk, grads.dv, grads.dcaptured[0], grads.dsink), strict=True))


def assert_close(got, expected, rtol=2e-5):
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        scale = np.abs(want).max() + 1e-3
        np.testing.assert_allclose(np.asarray(got[name]), want, rtol=0, atol=rtol * scale, err_msg=name)


def refused(match: str):
    return pytest.raises(UnsupportedError, match=match)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_jit_has_the_bits_of_numpy(backend, rng, dtype):
    arrays = sample(rng, dtype).arrays
    expected = cuflash.attention(**arrays, causal=True, aux=("lse", "max_logit"))
    call = jax.jit(lambda arrays: cuflash.attention(**arrays, causal=True, aux=("lse", "max_logit")))
    got = call({name: jnp.asarray(x) for name, x in arrays.items()})
    for have, want in zip(got[:3], expected[:3], strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(have), want)


def test_traced_lengths_beside_constants():
    x = jnp.asarray(np.arange(32, dtype=np.float32).reshape(4, 1, 8))
    call = jax.jit(lambda starts: cuflash.attention(x, x, x, cu_seqlens_q=starts, cu_seqlens_k=starts))
    np.testing.assert_array_equal(call(jnp.arange(5, dtype=jnp.int32)), x)  # every row sees itself alone


def test_what_is_traced_uses_the_backend_of_its_time(rng):
    x = jnp.asarray(dense(rng)["k"])
    call = jax.jit(lambda x: cuflash.attention(x, x, x))
    with using("emulator"):
        cuflash.attention(x, x, x)  # compiled, if this machine never did
        with cuflash.emulator.counting() as counted:
            call(x).block_until_ready()
    assert counted.launches == 1
    with cuflash.emulator.counting() as counted:
        call(x).block_until_ready()
    assert counted.launches == 1, "traced under the emulator"
    with cuflash.emulator.counting() as counted:
        jax.jit(lambda x: cuflash.attention(x, x, x))(x).block_until_ready()
    assert counted.launches == 0


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_gradients(differentiating, rng, packed, compiled):
    arrays = sample(rng, "float32").arrays if packed else dense(rng)
    floats, lengths = split(arrays)
    grad = jax.grad(loss)
    assert_close((jax.jit(grad) if compiled else grad)(floats, lengths), expected_gradients(arrays))


@pytest.mark.parametrize(
    "pick", [lambda r: jnp.sin(r.out).sum(), lambda r: r.lse.astype(float).sum()], ids=["out", "lse"]
)
def test_gradient_of_one_result_alone(rng, pick):
    """By finite differences in float64: nothing of ours is in what it is compared with."""

    def f(floats):
        return pick(cuflash.attention(**floats, causal=True, aux=("lse",)))

    with jax.enable_x64(True):
        floats, _ = split({name: x.astype(np.float64) for name, x in dense(rng).items() if name in ("q", "k", "v")})
        step, _ = split({name: rng.standard_normal(x.shape) * 1e-2 for name, x in floats.items()})
        ahead, behind = (f({name: x + sign * step[name] for name, x in floats.items()}) for sign in (1, -1))
        grads = jax.grad(f)(floats)
        slope = sum((grads[name] * step[name]).sum() for name in floats)
        np.testing.assert_allclose(slope, (ahead - behind) / 2, rtol=2e-3)


def test_unused_gradients_are_not_computed(rng, monkeypatch):
    floats, _ = split(dense(rng))
    fixed = {name: floats.pop(name) for name in ("alibi_slopes", "sink")}
    described = []
    call = jax_ffi.call
    monkeypatch.setattr(jax_ffi, "call", lambda d, arrays: described.append(d) or call(d, arrays))
    jax.make_jaxpr(jax.grad(lambda floats: cuflash.attention(**floats, **fixed, scale=0.3).sum()))(floats)
    backward = next(d for d in described if d.operation == "attention_backward")
    assert "dlse" not in [s.name for s in backward.inputs]
    assert "dslopes" not in [s.name for s in backward.results]


@pytest.mark.parametrize(
    ("layout", "mapped"),
    [
        ("dense", ("q", "k", "v")),
        ("dense", ("k", "alibi_slopes")),
        ("dense", ("q", "sink")),
        ("packed", ("q",)),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_vmap_is_a_loop(rng, layout, mapped):
    make = dense if layout == "dense" else lambda rng: sample(rng, "float32").arrays
    floats, lengths = split(make(rng))
    others = [split(make(rng))[0] for _ in range(2)]
    stacked = floats | {name: jnp.stack([o[name] for o in others], axis=1) for name in mapped}
    axes = ({name: 1 if name in mapped else None for name in floats},)
    each = [floats | {name: o[name] for name in mapped} for o in others]

    def call(floats):
        result = cuflash.attention(**floats, **lengths, causal=True, aux=("lse",))
        return {"out": result.out, "lse": result.lse}

    for f in (call, jax.grad(lambda floats: loss(floats, lengths))):
        f = jax.jit(f)
        found = list(map(f, each))
        assert_close(jax.vmap(f, in_axes=axes)(stacked), jax.tree.map(lambda *x: np.stack(x), *found))
    total = jax.grad(lambda x: jax.vmap(lambda f: loss(f, lengths), in_axes=axes)(x).sum())(stacked)
    for name in set(floats) - set(mapped):  # what all elements share receives the sum
        assert_close({name: total[name]}, {name: sum(np.asarray(grads[name]) for grads in found)})


def test_vmap_of_vmap(rng):
    floats, _ = split(dense(rng))
    q = jnp.stack([jnp.stack([floats["q"] * (i + j) for i in range(2)]) for j in range(3)])
    f = jax.vmap(jax.vmap(lambda q: cuflash.attention(**floats | {"q": q})))
    for j in range(3):
        np.testing.assert_array_equal(f(q)[j, 1], cuflash.attention(**floats | {"q": q[j, 1]}))


def test_scan_and_checkpoint(differentiating, rng):
    x = jnp.asarray(dense(rng)["k"])

    def block(x, _):
        return x + cuflash.attention(x, x, x, causal=True), None

    def plain(x):
        return block(block(x, None)[0], None)[0].sum()

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(block), x, length=2)[0].sum()

    assert_close({"x": jax.jit(jax.grad(scanned))(x)}, {"x": np.asarray(jax.grad(plain)(x))})


def test_dropout_has_the_mask_of_numpy(backend, rng):
    arrays = dense(rng)
    expected = cuflash.attention(**arrays, dropout_p=0.25, seed=5, offset=3)
    floats, _ = split(arrays)
    seeds: list[int] = []  # of each tracing

    @jax.jit
    def call(floats, seed):
        seeds.append(seed)
        return cuflash.attention(**floats, dropout_p=0.25, seed=seed, offset=3)

    np.testing.assert_array_equal(call(floats, jnp.uint32(5)), expected)
    assert not np.array_equal(call(floats, jnp.uint32(6)), expected)
    assert len(seeds) == 1, "a new seed is no new program"
    fixed = jax.jit(lambda f: cuflash.attention(**f, dropout_p=0.25, seed=5, offset=3))
    np.testing.assert_array_equal(fixed(floats), expected)
    stacked = {name: jnp.stack([x, x]) for name, x in floats.items()}
    for element in jax.vmap(fixed)(stacked):
        np.testing.assert_array_equal(element, expected)


def test_gradients_with_dropout(differentiating, rng):
    arrays = dense(rng)
    keywords = {"causal": True, "dropout_p": 0.25, "seed": 5}
    q, k, v, *heads = arrays.values()
    heads = dict(zip(("alibi_slopes", "sink"), heads, strict=True))
    out, lse, *_ = cuflash.attention(q, k, v, **heads, **keywords, aux=("lse",))
    grads = cuflash.attention_backward(np.cos(out), q, k, v, out, lse, **heads, **keywords, captured_grads=True)
    got = jax.jit(jax.grad(lambda f: jnp.sin(cuflash.attention(**f, **keywords)).sum()))(split(arrays)[0])
    assert_close(got, dict(zip(FLOATS, (grads.dq, grads.dk, grads.dv, grads.dcaptured[0], grads.dsink), strict=True)))


def test_dropout_needs_a_seed_it_can_hold(rng):
    q = jnp.ones((1, 2, 2, 8))
    for seed, match in ((None, "seed is None"), (2**40, "seed=1099511627776 must be from 0 to"), (1.5, "must be|pass")):
        with pytest.raises(ArgumentError, match=match):
            jax.jit(lambda q, seed=seed: cuflash.attention(q, q, q, dropout_p=0.5, seed=seed))(q)


@pytest.mark.parametrize("key", [jax.random.key, jax.random.PRNGKey])
def test_a_key_is_a_seed(rng, key):
    q = jnp.asarray(rng.standard_normal((3, 1, 5, 2, 8)), jnp.float32)

    def call(q, key):
        return cuflash.attention(q, q, q, dropout_p=0.5, seed=key)

    got = call(q[0], key(7))
    np.testing.assert_array_equal(got, call(q[0], jax.random.bits(key(7), (1,))))
    np.testing.assert_array_equal(jax.jit(call)(q[0], key(7)), got)
    assert not np.array_equal(got, call(q[0], key(8)))
    keys = jax.random.split(key(7), 3)
    many = jax.vmap(call)(q, keys)
    for i in range(3):
        np.testing.assert_array_equal(many[i], call(q[i], keys[i]))
    grads = [jax.grad(lambda q, f=f: f(q, key(7)).sum())(q[0]) for f in (call, jax.jit(call))]
    np.testing.assert_allclose(*grads, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_keys_elsewhere_are_refused_by_name(compiled):
    q, key = jnp.ones((1, 4, 2, 8)), jax.random.key(0)
    for name in ("q", "k", "sink", "seqused_k", "max_seqlen_k", "offset"):
        given = {"q": q, "k": q, "v": q, "dropout_p": 0.5, "seed": 3, name: key}
        call = lambda key, given=given, name=name: cuflash.attention(**given | {name: key})  # noqa: E731
        with pytest.raises(ArgumentError, match=rf"^{name}: dtype key.*one key as seed="):
            (jax.jit(call) if compiled else call)(key)
    call = lambda keys: cuflash.attention(q, q, q, dropout_p=0.5, seed=keys)  # noqa: E731
    with pytest.raises(ArgumentError, match=r"seed is an array of keys, of shape \(2,\).*pass seed\[0\]"):
        (jax.jit(call) if compiled else call)(jax.random.split(key))


def test_a_traced_number_is_told_how_to_come_in():
    """What the messages name works: a static argument, and a mod that captures the value."""
    q = jnp.ones((1, 4, 2, 8)) * jnp.arange(4)[:, None, None]
    for name, value, by_mod in (
        ("scale", 0.5, True), ("softcap", 2.0, True), ("dropout_p", 0.5, False), ("causal", True, True),
        ("split_size", 64, False), ("window_size", jnp.array([1, 0]), True),
    ):  # fmt: skip
        call = lambda q, value, name=name: cuflash.flash_attn_func(q, q, q, **{name: value})  # noqa: E731
        if name not in ("softcap", "causal", "window_size"):
            call = lambda q, value, name=name: cuflash.attention(q, q, q, seed=1, **{name: value})  # noqa: E731
        with pytest.raises(ArgumentError, match=r"JAX traces it, so name it in static_argnames of jax\.jit") as caught:
            jax.jit(call)(q, value)
        assert ("mod that captures" in str(caught.value)) == by_mod and "pass float" not in str(caught.value)
    want = cuflash.attention(q, q, q, scale=0.5)
    static = jax.jit(lambda q, scale: cuflash.attention(q, q, q, scale=scale), static_argnames="scale")
    np.testing.assert_array_equal(static(q, scale=0.5), want)
    scaled = lambda scale: lambda score, b, h, q_idx, kv_idx: score * scale  # noqa: E731
    got = jax.jit(lambda q, scale: cuflash.attention(q, q, q, scale=1.0, score_mod=scaled(scale)))(q, 0.5)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_flash_attn_names(rng):
    arrays = dense(rng)
    q, k = (jnp.asarray(arrays[name]) for name in "qk")
    kv = jnp.stack([k, k * 2], axis=2)

    def call(q, kv):
        return cuflash.flash_attn_kvpacked_func(q, kv, causal=True).sum()

    dq, dkv = jax.jit(jax.grad(call, (0, 1)))(q, kv)
    f = lambda q, k, v: cuflash.attention(q, k, v, causal=True).sum()  # noqa: E731
    want = jax.grad(f, (0, 1, 2))(q, k, k * 2)
    assert_close({"q": dq, "kv": dkv}, {"q": np.asarray(want[0]), "kv": np.stack(want[1:], axis=2)})


def test_nothing_compiles_twice(rng):
    floats, lengths = split(sample(rng, "float32").arrays)
    step = jax.jit(jax.value_and_grad(loss))
    step(floats, lengths)
    others = lengths | {"cu_seqlens_q": jnp.array([0, 1, 6, 12], jnp.int32)}
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    try:
        step(floats, others)
        assert not [name for name in compiled if "compile" in name]
        jax.jit(lambda x: x + 3)(1.0)
        assert [name for name in compiled if "compile" in name], "the test sees compilations"
    finally:
        jax.monitoring.clear_event_listeners()


def test_a_description_is_text_without_addresses(rng):
    """What is compiled may be kept on disk and run by another process."""
    floats, _ = split(dense(rng))
    texts = {jax.jit(lambda f, i=i: cuflash.attention(**f) + 0 * i).lower(floats).as_text().split("call = ")[1]
             for i in range(2)}  # fmt: skip
    assert len(texts) == 1


def test_lowers_for_a_gpu_that_is_not_there(rng):
    floats, lengths = split(sample(rng, "bfloat16").arrays)
    traced = jax.jit(jax.grad(loss)).trace(floats, lengths)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{jax_ffi.TARGET}(") == 2
    assert "callback" not in text


def test_on_a_gpu_the_workspace_is_xlas_and_kernels_are_loaded_when_traced(rng, monkeypatch):
    class Prepared:
        results = (("out", (1, 2, 2, 8), dtypes.float32),)

        def __init__(self):
            self.loaded = []

        def workspace(self):
            return {"scratch": ((5, 3), dtypes.float32)}

        def load(self, device):
            self.loaded.append(device)

    prepared = Prepared()
    monkeypatch.setattr(jax_call, "gpus", lambda: (0, 3))
    monkeypatch.setattr(jax_call, "prepare_traced", lambda framework, views, **keywords: prepared)
    q = jnp.ones((1, 2, 2, 8))
    jax_call._described.cache_clear()
    try:
        text = jax.jit(lambda q: cuflash.attention(q, q, q, scale=0.7)).trace(q).lower(lowering_platforms=("cuda",))
        assert prepared.loaded == [0, 3]
        assert "-> (tensor<1x2x2x8xf32>, tensor<5x3xf32>)" in text.as_text()
    finally:
        jax_call._described.cache_clear()


def test_refused_by_name(rng):
    floats, _ = split(dense(rng))

    def f(q):
        return loss(floats | {"q": q})

    q = floats["q"]
    with refused("first derivatives"):
        jax.grad(lambda q: jax.grad(f)(q).sum())(q)
    with refused("first derivatives"):
        jax.jit(jax.hessian(f))(q)
    with refused(r"jax\.jvp"):
        jax.jvp(f, (q,), (q,))
    with refused("max_logit has no gradient.*stop_gradient"):
        jax.grad(lambda q: cuflash.attention(**floats | {"q": q}, aux=("max_logit",)).max_logit.sum())(q)
    with refused("cu_seqlens_q|jax is tracing"):
        jax.jit(lambda q: cuflash.attention_backward(q, q, q, q, q, q[..., 0]))(q)


def test_what_is_differentiated_changes_from_call_to_call(rng):
    """JAX remembers a traced derivative for each choice of what is differentiated."""
    floats, _ = split(dense(rng))
    names = tuple(floats)

    def f(*arrays):
        return loss(dict(zip(names, arrays, strict=True)))

    every, arrays = tuple(range(len(names))), tuple(floats.values())
    named = lambda some, grads: {names[i]: np.asarray(x) for i, x in zip(some, grads, strict=True)}  # noqa: E731
    first = named(every, jax.grad(f, every)(*arrays))
    for some in ((0,), (3,), (1, 4), every):
        assert_close(named(some, jax.grad(f, some)(*arrays)), {names[i]: first[names[i]] for i in some})
    mapped = jax.vmap(jax.grad(f, every), (0, *(None,) * (len(names) - 1)))(arrays[0][None], *arrays[1:])
    assert_close(named(every, [x[0] for x in mapped]), first)


def test_monitoring_max_logit_needs_no_gradient(rng):
    floats, _ = split(dense(rng))

    def f(floats):
        result = cuflash.attention(**floats, aux=("max_logit",))
        return result.out.sum() + jax.lax.stop_gradient(result.max_logit).max(), result.max_logit

    grads, _ = jax.grad(f, has_aux=True)(floats)
    assert_close(grads, jax.tree.map(np.asarray, jax.grad(lambda f: cuflash.attention(**f).sum())(floats)))


def test_wrong_arguments_are_named_when_traced_and_wrong_values_when_run(rng):
    q = jnp.ones((4, 2, 8))

    def call(q, starts):
        return cuflash.attention(q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts)

    with pytest.raises(ArgumentError, match=r"cu_seqlens_q.dtype=float32 must be int32"):
        jax.jit(call)(q, jnp.zeros(2))
    with pytest.raises(ArgumentError, match=r"q.shape=\(2, 4, 2, 8\) must have 3"):
        jax.jit(call)(q[None].repeat(2, 0), jnp.zeros(2, jnp.int32))
    with pytest.raises(ArgumentError, match=r"cu_seqlens_q\[-1\]=7 must not exceed 4"):
        jax.jit(lambda q: call(q, [0, 7]))(q)  # a list's values are known
    with pytest.raises(ArgumentError, match="k is a ndarray and q a JAX array"):
        jax.jit(lambda q: cuflash.attention(q, np.ones((1, 2, 2, 8)), q))(q[None])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"ArgumentError: cu_seqlens_q\[-1\]=7 must not exceed 4"):
        jax.jit(call)(q, jnp.array([0, 7], jnp.int32)).block_until_ready()
    np.testing.assert_array_equal(jax.jit(call)(q, jnp.array([0, 4], jnp.int32)), np.ones(q.shape))


DEVICES = Path(__file__).with_name("jax_devices.py")


def test_several_devices(tmp_path):
    """In a process of its own: how many devices the CPU plays is settled when JAX starts."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(Path(cuflash.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, DEVICES], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "passed"
