"""`install()`: the import lines of real code, and each function beside its formula and its gradient in float64."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import math
import subprocess
import sys
import types

import numpy as np
import pytest

from cuflash.errors import ArgumentError, UnsupportedError
from cuflash.integrations.flash_attn import install, uninstall
from cuflash.integrations.flash_attn.installer import VERSION

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import cuflash  # noqa: E402
from cuflash import reference  # noqa: E402


@pytest.fixture
def installed():
    with install(force=True):
        torch.manual_seed(0)
        yield


@pytest.fixture
def none_there():
    """A process that has imported no flash_attn, and afterwards is as it was."""
    before = ours()
    for name in before:
        del sys.modules[name]
    yield
    uninstall()
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def ours():
    return {name: module for name, module in sys.modules.items() if (name + ".").startswith("flash_attn.")}


# install and uninstall ------------------------------------------------------------------------------------------------

# What models, trainers and ring attention write at their head.
LINES = """
import flash_attn
from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_attn import flash_attn_with_kvcache
from flash_attn import __version__ as flash_attn_version
from flash_attn import flash_attn_interface
from flash_attn.flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from flash_attn.flash_attn_interface import flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn.flash_attn_interface import flash_attn_varlen_kvpacked_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_backward
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, _flash_attn_varlen_backward
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input
from flash_attn.bert_padding import index_put_first_axis, index_first_axis_residual
from flash_attn.bert_padding import unpad_input_for_concatenated_sequences
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb_func, apply_rotary_emb_torch, rotate_half
from flash_attn.layers.rotary import apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn.modules.mha import get_alibi_slopes
from flash_attn.modules.mha import FlashCrossAttention, FlashSelfAttention
import flash_attn.layers.rotary as rotary
import flash_attn.modules, flash_attn.ops.triton, flash_attn.bert_padding
""".strip().splitlines()
# And what they write in a try: ImportError is what they wait for.
NOT_SERVED = (
    "from flash_attn.modules.mha import MHA",
    "from flash_attn.flash_attn_interface import flash_attn_unpadded_func",
    "from flash_attn.losses.cross_entropy import CrossEntropyLoss",
    "from flash_attn.ops.rms_norm import rms_norm",
    "from flash_attn.ops.triton.layer_norm import RMSNorm",
    "import flash_attn.cute",
    "import flash_attn_2_cuda",
)


@pytest.mark.parametrize("line", LINES)
def test_import_lines_of_real_code(installed, line):
    namespace = {}
    exec(line, namespace)
    given = [x for name, x in namespace.items() if name != "__builtins__"]
    assert given and all(x is not None for x in given)


@pytest.mark.parametrize("line", NOT_SERVED)
def test_what_is_not_served_raises_import_error(installed, line):
    with pytest.raises(ImportError):
        exec(line, {})


def test_the_functions_are_those_of_cuflash(installed):
    import flash_attn
    from flash_attn import flash_attn_interface

    for name in ("flash_attn_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache"):
        assert getattr(flash_attn, name) is getattr(flash_attn_interface, name) is getattr(cuflash, name)


def test_the_import_system_finds_what_is_installed(installed):
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.ops.triton.rotary"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.name == name and spec.loader is not None
        assert sys.modules[name].__name__ == name
    assert importlib.util.find_spec("flash_attn.losses") is None
    assert importlib.import_module("flash_attn").__version__ == VERSION
    assert VERSION.startswith("2.8.") and VERSION in str(install.__doc__)


def test_uninstall_leaves_nothing(none_there):
    before = dict(sys.modules)
    install(force=True)
    install(force=True)  # once more: nothing changes
    assert set(ours()) > {"flash_attn", "flash_attn.modules.mha"}
    kept = sys.modules["flash_attn"]
    with install():  # nor at the end of a block inside of another
        assert sys.modules["flash_attn"] is kept
    assert sys.modules["flash_attn"] is kept
    uninstall()
    uninstall()
    assert not ours()
    assert {name: module for name, module in before.items() if sys.modules.get(name) is not module} == {}
    with pytest.raises(RuntimeError, match="as it was raised"), install(force=True):
        raise RuntimeError("as it was raised")
    assert not ours()


def test_an_imported_flash_attn_is_refused_or_hidden(none_there):
    theirs = {name: types.ModuleType(name) for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.losses")}
    sys.modules.update(theirs)
    with pytest.raises(ArgumentError, match=r"another flash_attn is imported .*force=True"):
        install()
    assert ours() == theirs
    with install(force=True):
        assert sys.modules["flash_attn"].__version__ == VERSION
        assert "flash_attn.losses" not in sys.modules
    assert ours() == theirs


def test_an_installed_flash_attn_is_refused_or_hidden(none_there, monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '1.0.9'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentError, match=r"another flash_attn is installed .*__init__.py.*force=True"):
        install()
    assert not ours()
    with install(force=True):
        assert importlib.import_module("flash_attn").__version__ == VERSION
    assert importlib.import_module("flash_attn").__version__ == "1.0.9"


def test_a_wrong_force_is_refused():
    with pytest.raises(ArgumentError, match="force='yes' must be True or False"):
        install(force="yes")  # type: ignore[arg-type]


def test_a_fresh_process_imports_pytorch_with_install_and_not_before(tmp_path):
    script = """if True:
    import sys
    from importlib import metadata
    import cuflash.integrations
    assert "torch" not in sys.modules
    try:
        import flash_attn
    except ImportError:
        pass
    else:
        sys.exit("skip: flash-attn is installed")
    cuflash.integrations.flash_attn.install()
    from flash_attn.layers.rotary import RotaryEmbedding
    for name in ("flash_attn", "flash-attn", "Flash_Attn"):
        assert metadata.version(name) == sys.modules["flash_attn"].__version__
    assert [d.name for d in metadata.distributions()].count("flash_attn") == 1
    assert metadata.version("numpy") and not metadata.files("flash_attn")
    cuflash.integrations.flash_attn.uninstall()
    assert not [d for d in metadata.distributions() if (d.name or "").replace("-", "_") == "flash_attn"]
    try:
        import flash_attn
    except ImportError:
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if "skip:" in done.stderr:
        pytest.skip("flash-attn is installed")
    assert done.stdout == "done\n", done.stderr


