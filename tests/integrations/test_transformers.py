"""Tiny random models of Hugging Face Transformers on the CPU: the same logits and gradients as with PyTorch's own."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral, window of 3": lambda: transformers.MistralConfig(**SIZES, sliding_window=3),
    "gemma2, softcap and windows": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=3, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
}
LENGTHS = (7, 4, 1)


@pytest.fixture(autouse=True)
def registered():
    from cuflash.integrations import transformers as integration

    integration.register()
    torch.manual_seed(0)


def models(config, other="sdpa"):
    """The same random weights with cuflash and with the other attention."""
    made = []
    for implementation in ("cuflash", other):
        torch.manual_seed(1)
        made.append(transformers.AutoModelForCausalLM.from_config(config(), attn_implementation=implementation).eval())
    assert made[0].config._attn_implementation == "cuflash"
    return made


def padded(side):
    ids, mask = torch.randint(1, 64, (len(LENGTHS), max(LENGTHS))), torch.zeros(len(LENGTHS), max(LENGTHS), dtype=int)
    for i, n in enumerate(LENGTHS):
        mask[i, slice(0, n) if side == "right" else slice(max(LENGTHS) - n, None)] = 1
    return ids * mask, mask


def assert_same(one, other, kept=None, **inputs):
    """Logits where `kept`, and the gradients of all parameters."""
    results = []
    for model in (one, other):
        model.zero_grad()
        logits = model(**inputs).logits
        logits = logits if kept is None else logits[kept]
        logits.square().sum().backward()
        results.append((logits, *[p.grad for p in model.parameters()]))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-4)


# SDPA has no softcap: there the model written out by hand is the measure.
def measure(name):
    return "eager" if "softcap" in name else "sdpa"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_batches(name, side):
    ids, mask = padded(side)
    assert_same(*models(CONFIGS[name], measure(name)), kept=mask.bool(), input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_batches(name):
    assert_same(*models(CONFIGS[name], measure(name)), input_ids=torch.randint(1, 64, (2, 9)))


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_batches_equal_one_by_one(name, how):
    ours, other = models(CONFIGS[name], measure(name))
    parts = [torch.randint(1, 64, (1, n)) for n in LENGTHS]
    inputs = {"input_ids": torch.cat(parts, 1), "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    if how == "cu_seq_lens":
        starts = torch.tensor([0, 7, 11, 12])
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    got = ours(**inputs, use_cache=False).logits
    got.square().sum().backward()
    want = torch.cat([other(input_ids=x).logits for x in parts], 1)
    want.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    for p, r in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, r.grad, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_left_padding(name):
    ours, other = models(CONFIGS[name], measure(name))
    ids, mask = padded("left")
    runs = [
        m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (ours, other)
    ]
    assert torch.equal(*runs)


def test_sinks():
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 3}
    ids, mask = padded("right")
    ours, other = models(lambda: transformers.GptOssConfig(**sizes), "eager")
    assert_same(ours, other, kept=mask.bool(), input_ids=ids, attention_mask=mask)


def test_a_bidirectional_encoder():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    ids, mask = padded("right")
    got = []
    for implementation in ("cuflash", "sdpa"):
        torch.manual_seed(1)
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
        got.append(model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*got, rtol=2e-4, atol=2e-4)
