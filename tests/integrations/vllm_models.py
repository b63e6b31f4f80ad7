"""A tiny random model in vLLM, by its own attention or cuflash's: what test_vllm.py starts, in a process each.

python vllm_models.py MODEL own|cuflash FOLDER      writes FOLDER/MODEL-own.json: implementations, tokens or vectors
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", VLLM_NO_USAGE_STATS="1",
)  # fmt: skip

SHAPE = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip


def models() -> dict[str, Any]:
    """{name: its configuration, made when asked for}."""
    import transformers as t

    return {
        "llama": lambda: t.LlamaConfig(**SHAPE, num_key_value_heads=2),
        "mistral": lambda: t.MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=20),
        "gemma2": lambda: t.Gemma2Config(
            **SHAPE, num_key_value_heads=2, head_dim=32, sliding_window=24, attn_logit_softcapping=5.0,
            query_pre_attn_scalar=32,
        ),
        "bloom": lambda: t.BloomConfig(vocab_size=128, hidden_size=128, n_layer=2, n_head=4),
        "bert": lambda: t.BertConfig(**SHAPE),
    }  # fmt: skip


def folder_of(name: str, where: Path) -> Path:
    import torch
    import transformers

    folder = where / name
    if not folder.exists():
        torch.manual_seed(0)
        config = models()[name]()
        make = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        make.from_config(config).float().save_pretrained(folder)
        if name == "bert":  # pooling asks for a tokenizer
            from tokenizers import Tokenizer
            from tokenizers.models import WordLevel

            words = Tokenizer(WordLevel({str(i): i for i in range(128)}, unk_token="0"))
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, unk_token="0", pad_token="0", cls_token="0", sep_token="0"
            ).save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    """20 of 1 to 200 tokens, some of which begin alike: prefixes are found in the cache."""
    import random

    drawn = random.Random(0)
    shared = [drawn.randrange(128) for _ in range(150)]
    made = [[drawn.randrange(128) for _ in range(n)] for n in (1, 2, 5, 17, 32, 33, 64, 100, 131, 200)]
    return made + [shared[:n] + [drawn.randrange(128) for _ in range(m)] for n, m in zip(
        (150, 150, 140, 130, 129, 128, 150, 64, 33, 150), (1, 9, 20, 3, 1, 2, 40, 5, 1, 17), strict=True)]  # fmt: skip


def main() -> None:
    name, impl, where = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    folder = folder_of(name, where)
    if impl == "cuflash":
        os.environ["CUFLASH_VLLM"] = "1"
    import cuflash.integrations.vllm

    cuflash.integrations.vllm.register()  # installed, vLLM calls it by the entry point
    from vllm import LLM, SamplingParams

    pooled = name == "bert"
    llm = LLM(
        model=str(folder), skip_tokenizer_init=not pooled, dtype="float32", max_model_len=512, enforce_eager=True,
        max_num_seqs=8, seed=0,
        **({"runner": "pooling"} if pooled else {
            "max_num_batched_tokens": 64, "enable_prefix_caching": True, "num_gpu_blocks_override": 24}),
    )  # fmt: skip
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    result: dict[str, Any] = {"impls": sorted({type(x.impl).__module__ for x in layers.values()})}
    given = [{"prompt_token_ids": ids} for ids in prompts()]
    if pooled:
        found = llm.embed(given, use_tqdm=False)
        result["vectors"] = [list(map(float, x.outputs.embedding)) for x in found]
    else:
        greedy = SamplingParams(max_tokens=24, temperature=0, detokenize=False, ignore_eos=True)
        found = llm.generate(given, greedy, use_tqdm=False)
        result["tokens"] = [list(x.outputs[0].token_ids) for x in found]
        result["cached"] = sum(x.num_cached_tokens or 0 for x in found)
    (where / f"{name}-{impl}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