def test_without_pytorch_install_says_so(none_there, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(UnsupportedError, match="PyTorch is not installed"):
        install(force=True)


# bert_padding ---------------------------------------------------------------------------------------------------------

MASK = [[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_unpad_and_pad(installed, dtype):
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

    x, mask = torch.randn(3, 4, 2, 5, requires_grad=True), torch.tensor(MASK).to(dtype)
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).to(dtype)
    rows, indices, starts, longest, used = unpad_input(hidden_states=x, attention_mask=mask)
    assert indices.tolist() == [0, 1, 5, 6, 7] and indices.dtype == torch.int64
    assert starts.tolist() == [0, 2, 5, 5] and starts.dtype == torch.int32
    assert longest == 3 and used.tolist() == [2, 3, 0]
    assert torch.equal(rows, x.flatten(0, 1)[indices]) and torch.equal(rows, index_first_axis(x.flatten(0, 1), indices))
    padded = pad_input(hidden_states=rows, indices=indices, batch=3, seqlen=4)
    assert torch.equal(padded, x * mask.to(x.dtype)[..., None, None])
    g = torch.randn_like(x)
    (dx,) = torch.autograd.grad(padded, x, g)
    assert torch.equal(dx, g * mask.to(x.dtype)[..., None, None])

    _, indices, starts, longest, used = unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 5, 6, 7] and starts.tolist() == [0, 3, 6, 6]
    assert longest == 3 and used.tolist() == [2, 3, 0]


def test_rows_by_their_indices(installed):
    from flash_attn.bert_padding import index_first_axis, index_first_axis_residual, index_put_first_axis

    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for indices in (torch.tensor([4, 0, 4]), torch.tensor([4, 0, 4], dtype=torch.int32)):
        assert torch.equal(index_first_axis(x, indices), x[indices])
        assert torch.autograd.gradcheck(lambda x, i=indices: index_first_axis(x, i), x)
        first, whole = index_first_axis_residual(x, indices)
        assert torch.equal(first, x[indices]) and torch.equal(whole, x)
        (dx,) = torch.autograd.grad(first.sum() + 10 * whole.sum(), x)
        assert dx[:, 0].tolist() == [11, 10, 10, 10, 12, 10]
    put = index_put_first_axis(x[:2], torch.tensor([4, 1]), 5)
    assert torch.equal(put[[4, 1]], x[:2]) and put.shape == (5, 3) and not put[[0, 2, 3]].any()
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x[:2], torch.tensor([4, 1]), 5), x)
    for indices in (torch.tensor([6]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]]), [0]):
        with pytest.raises(ArgumentError, match="indices"):
            index_first_axis(x, indices)
    with pytest.raises(ArgumentError, match="one place for each row"):
        index_put_first_axis(x, torch.tensor([4, 1]), 5)


