"""Packing in every framework: shapes, values, gradients, and what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuflash import errors, packing
from cuflash.reference import attention


def framework(name: str) -> SimpleNamespace:
    """`asarray` of the framework, its array type, and `host`, which gives a NumPy array back."""
    if name == "numpy":
        return SimpleNamespace(name=name, asarray=np.asarray, type=np.ndarray, host=np.asarray)
    if name == "torch":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        return SimpleNamespace(name=name, asarray=torch.tensor, type=torch.Tensor, host=lambda x: x.detach().numpy())
    if name == "jax":
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        return SimpleNamespace(name=name, asarray=jax.numpy.asarray, type=jax.Array, host=np.asarray)
    import cupy

    return SimpleNamespace(name=name, asarray=cupy.asarray, type=cupy.ndarray, host=cupy.asnumpy)


NAMES = ["numpy", "torch", "jax", pytest.param("cupy", marks=pytest.mark.gpu)]


@pytest.fixture(params=NAMES)
def xp(request) -> SimpleNamespace:
    return framework(request.param)


def is_int32(x: Any) -> bool:
    return str(x.dtype).removeprefix("torch.") == "int32"


LENGTHS = (3, 0, 5, 1)


def test_pack_and_unpack(xp, rng):
    sequences = [rng.standard_normal((n, 2, 4)).astype(np.float32) for n in LENGTHS]
    data, cu_seqlens, max_seqlen = packed = packing.pack([xp.asarray(x) for x in sequences])
    assert isinstance(data, xp.type) and isinstance(cu_seqlens, xp.type) and is_int32(cu_seqlens)
    np.testing.assert_array_equal(xp.host(data), np.concatenate(sequences))
    assert xp.host(cu_seqlens).tolist() == [0, 3, 3, 8, 9] and packed.max_seqlen == max_seqlen == 5

    for cu in (cu_seqlens, [0, 3, 3, 8, 9], np.array([0, 3, 3, 8, 9])):
        parts = packing.unpack(data, cu)
        assert len(parts) == 4 and all(isinstance(part, xp.type) for part in parts)
        for part, x in zip(parts, sequences, strict=True):
            np.testing.assert_array_equal(xp.host(part), x)
    assert packing.unpack(data, [0]) == []


def test_pack_an_iterator_of_one_dimension(xp):
    packed = packing.pack(xp.asarray(np.arange(n)) for n in (2, 3))
    assert xp.host(packed.data).tolist() == [0, 1, 0, 1, 2]


MASK = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
UNUSED = np.array([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8])
def test_unpad_and_pad(xp, dtype, rng):
    x = rng.standard_normal((3, 4, 2)).astype(np.float32)
    rows, indices, cu_seqlens, max_seqlen, seqused = packing.unpad_input(xp.asarray(x), xp.asarray(MASK.astype(dtype)))
    assert all(isinstance(a, xp.type) for a in (rows, indices, cu_seqlens, seqused))
    np.testing.assert_array_equal(xp.host(rows), x[MASK == 1])
    assert xp.host(indices).tolist() == [0, 1, 5, 6, 7]
    assert xp.host(cu_seqlens).tolist() == [0, 2, 5, 5] and is_int32(cu_seqlens)
    assert max_seqlen == 3 and type(max_seqlen) is int
    assert xp.host(seqused).tolist() == [2, 3, 0] and is_int32(seqused)

    padded = packing.pad_input(rows, indices, 3, 4)
    assert isinstance(padded, xp.type)
    np.testing.assert_array_equal(xp.host(padded), np.where(MASK[:, :, None] == 1, x, 0))


def test_unpad_with_unused_rows(xp, rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    rows, indices, cu_seqlens, max_seqlen, seqused = packing.unpad_input(*map(xp.asarray, (x, MASK, UNUSED)))
    np.testing.assert_array_equal(xp.host(rows), x[(MASK | UNUSED) == 1])
    assert xp.host(indices).tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert xp.host(cu_seqlens).tolist() == [0, 3, 6, 7] and max_seqlen == 3
    assert xp.host(seqused).tolist() == [2, 3, 0]


def test_unpad_nothing(xp):
    empty = packing.unpad_input(xp.asarray(np.zeros((0, 4, 2))), xp.asarray(np.zeros((0, 4), bool)))
    assert tuple(empty[0].shape) == (0, 2) and xp.host(empty[2]).tolist() == [0] and empty[3] == 0
    dropped = packing.unpad_input(xp.asarray(np.ones((2, 4))), xp.asarray(np.zeros((2, 4), bool)))
    assert xp.host(dropped[2]).tolist() == [0, 0, 0] and dropped[3] == 0
    assert xp.host(packing.pad_input(dropped[0], dropped[1], 2, 4)).tolist() == [[0] * 4] * 2


def test_cu_seqlens_from(xp):
    for given in (
        {"lengths": xp.asarray(np.array(LENGTHS))},
        {"lengths": xp.asarray(np.array(LENGTHS, np.int16))},
        {"mask": xp.asarray(np.arange(6) < np.array(LENGTHS)[:, None])},
        {"mask": xp.asarray((np.arange(6) < np.array(LENGTHS)[:, None]).astype(np.int32))},
    ):
        cu_seqlens = packing.cu_seqlens_from(**given)
        assert isinstance(cu_seqlens, xp.type) and is_int32(cu_seqlens)
        assert xp.host(cu_seqlens).tolist() == [0, 3, 3, 8, 9]
    for positions, expected in (
        ([0, 1, 2, 0, 0, 1], [0, 3, 4, 6]),
        ([[0, 1, 2], [0, 1, 0]], [0, 3, 5, 6]),
        ([0], [0, 1]),
        (np.zeros(0, np.int64), [0]),
    ):
        cu_seqlens = packing.cu_seqlens_from(position_ids=xp.asarray(np.array(positions)))
        assert isinstance(cu_seqlens, xp.type) and is_int32(cu_seqlens) and xp.host(cu_seqlens).tolist() == expected


def test_lengths_of_the_host():
    for lengths in ([3, 0, 2], (3, 0, 2), [np.int64(3), 0, 2]):
        cu_seqlens = packing.cu_seqlens_from(lengths=lengths)
        assert isinstance(cu_seqlens, np.ndarray) and cu_seqlens.tolist() == [0, 3, 3, 5]
    assert packing.cu_seqlens_from(lengths=[]).tolist() == [0]


def test_what_is_packed_is_what_attention_takes(rng):
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x = rng.standard_normal((2, 5, 2, 8))
    rows, indices, cu_seqlens, _, _ = packing.unpad_input(x, mask)
    out = attention(rows, rows, rows, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)[0]
    padded = packing.pad_input(out, indices, 2, 5)
    used = mask.sum(axis=1)
    expected = attention(x, x, x, seqused_q=used, seqused_k=used, causal=True)[0]
    np.testing.assert_array_equal(padded, expected)


# Gradients. ----------------------------------------------------------------------------------------------------------


def test_gradients_in_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    sequences = [torch.ones(n, 2, requires_grad=True) for n in LENGTHS]
    packed = packing.pack(sequences)
    sum((b + 1) * part.sum() for b, part in enumerate(packing.unpack(packed.data, packed.cu_seqlens))).backward()
    assert [x.grad.tolist() for x in sequences] == [[[b + 1.0] * 2] * n for b, n in enumerate(LENGTHS)]

    x = torch.ones(3, 4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor(MASK)

    def there_and_back(x):
        rows, indices, *_ = packing.unpad_input(x, mask)
        return packing.pad_input(rows**2, indices, 3, 4)

    assert torch.autograd.gradcheck(there_and_back, x)
    there_and_back(x).sum().backward()
    assert x.grad[:, :, 0].tolist() == (2.0 * MASK).tolist()


def test_gradients_in_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")

    def weighted(sequences):
        packed = packing.pack(sequences)
        parts = packing.unpack(packed.data, np.cumsum([0, *LENGTHS]))
        return sum((b + 1) * part.sum() for b, part in enumerate(parts)) + packed.cu_seqlens.sum()

    sequences = [jax.numpy.ones((n, 2)) for n in LENGTHS]
    for f in (weighted, jax.jit(weighted)):
        gradients = jax.grad(f)(sequences)
        assert [g.tolist() for g in gradients] == [[[b + 1.0] * 2] * n for b, n in enumerate(LENGTHS)]

    mask = jax.numpy.asarray(MASK)

    def there_and_back(x):
        rows, indices, *_ = packing.unpad_input(x, mask)
        return packing.pad_input(rows**2, indices, 3, 4).sum()

    assert jax.grad(there_and_back)(jax.numpy.ones((3, 4, 2)))[:, :, 0].tolist() == (2.0 * MASK).tolist()


def test_views_not_copies():
    data = np.arange(6)
    assert all(np.shares_memory(part, data) for part in packing.unpack(data, [0, 2, 6]))


# Bad input: value, rule, remedy. -------------------------------------------------------------------------------------

X = np.zeros((2, 3, 4))
REFUSED = {
    "no sequence": (lambda: packing.pack([]), "arrays=[] must hold at least one sequence", "length 0"),
    "a list": (lambda: packing.pack([[1, 2]]), "arrays[0] is a list, not an array of", "asarray"),
    "scalars": (lambda: packing.pack([np.array(1.0)]), "arrays[0].shape=() must be (length", "first dimension"),
    "trailing shapes": (
        lambda: packing.pack([np.zeros((2, 3)), np.zeros((2, 4))]),
        "arrays[1].shape=(2, 4) must be (length, *(3,))",
        "only the first dimension may differ",
    ),
    "dtypes": (
        lambda: packing.pack([np.zeros(2, np.float32), np.zeros(2, np.float16)]),
        "arrays[1].dtype=float16 must be float32",
        "cast it",
    ),
    "cu_seqlens from 1": (lambda: packing.unpack(X, [1, 2]), "cu_seqlens=[1, 2] must begin with 0", "cu_seqlens_from"),
    "cu_seqlens empty": (lambda: packing.unpack(X, []), "cu_seqlens=[] must begin with 0", "cu_seqlens_from"),
    "cu_seqlens falling": (lambda: packing.unpack(X, [0, 2, 1]), "cu_seqlens[2]=1 must lie between", "counts the rows"),
    "cu_seqlens beyond": (lambda: packing.unpack(X, [0, 3]), "cu_seqlens[1]=3 must lie between", "data.shape[0]=2"),
    "cu_seqlens of floats": (lambda: packing.unpack(X, np.zeros(2)), "cu_seqlens.dtype=float64 must be", "cast"),
    "cu_seqlens of two dimensions": (
        lambda: packing.unpack(X, np.zeros((2, 2), int)),
        "cu_seqlens.shape=(2, 2) must have 1 dimension",
        "reshape",
    ),
    "mask shape": (
        lambda: packing.unpad_input(X, np.ones((2, 4), int)),
        "mask.shape=(2, 4) must be [batch, len], the first two dimensions of (2, 3, 4)",
        "",
    ),
    "mask of floats": (
        lambda: packing.unpad_input(X, np.zeros((2, 3))),
        "mask.dtype=float64 must be bool or an integer",
        "mask == 0 for an additive mask",
    ),
    "unused_mask of floats": (
        lambda: packing.unpad_input(X, np.ones((2, 3), bool), np.zeros((2, 3))),
        "unused_mask.dtype=float64",
        "unused_mask == 0",
    ),
    "indices": (
        lambda: packing.pad_input(X, np.arange(3), 2, 3),
        "indices.shape=(3,) must be (2,), one place for each row of x",
        "unpad_input",
    ),
    "two sources": (
        lambda: packing.cu_seqlens_from(lengths=[1], mask=np.ones((1, 1), bool)),
        "lengths and mask given: cu_seqlens_from takes exactly one",
        "leave the others out",
    ),
    "no source": (lambda: packing.cu_seqlens_from(), "nothing given: cu_seqlens_from takes exactly one", ""),
    "negative length": (
        lambda: packing.cu_seqlens_from(lengths=[2, -1]),
        "lengths[1]=-1 must be an integer of at least 0",
        "counts the rows",
    ),
    "length of a half": (lambda: packing.cu_seqlens_from(lengths=[0.5]), "lengths[0]=0.5 must be an integer", ""),
    "lengths of floats": (lambda: packing.cu_seqlens_from(lengths=np.ones(2)), "lengths.dtype=float64", "cast"),
    "too many rows": (
        lambda: packing.cu_seqlens_from(lengths=[2**30, 2**30]),
        "sum(lengths)=2147483648 must be below 2**31",
        "split the batch",
    ),
    "positions from 1": (
        lambda: packing.cu_seqlens_from(position_ids=np.array([1, 2, 0])),
        "position_ids begin with [1], not with 0",
        "lengths=",
    ),
    "a number for arrays": (lambda: packing.pack(1.5), "arrays is a float and must be a sequence", "pass a list"),
    "a dtype": (lambda: packing.pack([np.dtype("f4")]), "arrays[0] is a numpy.dtypes.Float32DType, not an array", ""),
    "a matrix": (lambda: packing.unpad_input(X[0].view(np.matrix), X), "x is a numpy.matrix", "np.asarray(x)"),
    "rows past memory": (
        lambda: packing.pack([np.broadcast_to(X[:1], (2**31, 3, 4))]),
        "sum(lengths)=2147483648 must be below 2**31",
        "split the batch",
    ),
    "a scalar to unpack": (lambda: packing.unpack(np.float32(1), [0]), "data.shape=() must be [total, ...]", ""),
    "cu_seqlens a dict": (lambda: packing.unpack(X, {}), "cu_seqlens is a dict, not an array", "asarray"),
    "cu_seqlens a text": (lambda: packing.unpack(X, "02"), "cu_seqlens[0]='0' must be an int", ""),
    "cu_seqlens of None": (lambda: packing.unpack(X, [None]), "cu_seqlens[0]=None must be an int", ""),
    "cu_seqlens of halves": (lambda: packing.unpack(X, [0, 1.5]), "cu_seqlens[1]=1.5 must be an int", ""),
    "indices a list": (lambda: packing.pad_input(X, [0, 1], 1, 3), "indices is a list, not an array", "asarray"),
    "indices past the rows": (
        lambda: packing.pad_input(X, np.array([0, 6]), 2, 3),
        "indices[1]=6 must be from 0 to 5",
        "the batch and length",
    ),
    "indices below 0": (lambda: packing.pad_input(X, np.array([-1, 0]), 2, 3), "indices[0]=-1 must be from 0 to 5", ""),
    "indices of floats": (lambda: packing.pad_input(X, np.zeros(2), 2, 3), "indices.dtype=float64 must be an int", ""),
    "a batch of a float": (lambda: packing.pad_input(X, np.arange(2), 2.0, 3), "batch=2.0 must be an int", ""),
    "a batch below 0": (lambda: packing.pad_input(X, np.arange(2), -2, 3), "batch=-2 must be from 0 to", ""),
    "a batch too large": (lambda: packing.pad_input(X, np.arange(2), 2**20, 2**12), "must be below 2**31", "split"),
    "a length too large": (lambda: packing.pad_input(X, np.arange(2), 2, np.uint64(2**63)), "seqlen=9223372036854", ""),
    "unsigned lengths": (
        lambda: packing.cu_seqlens_from(lengths=np.array([2**63, 2**63], np.uint64)),
        "sum(lengths)=18446744073709551616 must be below 2**31",
        "split the batch",
    ),
    "positions of floats": (
        lambda: packing.cu_seqlens_from(position_ids=np.zeros(2)),
        "position_ids.dtype=float64",
        "cast",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, says, remedy = REFUSED[name]
    with pytest.raises(errors.ArgumentError, match=re.escape(says)) as caught:
        call()
    assert remedy in str(caught.value)


def test_mixed_frameworks_are_refused():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(errors.ArgumentError, match=re.escape("arrays[1] is a torch.Tensor, arrays[0] a numpy.ndarray")):
        packing.pack([np.zeros(2), torch.zeros(2)])
    with pytest.raises(errors.ArgumentError, match=re.escape("mask is a numpy.ndarray, x a torch.Tensor")):
        packing.unpad_input(torch.zeros(2, 3), np.ones((2, 3), bool))


def test_subclasses_are_arrays_of_their_framework():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    assert tuple(packing.pack([parameter, parameter]).data.shape) == (4, 3)
    assert packing.pack([np.ma.ones(2)]).data.shape == (2,)


def test_indices_of_a_tensor_on_the_host_are_checked():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(errors.ArgumentError, match=re.escape("indices[1]=6 must be from 0 to 5")):
        packing.pad_input(torch.zeros(2, 4), torch.tensor([0, 6]), 2, 3)
    with pytest.raises(errors.ArgumentError, match="x is a nested or sparse tensor"):
        packing.pad_input(torch.eye(2).to_sparse(), torch.tensor([0, 1]), 2, 3)


def test_lengths_the_host_knows_break_no_graph():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch._dynamo.reset()
    x = torch.randn(9, 2)
    compiled = lambda f: torch.compile(f, backend="eager", fullgraph=True)  # noqa: E731
    pack = compiled(lambda *arrays: tuple(packing.pack(arrays)))
    for sequences in ([x, x[:3]], [x[:5], x[:4]]):  # other lengths: the same graph, or another one
        data, starts, longest = pack(*sequences)
        assert torch.equal(data, torch.cat(sequences)) and starts.dtype == torch.int32
        assert starts.tolist() == [0, len(sequences[0]), len(data)] and longest == len(sequences[0])
    for starts in (np.array([0, 2, 9]), [0, 2, 9]):
        parts = compiled(lambda x, starts=starts: packing.unpack(x, starts))(x)
        assert [len(part) for part in parts] == [2, 7] and torch.equal(torch.cat(parts), x)
    with pytest.raises(RuntimeError):  # what only the run can know, the run refuses
        compiled(lambda x, starts: packing.unpack(x, starts))(x, np.array([0, 2, 10]))


def test_traced_cu_seqlens_cannot_shape_what_is_unpacked():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    with pytest.raises(errors.ArgumentError, match=r"cu_seqlens is traced.*pass it as a NumPy array"):
        jax.jit(lambda x, starts: packing.unpack(x, starts))(jax.numpy.zeros(3), jax.numpy.array([0, 3]))
