"""A training step on sequences of unequal length, packed end to end, under jax.jit and value_and_grad. JAX.

The lengths are an argument of the compiled step: batches with other lengths and the same total run without compiling.
"""

import jax
import jax.numpy as jnp
import numpy as np

import cuflash

HEADS, HEAD_DIM, TOKENS = 4, 32, 16
WIDTH = HEADS * HEAD_DIM


def loss_of(weights, ids, targets, cu_seqlens):  # ids [total]: all sequences, end to end
    x = weights["embed"][ids]
    q, k, v = jnp.moveaxis((x @ weights["qkv"]).reshape(-1, 3, HEADS, HEAD_DIM), 1, 0)
    attended = cuflash.attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)
    logits = (x + attended.reshape(-1, WIDTH)) @ weights["out"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1).mean()


@jax.jit
def step(weights, ids, targets, cu_seqlens):
    print("compiling the step")  # happens while JAX traces, once
    loss, grads = jax.value_and_grad(loss_of)(weights, ids, targets, cu_seqlens)
    return jax.tree.map(lambda w, g: w - 0.3 * g, weights, grads), loss


def batch(*lengths_and_periods):
    sentences = [np.arange(n) % period for n, period in lengths_and_periods]
    packed = cuflash.packing.pack([s[:-1] for s in sentences])
    return jax.device_put((packed.data, np.concatenate([s[1:] for s in sentences]), packed.cu_seqlens))


shapes = {"embed": (TOKENS, WIDTH), "qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, TOKENS)}
keys = jax.random.split(jax.random.key(0), 3)
weights = {n: 0.1 * jax.random.normal(key, shape) for (n, shape), key in zip(shapes.items(), keys, strict=True)}

batches = [batch((5, 2), (9, 3), (40, 4), (20, 5)), batch((31, 2), (3, 2), (30, 7), (10, 3))]  # 70 tokens each
losses = []
for n in range(40):
    weights, loss = step(weights, *batches[n % 2])
    losses.append(float(loss))

print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
print(f"cu_seqlens of the batches: {[b[2].tolist() for b in batches]}")
assert losses[-1] < losses[0] / 2