def test_sequences_that_share_a_row(installed):
    from flash_attn.bert_padding import unpad_input_for_concatenated_sequences as unpad

    x = torch.randn(3, 6, 2, requires_grad=True)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    rows, indices, starts, longest = unpad(hidden_states=x, attention_mask_in_length=lengths)
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert starts.tolist() == [0, 2, 5, 8, 10, 16] and starts.dtype == torch.int32
    assert longest == 6
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    rows.sum().backward()
    assert x.grad.sum() == 2 * 16
    rows, _, starts, longest = unpad(x, torch.zeros_like(lengths))
    assert rows.shape == (0, 2) and starts.tolist() == [0] and longest == 0
    for wrong in (lengths + 1, lengths > 0, lengths.float(), lengths[0]):
        with pytest.raises(ArgumentError, match="attention_mask_in_length"):
            unpad(x, wrong)


def test_rearrange_is_that_of_einops(installed):
    from flash_attn.bert_padding import rearrange

    x = torch.arange(24.0).reshape(2, 3, 4).requires_grad_()
    assert torch.equal(rearrange(x, "b s ... -> (b s) ..."), x.flatten(0, 1))
    assert torch.equal(rearrange(x.unsqueeze(-1), "b s d one -> (b s) d one"), x.reshape(6, 4, 1))
    assert torch.equal(rearrange(x, "b s (h d) -> b h s d", h=2), x.unflatten(-1, (2, 2)).transpose(1, 2))
    rearrange(x, "b s d -> d (b s)").sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# rotary ---------------------------------------------------------------------------------------------------------------


def rotation(x, cos, sin, interleaved, positions):
    """The formula, in float64, row by row: x [rows, heads, d], positions [rows]; -1: the row stays."""
    out = x.astype(np.float64)
    n = cos.shape[1]
    for row, p in enumerate(positions):
        for i in range(n) if p >= 0 else ():
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
            c, s = float(cos[p, i]), float(sin[p, i])
            one, two = x[row, :, a].astype(np.float64), x[row, :, b].astype(np.float64)
            out[row, :, a], out[row, :, b] = one * c - two * s, one * s + two * c
    return out


BATCH, LEN, HEADS, DIM = 2, 5, 3, 8
STARTS = [0, 4, 4, 9]  # and a row that no sequence owns
OFFSETS = {"none": 0, "int": 3, "tensor": [4, 1], "int64 tensor": [4, 1]}


