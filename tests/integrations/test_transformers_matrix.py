"""Forty tiny random models of Hugging Face Transformers on the CPU: what each gives with cuflash and with eager
attention, in float32: logits, gradients of all parameters, and generated tokens."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.24")

from cuflash.errors import UnsupportedError  # noqa: E402
from cuflash.integrations import transformers as integration  # noqa: E402

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
MIXTURE = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
LLAMA4 = {**GROUPED, **MIXTURE, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}

DECODERS = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 3},
    "Mixtral": {**GROUPED, **MIXTURE, "sliding_window": None},
    "Phi": COMMON,
    "Phi3": {**GROUPED, "sliding_window": None},
    "GPT2": COMMON,
    "GPTBigCode": COMMON,
    "GPTNeoX": COMMON,
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, **ALTERNATE, "use_sliding_window": True},
    "Gemma": GROUPED,
    "Gemma2": {**GROUPED, **ALTERNATE, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**GROUPED, **ALTERNATE, "query_pre_attn_scalar": 8},
    "GptOss": {**GROUPED, **MIXTURE, **ALTERNATE},
    "Llama4Text": {**LLAMA4, "attention_chunk_size": 4, "layer_types": ["chunked_attention", "full_attention"]},
    "OPT": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "StableLm": GROUPED,
    "Cohere": GROUPED,
    "Cohere2": {**GROUPED, **ALTERNATE},
    "Olmo2": GROUPED,
    "SmolLM3": GROUPED,
    "Granite": GROUPED,
    "Starcoder2": {**GROUPED, "sliding_window": 3},
    "Persimmon": COMMON,
    "BioGpt": COMMON,
    "Glm": {**GROUPED, "pad_token_id": 0},
}
ENCODERS = {
    "Bert": COMMON,
    "Roberta": COMMON,
    "Electra": {**COMMON, "embedding_size": 16},
    "DistilBert": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
    "ModernBert": {**COMMON, "local_attention": 4, "global_attn_every_n_layers": 2},
    "Albert": {**COMMON, "embedding_size": 16},
    "XLMRoberta": COMMON,
}
ENCODER_DECODERS = {
    "Bart": SEQ2SEQ,
    "MBart": SEQ2SEQ,
    "Marian": SEQ2SEQ,
    "M2M100": SEQ2SEQ,
    "Pegasus": SEQ2SEQ,
    "Blenderbot": SEQ2SEQ,
    "T5": T5,
    "MT5": {**T5, "tie_word_embeddings": False},
}
NO_DROPOUT = dict.fromkeys(
    "attention_dropout dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout attention_probs_dropout_prob "
    "hidden_dropout_prob activation_dropout dropout_rate classifier_dropout".split(),
    0.0,
)
AUTO = {
    **dict.fromkeys(DECODERS, "AutoModelForCausalLM"),
    **dict.fromkeys(ENCODERS, "AutoModel"),
    **dict.fromkeys(ENCODER_DECODERS, "AutoModelForSeq2SeqLM"),
}
SIZES = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
BATCH, LENGTH = 3, 11


@pytest.fixture(autouse=True, scope="module")
def registered():
    integration.register()
    integration.register("streaming")  # a name that Transformers sees no build of flash-attn in


# Everything made is dropped with the next model: tests come model by model.
_made: dict[str, tuple] = {}


def models(name):
    """The same random weights with cuflash and with eager attention."""
    if name not in _made:
        made = []
        for implementation in ("cuflash", "eager"):
            config_class = getattr(transformers, name + "Config")
            known = set(config_class().to_dict())
            config = config_class(**{**{k: v for k, v in NO_DROPOUT.items() if k in known}, **SIZES[name]})
            auto = getattr(transformers, AUTO[name])
            made.append(auto.from_config(config, attn_implementation=implementation).eval())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in made[0].parameters():  # so large that it shows which keys a query sees
                if weight.ndim > 1:
                    weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5, generator=generator)
        made[1].load_state_dict(made[0].state_dict())
        assert made[0].config._attn_implementation == "cuflash"
        _made.clear()
        _made[name] = tuple(made)
    return _made[name]


def tokens(batch=BATCH, length=LENGTH, seed=0):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(how, lengths=(LENGTH, LENGTH - 3, 2)):
    mask = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        if how == "right":
            mask[row, n:] = 0
        elif how == "left":
            mask[row, : max(lengths) - n] = 0
    if how == "holes":
        mask[0, 2:4] = mask[1, 5] = mask[2, 0] = mask[2, 3:6] = 0
    return mask


def assert_close(ours, eager, what, least=0.0):
    """Equal in float32: after a few layers about 4e-5 of the largest value are seen, in T5, whose scores are large."""
    error, scale = (ours - eager).abs().max().item(), eager.abs().max().item()
    assert error <= 1e-4 * max(scale, least), f"{what}: off by {error}, the largest being {scale}"


def assert_same(name, rows=None, key="logits", **inputs):
    """What the models return where `rows`, and the gradients of all parameters."""
    results = []
    for model in models(name):
        model.zero_grad()
        out = getattr(model(**inputs), key)
        out = out if rows is None else out[rows.bool()]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (out * weights).sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, our_grads), (eager, eager_grads) = results
    assert_close(ours, eager, "result")
    assert our_grads.keys() == eager_grads.keys()
    least = 0.01 * max(x.abs().max().item() for x in eager_grads.values())  # a bias of keys has none but round-off
    for parameter, gradient in eager_grads.items():
        assert_close(our_grads[parameter], gradient, parameter, least)


def assert_generates_the_same(name, inputs, **how):
    """Six tokens, and the scores they were chosen by."""
    results = []
    for model in models(name):
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, output_scores=True, return_dict_in_generate=True, **how
        )
        results.append((out.sequences, torch.stack(out.scores)))
    (ours, our_scores), (eager, eager_scores) = results
    finite = eager_scores.isfinite()
    assert_close(our_scores[finite], eager_scores[finite], "scores")
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("how", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, how):
    if how == "none":
        return assert_same(name, input_ids=tokens())
    mask = padding(how)
    assert_same(name, mask, input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("name", DECODERS)
def test_packed(name):
    positions = torch.cat([torch.arange(n) for n in (5, 1, 3, 2)])[None].expand(BATCH, -1)
    if "position_ids" not in inspect.signature(models(name)[0].forward).parameters:
        pytest.skip("takes no position_ids")
    assert_same(name, input_ids=tokens(), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("how", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate(name, how, cache):
    # To the right so little that the last query, which may be padding, sees a key in every window and chunk.
    lengths = (LENGTH, LENGTH - 1, LENGTH - 2) if how == "right" else (LENGTH, LENGTH - 3, 2)
    inputs = {"input_ids": tokens(), "attention_mask": padding(how, lengths)}
    assert_generates_the_same(name, inputs, cache_implementation=None if cache == "dynamic" else cache)


@pytest.mark.parametrize("how", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, how):
    mask = padding(how)
    inputs = {} if how == "none" else {"attention_mask": mask}
    assert_same(name, mask, "last_hidden_state", input_ids=tokens(), **inputs)


@pytest.mark.parametrize("length", [LENGTH, 5])
@pytest.mark.parametrize("how", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders(name, how, length):
    """The encoder's padding and the decoder's, of one length and of two."""
    mask, theirs = padding(how), padding("right", (length, length - 3, 2))
    inputs = {} if how == "none" else {"attention_mask": mask, "decoder_attention_mask": theirs}
    rows = None if how == "none" else theirs
    assert_same(name, rows, input_ids=tokens(), decoder_input_ids=tokens(length=length, seed=1), **inputs)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("how", ["none", "left", "right"])
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_generate(name, how, cache):
    inputs = {"input_ids": tokens(), "attention_mask": padding(how)}
    assert_generates_the_same(name, inputs, cache_implementation=None if cache == "dynamic" else cache)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "Llama4Text"])
def test_a_cache_that_is_filled_piece_by_piece(name, kind):
    """Queries in the middle of a cache: pieces of 4, 5, 1 and 1 token, with padding on the left."""
    mask, results = padding("left"), []
    for model in models(name):
        static = kind == "static"
        cache = (
            transformers.StaticCache(model.config, max_cache_len=16)
            if static
            else transformers.DynamicCache(config=model.config)
        )
        pieces = []
        with torch.no_grad():
            for begin, end in ((0, 4), (4, 9), (9, 10), (10, 11)):
                inputs = {"input_ids": tokens()[:, begin:end], "attention_mask": mask[:, :end]}
                pieces.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
        results.append(torch.cat(pieces, 1)[mask.bool()])
    assert_close(*results, "logits")


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_written_out(kind):
    """[batch, 1, q_len, k_len] with gaps anywhere: not causal, and another in each sequence."""
    seen = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    ours, eager = models("Llama")
    got = ours(tokens(), attention_mask=seen if kind == "bool" else added).logits
    assert_close(got, eager(tokens(), attention_mask=added).logits, "logits")


def test_rules_without_a_name_are_written_out():
    """As image tokens that see each other: a union of rules."""
    from transformers.masking_utils import create_causal_mask

    results = []
    for model in models("Llama"):
        mask = create_causal_mask(
            model.config, torch.zeros(BATCH, LENGTH, 32), padding("right"), None, or_mask_function=_prefix
        )
        results.append(model(tokens(), attention_mask=mask).logits)
    assert_close(*results, "logits")


def _prefix(b, h, q_idx, kv_idx):
    return kv_idx < 4


def test_a_name_without_flash():
    """Transformers takes it for no build of flash-attn."""
    _, eager = models("Llama4Text")
    made = type(eager)._from_config(eager.config, attn_implementation="streaming").eval()
    made.load_state_dict(eager.state_dict())
    assert made.config._attn_implementation == "streaming"
    assert_close(made(tokens()).logits, eager(tokens()).logits, "logits")


def test_beams_keep_the_masks_of_encoders():
    inputs = {"input_ids": tokens(), "attention_mask": padding("left"), "num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(*[model.generate(**inputs, do_sample=False) for model in models("Bart")])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    ours, eager = models("Llama")
    mask, gradients = padding("right"), []
    ours.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (ours, eager):
        model.zero_grad()
        model(tokens(), attention_mask=mask, use_cache=False).logits[mask.bool()].square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    ours.eval().gradient_checkpointing_disable()
    assert_close(*gradients, "gradient")


@pytest.mark.parametrize("name", ["Llama", "Llama4Text", "T5"])
def test_compiled(name):
    """Graphs break at masks and at attention with one; what they give is the same."""
    ours, eager = models(name)
    torch.compiler.reset()
    inputs = {"attention_mask": padding("left")} | ({"decoder_input_ids": tokens(seed=1)} if name == "T5" else {})
    kept = slice(None) if name == "T5" else padding("left").bool()
    got = torch.compile(ours, backend="eager")(tokens(), use_cache=False, **inputs).logits[kept]
    assert_close(got, eager(tokens(), use_cache=False, **inputs).logits[kept], "logits")


def test_a_compiled_step_of_generation():
    ours, eager = models("Llama")
    torch.compiler.reset()
    compiled = transformers.CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True  # not on GPUs alone
    inputs = {"input_ids": tokens(), "attention_mask": padding("left"), "max_new_tokens": 4, "do_sample": False}
    got = ours.generate(**inputs, cache_implementation="static", compile_config=compiled)
    assert torch.equal(got, eager.generate(**inputs))


def test_continuous_batching():
    """The manager takes the name for flash-attn's and makes no masks."""
    ours, _ = models("Mistral")
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    prompts = [row[:n].tolist() for row, n in zip(tokens(), (11, 3, 6), strict=True)]
    outs = ours.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    alone = [ours.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    assert [x.generated_tokens for x in outs.values()] == alone


def test_queries_that_see_nothing_are_zero():
    """Where a window holds nothing but padding. (Eager attention takes the mean of all values there.)"""
    ours, _ = models("Mistral")
    other = type(ours)._from_config(ours.config, attn_implementation="sdpa").eval()
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        results = [model(tokens(), attention_mask=padding("right")).logits for model in (ours, other)]
    assert_close(*results, "logits")


def test_a_mask_moves_between_devices_and_hides_its_elements():
    from transformers.masking_utils import create_causal_mask

    config = models("Llama")[0].config
    mask = create_causal_mask(config, torch.zeros(BATCH, LENGTH, 32), padding("left"), None)
    assert mask.shape == (BATCH, 1, LENGTH, LENGTH) and mask.dtype == torch.bool and mask.contiguous() is mask
    assert mask.to("meta").device.type == mask.to("meta").rule.kept.device.type == "meta"
    with pytest.raises(UnsupportedError, match="eager"):
        mask.float()


OWN_ATTENTION = {
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "Mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64},
    "XGLM": {"vocab_size": 64, "d_model": 32, "attention_heads": 4, "num_layers": 1, "ffn_dim": 48},
}
OWN_CLASSES = {
    "Falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    "GPTNeo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 1,
        "attention_types": [[["global"], 1]],
    },
}


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_that_compute_attention_by_themselves_are_refused(name):
    """The list is that of docs/transformers.md, and the next."""
    config = getattr(transformers, name + "Config")(**OWN_ATTENTION[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cuflash")
    for inputs in ({}, {"attention_mask": padding("left")}):
        with pytest.raises(UnsupportedError, match="eager"):
            model(tokens(), **inputs)


@pytest.mark.parametrize("name", OWN_CLASSES)
def test_models_that_choose_an_attention_class_by_name_cannot_be_made(name):
    """Transformers' own errors: of a class it does not know, or, where a name has "flash" in it, has not imported."""
    config = getattr(transformers, name + "Config")(**OWN_CLASSES[name])
    for implementation in ("cuflash", "streaming"):
        with pytest.raises((KeyError, NameError)):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
            model(tokens())


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(BATCH, LENGTH, LENGTH, dtype=torch.bool),
        torch.ones(BATCH, 1, LENGTH, LENGTH - 1, dtype=torch.bool),
        torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.long),
        torch.ones(BATCH, LENGTH - 1),
    ],
    ids=lambda x: str(tuple(x.shape)),
)
def test_masks_of_another_kind_are_refused(mask):
    ours, _ = models("Llama")
    x = torch.zeros(BATCH, 4, LENGTH, 8)
    with pytest.raises(UnsupportedError, match=r"pass the padding"):
        integration.attention_forward(ours, x, x, x, mask)
