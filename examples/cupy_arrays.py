"""Attention and its gradients without a deep-learning framework: CuPy arrays, or NumPy's where there is no CuPy."""

import numpy as np

import cuflash

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:
    xp = np
    print("no CuPy with a GPU here: the same lines with NumPy arrays, on the CPU")

rng = np.random.default_rng(0)
q = xp.asarray(rng.standard_normal((2, 100, 8, 64)), np.float16)  # [batch, len, heads, head dim]
# GQA: each of 2 key heads serves 4 query heads
k, v = (xp.asarray(rng.standard_normal((2, 120, 2, 64)), np.float16) for _ in range(2))
options = dict(causal=True, window_size=(64, 0), softcap=30.0)

out, lse, *_ = cuflash.attention(q, k, v, **options, aux=("lse",))
dout = xp.ones_like(out)
grads = cuflash.attention_backward(dout, q, k, v, out, lse, **options)

print(f"out {type(out).__module__}.{type(out).__name__} {out.shape} {out.dtype}, lse {lse.shape} {lse.dtype}")
print(f"dq {grads.dq.shape}, dk {grads.dk.shape}, dv {grads.dv.shape}")
print(cuflash.explain(q, k, v, **options))