def tables(rotary_dim=DIM, rows=12, dtype=torch.float32):
    angles = torch.rand(rows, rotary_dim // 2) * 2 * math.pi
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [DIM, 4])
def test_rotary_and_its_gradient(installed, rotary_dim, interleaved, inplace, offsets, packed):
    from flash_attn.layers.rotary import apply_rotary_emb
    from flash_attn.ops.triton.rotary import apply_rotary

    offset = OFFSETS[offsets]
    if packed and offset:
        offset = [4, 1, 2] if isinstance(offset, list) else offset
    per_sequence = offset if isinstance(offset, list) else [offset] * 3
    if packed:
        x = torch.randn(10, HEADS, DIM)
        positions = [i + per_sequence[b] for b in range(3) for i in range(STARTS[b + 1] - STARTS[b])] + [-1]
        where = {"cu_seqlens": torch.tensor(STARTS, dtype=torch.int32), "max_seqlen": 5}
    else:
        x = torch.randn(BATCH, LEN, HEADS, DIM)
        positions = [i + per_sequence[b] for b in range(BATCH) for i in range(LEN)]
        where = {}
    if isinstance(offset, list):
        offset = torch.tensor(offset, dtype=torch.int64 if "64" in offsets else torch.int32)
    cos, sin = tables(rotary_dim)
    cos, sin, g = cos.requires_grad_(), sin.requires_grad_(), torch.randn_like(x)

    def formula(x, sin=sin):
        flat = x.detach().reshape(-1, HEADS, DIM).numpy()
        return rotation(flat, cos.detach().numpy(), sin.detach().numpy(), interleaved, positions).reshape(x.shape)

    source = x.clone().requires_grad_()
    argument = source * 1
    out = apply_rotary_emb(argument, cos, sin, interleaved, inplace, offset, **where)
    np.testing.assert_allclose(out.detach().numpy(), formula(x), atol=1e-6)
    assert torch.equal(argument, out if inplace else x)
    copy = g.clone()
    (dx,) = torch.autograd.grad(out, source, g)
    np.testing.assert_allclose(dx.numpy(), formula(g, -sin), atol=1e-6)  # a rotation's derivative turns back
    assert torch.equal(g, copy)  # which is not ours to write to

    # The same outside of autograd: no graph, whatever wants gradients.
    argument = x.clone().requires_grad_()
    keywords = {"seqlen_offsets": offset, "interleaved": interleaved, **where}
    turned = apply_rotary(argument, cos, sin, inplace=inplace, **keywords)
    assert torch.equal(turned, out.detach()) and turned.grad_fn is None
    assert (turned is argument) == inplace and torch.equal(argument.detach(), turned if inplace else x)
    back = apply_rotary(turned.detach(), cos, sin, conjugate=True, **keywords)
    np.testing.assert_allclose(back.numpy(), x.numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_computes_in_float32_and_rounds_once(installed, dtype, interleaved):
    from flash_attn.layers.rotary import apply_rotary_emb

    x, (cos, sin) = torch.randn(1, 6, 2, DIM).to(dtype), tables(dtype=dtype)
    out = apply_rotary_emb(x, cos, sin, interleaved)
    exact = rotation(x[0].double().numpy(), cos.double().numpy(), sin.double().numpy(), interleaved, range(6))
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(out[0].double().numpy(), exact, rtol=0.51 * eps if eps > 1e-6 else 1e-15, atol=1e-6)


def test_leaves_and_views_may_be_rotated_in_place(installed):
    """As models call it: on parameters' own outputs, slices and what unbind gives."""
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = tables()
    x = torch.randn(1, LEN, 3, HEADS, DIM)
    expected = apply_rotary_emb(x[:, :, 0], cos, sin)
    makers = {
        "leaf": lambda x: x[:, :, 0].detach().clone().requires_grad_(),
        "slice of a leaf": lambda x: x.clone().requires_grad_()[:, :, 0],
        "unbind": lambda x: (x.clone().requires_grad_() * 1).unbind(2)[0],
        "slice": lambda x: (x.clone().requires_grad_() * 1)[:, :, 0],
    }
    for name, make in makers.items():
        argument = make(x)
        out = apply_rotary_emb(argument, cos, sin, inplace=True)
        assert torch.equal(out, expected) and torch.equal(argument, expected), name
        (dx,) = torch.autograd.grad(out.sum(), argument) if name == "leaf" else (None,)
        if dx is not None:
            assert torch.equal(dx, apply_rotary_emb(torch.ones_like(dx), cos, -sin)), name
        else:
            out.sum().backward()
    used = torch.randn(1, LEN, HEADS, DIM, requires_grad=True)
    h = used * 2
    apply_rotary_emb(h, cos, sin, inplace=True)  # whoever goes on with h has the right gradient too
    (dx,) = torch.autograd.grad(h.sum(), used)
    torch.testing.assert_close(dx, 2 * apply_rotary_emb(torch.ones_like(h), cos, -sin))
    twice = torch.randn(1, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    small = tables(4, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: apply_rotary_emb(x * 1, *small, inplace=True), twice)


def test_rotary_in_an_autograd_function_of_a_models_own(installed):
    """As ModernBERT calls it: q and k of packed projections as one view, rotated in place and back."""
    from flash_attn.ops.triton.rotary import apply_rotary

    starts, (cos, sin) = torch.tensor([0, 4, 9], dtype=torch.int32), tables(rows=5)
    where = {"cu_seqlens": starts, "max_seqlen": 5, "interleaved": False, "inplace": True}

    class Unpadded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, qkv):
            qkv = qkv.contiguous()
            apply_rotary(qkv[:, :2].view(len(qkv), -1, DIM), cos, sin, seqlen_offsets=0, **where)
            return qkv

        @staticmethod
        def backward(ctx, grad):
            grad = grad.contiguous()
            apply_rotary(grad[:, :2].view(len(grad), -1, DIM), cos, sin, seqlen_offsets=0, conjugate=True, **where)
            return grad

    qkv = torch.randn(9, 3, HEADS, DIM, requires_grad=True)
    given, g, rows = qkv.detach().clone(), torch.randn_like(qkv), [*range(4), *range(5)]
    out = Unpadded.apply(qkv * 1)
    (dqkv,) = torch.autograd.grad(out, qkv, g.clone())
    for got, of, sign in ((out.detach(), given, 1), (dqkv, g, -1)):
        expected = rotation(of[:, :2].flatten(1, 2).numpy(), cos.numpy(), sign * sin.numpy(), False, rows)
        np.testing.assert_allclose(got[:, :2].flatten(1, 2).numpy(), expected, atol=1e-6)
        assert torch.equal(got[:, 2], of[:, 2])


@pytest.mark.parametrize("kind", ["stacked", "merged"])
@pytest.mark.parametrize("own_k", [False, True])
def test_packed_projections_are_rotated_in_place(installed, kind, own_k):
    from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_

    cos, sin = tables(4)
    cos_k, sin_k = tables(4) if own_k else (None, None)
    offset = torch.tensor([0, 2], dtype=torch.int32)
    x = torch.randn(BATCH, LEN, 3, HEADS, DIM) if kind == "stacked" else torch.randn(BATCH, LEN, 4 + 2 * 2, DIM)
    source = x.clone().requires_grad_()
    heads_q = None if kind == "stacked" else 4
    out = apply_rotary_emb_qkv_(source * 1, cos, sin, cos_k, sin_k, seqlen_offsets=offset, num_heads_q=heads_q)

    def expected(x, sign=1):
        q, k, v = x.unbind(2) if kind == "stacked" else x.split([4, 2, 2], 2)
        q = apply_rotary_emb(q, cos, sign * sin, seqlen_offsets=offset)
        k = apply_rotary_emb(k, cos_k if own_k else cos, sign * (sin_k if own_k else sin), seqlen_offsets=offset)
        return torch.stack([q, k, v], 2) if kind == "stacked" else torch.cat([q, k, v], 2)

    assert torch.equal(out, expected(x))
    g = torch.randn_like(x)
    (dx,) = torch.autograd.grad(out, source, g)
    assert torch.equal(dx, expected(g, -1))
    plain = x.clone()
    assert apply_rotary_emb_qkv_(plain, cos, sin, cos_k, sin_k, False, offset, heads_q) is plain
    assert torch.equal(plain, out)

    kv = torch.randn(BATCH, LEN, 2, HEADS, DIM)
    source = kv.clone().requires_grad_()
    out = apply_rotary_emb_kv_(source * 1, cos, sin, seqlen_offsets=offset)
    assert torch.equal(out[:, :, 1], kv[:, :, 1])
    assert torch.equal(out[:, :, 0], apply_rotary_emb(kv[:, :, 0], cos, sin, seqlen_offsets=offset))
    (dkv,) = torch.autograd.grad(out, source, torch.ones_like(out))
    back = apply_rotary_emb(torch.ones_like(kv[:, :, 0]), cos, -sin, seqlen_offsets=offset)
    assert torch.equal(dkv[:, :, 0], back) and (dkv[:, :, 1] == 1).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_formula_in_pytorch(installed, interleaved):
    from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_torch, rotate_half

    cos, sin = tables(4, rows=LEN)
    x = torch.randn(BATCH, LEN, HEADS, DIM, requires_grad=True)
    expected = apply_rotary_emb(x, cos, sin, interleaved)
    for c, s in ((cos, sin), (cos.expand(BATCH, -1, -1), sin.expand(BATCH, -1, -1))):
        torch.testing.assert_close(apply_rotary_emb_torch(x, c, s, interleaved), expected)
    half = rotate_half(torch.tensor([1.0, 2, 3, 4]), interleaved).tolist()
    assert half == ([-2, 1, -4, 3] if interleaved else [-3, -4, 1, 2])


def test_rotary_embedding(installed):
    from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb

    module = RotaryEmbedding(dim=4, base=100.0, interleaved=True, pos_idx_in_fp32=False)
    assert not module.state_dict() and module.inv_freq.tolist() == pytest.approx([1, 0.1])
    assert module._cos_cached is None and module._seq_len_cached == 0
    qkv = torch.randn(BATCH, LEN, 3, HEADS, DIM)
    angles = np.arange(LEN + 2)[:, None] / np.array([1.0, 10.0])
    cos, sin = (torch.from_numpy(f(angles)).float() for f in (np.cos, np.sin))
    out = module(qkv.clone(), seqlen_offset=2)
    torch.testing.assert_close(module._cos_cached, cos)
    torch.testing.assert_close(module._sin_cached, sin)
    assert module._seq_len_cached == LEN + 2
    torch.testing.assert_close(out[:, :, 0], apply_rotary_emb(qkv[:, :, 0], cos, sin, True, seqlen_offsets=2))
    torch.testing.assert_close(out[:, :, 1], apply_rotary_emb(qkv[:, :, 1], cos, sin, True, seqlen_offsets=2))
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])

    kept = module._cos_cached
    q, kv = module(qkv[:, :, 0].clone(), kv=qkv[:, :, 1:].clone(), seqlen_offset=torch.tensor([2, 2]))
    assert torch.equal(q, out[:, :, 0]) and torch.equal(kv, out[:, :, 1:]) and module._cos_cached is kept
    merged = module(qkv.flatten(2, 3), seqlen_offset=2, num_heads_q=HEADS)
    assert torch.equal(merged, out.flatten(2, 3))

    # As ModernBERT's subclass does, in half precision: tables keep their precision until they are rounded.
    module.half()
    module._update_cos_sin_cache(3000, device=torch.device("cpu"), dtype=torch.float16)
    assert module._cos_cached.dtype == torch.float16
    assert module._cos_cached[2999, 0].item() == pytest.approx(math.cos(2999), abs=1e-3)
    with torch.inference_mode():
        module._update_cos_sin_cache(4000, device=torch.device("cpu"), dtype=torch.float32)
    assert not module._cos_cached.is_inference()  # or no training step could save it
    with pytest.raises(ArgumentError, match="pass max_seqlen"):
        RotaryEmbedding(4)(qkv, seqlen_offset=torch.tensor([2, 2]))


def test_xpos(installed):
    """Scores depend on the distance alone, and fade with it."""
    from flash_attn.layers.rotary import RotaryEmbedding

    n = 7
    module = RotaryEmbedding(DIM, scale_base=16.0)
    x = torch.randn(DIM, dtype=torch.float32).expand(1, n, 3, 1, DIM).clone()
    out = module(x.clone())
    scores = (out[0, :, 0, 0] @ out[0, :, 1, 0].T).double()
    for distance in range(n):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    i = np.arange(0, DIM, 2)
    scale = ((i + 0.4 * DIM) / (1.4 * DIM)) ** (3 / 16.0)
    a, b = x[0, 0, 0, 0, : DIM // 2].numpy(), x[0, 0, 0, 0, DIM // 2 :].numpy()
    expected = ((a * a + b * b) * scale * np.cos(3 * 10000.0 ** (-i / DIM))).sum()
    assert scores[5, 2].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    q, kv = module(x[:, :, 0].clone(), x[:, :, 1:].clone())
    assert torch.equal(q, out[:, :, 0]) and torch.equal(kv, out[:, :, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 8)}, "x is torch.float32 of shape"),
        ({"x": torch.zeros(2, 5, 3, 8, dtype=torch.int32)}, "must be of floats"),
        ({"x": np.zeros((2, 5, 3, 8))}, "x is a ndarray"),
        ({"cos": torch.zeros(12, 5), "sin": torch.zeros(12, 5)}, "rotary_dim up to head_dim=8"),
        ({"sin": torch.zeros(11, 4)}, "sin.shape=.11, 4."),
        ({"cos": torch.zeros(4, 4), "sin": torch.zeros(4, 4)}, "positions go from 0 to 4, and the tables have 4"),
        ({"seqlen_offsets": 8}, "positions go from 8 to 12, and the tables have 12"),
        ({"seqlen_offsets": -1}, "seqlen_offsets=-1 must be at least 0"),
        ({"seqlen_offsets": 1.0}, "seqlen_offsets=1.0 must be an int"),
        ({"seqlen_offsets": torch.tensor([0, 8])}, r"position \[12\] must be from 0 to 11"),
        ({"seqlen_offsets": torch.tensor([0, -1])}, r"position \[-1\] must be from 0 to 11"),
        ({"seqlen_offsets": torch.tensor([0])}, r"seqlen_offsets is torch.int64 of shape \(1,\)"),
        ({"seqlen_offsets": torch.tensor([0.0, 1.0])}, "seqlen_offsets is torch.float32"),
        ({"x": torch.zeros(9, 3, 8), "cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens is torch.float32"),
        ({"x": torch.zeros(13, 3, 8), "cu_seqlens": torch.tensor([0, 13])}, r"position \[12\] must be"),
        ({"x": torch.zeros(9, 3, 8), "cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 13}, "the tables have 12"),
    ],
)
def test_wrong_rotations_are_refused(installed, change, message):
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = tables()
    with pytest.raises(ArgumentError, match=message):
        apply_rotary_emb(**({"x": torch.zeros(2, 5, 3, 8), "cos": cos, "sin": sin} | change))


def test_torch_compile_keeps_rotary_in_one_graph(installed):
    from flash_attn.layers.rotary import RotaryEmbedding

    module = RotaryEmbedding(4)
    qkv = torch.randn(BATCH, LEN, 3, HEADS, DIM)
    expected = module(qkv.clone())
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(qkv.clone()), expected)


# modules.mha ----------------------------------------------------------------------------------------------------------


def test_alibi_slopes(installed):
    from flash_attn.modules.mha import get_alibi_slopes

    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(6) == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert [len(get_alibi_slopes(n)) for n in range(1, 70)] == list(range(1, 70))
    for wrong in (0, -4, 2.0, "8"):
        with pytest.raises(ArgumentError, match="nheads="):
            get_alibi_slopes(wrong)


def test_attention_as_modules(installed):
    from flash_attn.modules.mha import FlashCrossAttention, FlashSelfAttention, get_alibi_slopes

    slopes = torch.tensor(get_alibi_slopes(4))
    qkv, starts = torch.randn(2, 6, 3, 4, 16), torch.tensor([0, 6, 12], dtype=torch.int32)
    module = FlashSelfAttention(True, 0.3, 0.5, (3, 0), slopes, True).eval()
    keywords = {"softmax_scale": 0.3, "window_size": (3, 0), "alibi_slopes": slopes}
    assert torch.equal(module(qkv), cuflash.flash_attn_qkvpacked_func(qkv, causal=True, **keywords))
    assert torch.equal(module(qkv, causal=False), cuflash.flash_attn_qkvpacked_func(qkv, causal=False, **keywords))
    packed = module(qkv.flatten(0, 1), cu_seqlens=starts, max_seqlen=6)
    assert torch.equal(packed, module(qkv).flatten(0, 1))
    assert not module.state_dict()
    assert torch.equal(module.half()(qkv), cuflash.flash_attn_qkvpacked_func(
        qkv, causal=True, **keywords | {"alibi_slopes": slopes.half().float()}
    ))  # fmt: skip
    module.train()
    torch.manual_seed(3)
    dropped = module(qkv)
    torch.manual_seed(3)
    assert torch.equal(dropped, module(qkv)) and not torch.equal(dropped, module.eval()(qkv))

    q, kv = torch.randn(2, 3, 4, 16, requires_grad=True), torch.randn(2, 6, 2, 2, 16)
    cross = FlashCrossAttention(True, 0.3, 0.0, slopes, (3, 0), False)
    out = cross(q, kv)
    assert torch.equal(out, cuflash.flash_attn_kvpacked_func(q, kv, causal=True, **keywords))
    out.sum().backward()
    assert q.grad.abs().sum() > 0
    starts_q = torch.tensor([0, 3, 6], dtype=torch.int32)
    packed = cross(q.flatten(0, 1), kv.flatten(0, 1), None, starts_q, 3, starts, 6)
    assert torch.equal(packed, out.flatten(0, 1))
    with pytest.raises(ArgumentError, match="cu_seqlens_k is given"):
        cross(q, kv, cu_seqlens_k=starts)


# flash_attn_interface -------------------------------------------------------------------------------------------------


def test_the_signatures_are_those_of_flash_attn(installed):
    """Ring attention fills in arguments by their names, and takes what it does not know from the defaults."""
    from flash_attn import flash_attn_interface as interface

    def names(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    needed = inspect.Parameter.empty
    options = [
        "dropout_p",
        "softmax_scale",
        "causal",
        "window_size_left",
        "window_size_right",
        "softcap",
        "alibi_slopes",
    ]
    lengths = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    grads = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
    assert names(interface._flash_attn_forward) == [(n, needed) for n in ["q", "k", "v", *options, "return_softmax"]]
    assert names(interface._flash_attn_backward) == [
        *((n, needed) for n in [*grads, *options, "deterministic"]), ("rng_state", None)
    ]  # fmt: skip
    assert names(interface._flash_attn_varlen_forward) == [
        *((n, needed) for n in ["q", "k", "v", *lengths, *options[:3]]),
        ("window_size_left", -1), ("window_size_right", -1), ("softcap", 0.0), ("alibi_slopes", None),
        ("return_softmax", False), ("block_table", None), ("leftpad_k", None), ("seqused_k", None),
        ("zero_tensors", False), ("num_splits", 0),
    ]  # fmt: skip
    assert names(interface._flash_attn_varlen_backward) == [
        *((n, needed) for n in [*grads, *lengths, *options, "deterministic"]), ("rng_state", None),
        ("zero_tensors", False),
    ]  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_pass_forward_and_one_back(installed, packed, dropout_p):
    from flash_attn import flash_attn_func, flash_attn_interface, flash_attn_varlen_func

    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (5, 7)]
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    lengths = (*starts, 5, 7) if packed else ()
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        function = flash_attn_varlen_func
        forward = flash_attn_interface._flash_attn_varlen_forward
        backward = flash_attn_interface._flash_attn_varlen_backward
    else:
        function = flash_attn_func
        forward, backward = flash_attn_interface._flash_attn_forward, flash_attn_interface._flash_attn_backward
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    options = (dropout_p, 0.3, True, 3, 0, 2.0, slopes)

    torch.manual_seed(5)
    result = forward(q, k, v, *lengths, *options, return_softmax=dropout_p > 0)
    torch.manual_seed(5)
    out, lse, _ = function(q, k, v, *lengths, dropout_p, 0.3, True, (3, 0), 2.0, slopes, return_attn_probs=True)
    assert torch.equal(result[0], out) and torch.equal(result[1], lse)
    assert result[0].grad_fn is None and result[1].dtype == torch.float32
    assert result[2].numel() == 0 and result[3].shape == (2,) and result[3].dtype == torch.int64

    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    # Into slices of a larger buffer, as ring attention has one; and from a dout whose last dimension has a stride.
    buffers = [torch.full((len(x) + 1, *x.shape[1:]), torch.nan) for x in (q, k, v)]
    grads = [x[:-1] for x in buffers]
    strided = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
    delta = backward(
        strided, q, k, v, result[0], result[1], *grads, *lengths, *options, False, rng_state=result[3]
    )  # fmt: skip
    for name, got, want, buffer in zip("qkv", grads, expected, buffers, strict=True):
        torch.testing.assert_close(got, want, msg=f"d{name}")
        assert buffer[-1].isnan().all()
    torch.testing.assert_close(delta, (dout * out.detach()).sum(-1).transpose(-1, -2))
    only_dv = torch.empty_like(v)
    backward(dout, q, k, v, result[0], result[1], None, None, only_dv, *lengths, *options, False, result[3])
    torch.testing.assert_close(only_dv, expected[2])
    if dropout_p:
        with pytest.raises(ArgumentError, match="pass the rng_state"):
            backward(dout, q, k, v, result[0], result[1], *grads, *lengths, *options, False)


def test_two_halves_of_a_ring(installed):
    """Keys in two parts, merged by their lse; the backward of each part gets the whole's out and lse."""
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    q, k, v = (torch.randn(1, 6, 2, 16, dtype=torch.float64) for _ in range(3))
    options = (0.0, 0.25, False, -1, -1, 0.0, None)
    parts = [_flash_attn_forward(q, k[:, i], v[:, i], *options, False)[:2] for i in (slice(3), slice(3, 6))]
    outs, lses = zip(*parts, strict=True)
    out, lse = cuflash.merge_states(outs, lses)
    exact = reference.attention(q.numpy(), k.numpy(), v.numpy(), scale=0.25)
    np.testing.assert_allclose(out.numpy(), exact[0], atol=1e-6)
    dout, dq = torch.randn_like(q), torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for i in (slice(3), slice(3, 6)):
        part = torch.empty_like(q)
        _flash_attn_backward(dout, q, k[:, i], v[:, i], out, lse, part, dk[:, i], dv[:, i], *options, False)
        dq += part
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(cuflash.attention(*leaves, scale=0.25), leaves, dout)
    for got, want in zip((dq, dk, dv), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_pages_and_used_keys(installed):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward as forward

    k, v = torch.randn(2, 4, 2, 3, 16)  # [pages, page_size, heads, d]: the second pair of pages is nobody's
    q, starts = torch.randn(5, 3, 16), torch.tensor([0, 2, 5], dtype=torch.int32)
    table = torch.tensor([[2], [0]], dtype=torch.int32)
    used = torch.tensor([1, 2], dtype=torch.int32)
    rest = (0.0, None, False)
    starts_k = torch.tensor([0, 1, 3], dtype=torch.int32)
    gathered = [torch.cat([x[2, :1], x[0, :2]]) for x in (k, v)]
    expected = forward(q, *gathered, starts, starts_k, 3, 2, *rest)
    for lengths, keywords in ((starts_k, {}), (starts_k, {"seqused_k": used}), (None, {"seqused_k": used})):
        got = forward(q, k, v, starts, lengths, 3, 2, *rest, block_table=table, **keywords)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])
    roomy = [torch.cat([x[2, :2], x[0, :2]]) for x in (k, v)]
    wide = torch.tensor([0, 2, 4], dtype=torch.int32)
    got = forward(q, *roomy, starts, wide, 3, 2, *rest, seqused_k=used)
    torch.testing.assert_close(got[0], expected[0])
    for keywords, message in (({"leftpad_k": used}, "leftpad_k"), ({"num_splits": 4}, "num_splits=4")):
        with pytest.raises(UnsupportedError, match=message):
            forward(q, *gathered, starts, starts_k, 3, 2, *rest, **keywords)
    with pytest.raises(ArgumentError, match="q is a ndarray"):
        forward(q.numpy(), *gathered, starts, starts_k, 3, 2, *rest)


def test_the_functions_against_float64(installed):
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    exact = reference.attention(*(x.double().numpy() for x in (q, k, v)), causal=True)[0]
    np.testing.assert_allclose(flash_attn_func(q, k, v, causal=True).numpy(), exact, atol=1e-5)
    starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (5, 7)]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = flash_attn_varlen_func(*flat, *starts, 5, 7, causal=True)
    np.testing.assert_allclose(out.unflatten(0, (2, 5)).numpy(), exact, atol=1e-5)
