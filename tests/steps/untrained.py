"""A model that is the same on every machine: untrained, with words from a text of its own.

A loss after training differs between processors, whose kernels round differently, by far more than rounding; the first
loss of such a model is the same to some 1e-6 everywhere, so it can be written down.
"""

from typing import Any

from steps.artifacts import Manifest, Model, digest_tree
from steps.lm.checkpoint import model_facts, save_model
from steps.lm.turn_end import stop_at_turn_end
from steps.model.pico import PicoModel, new_llama, train_tokenizer

TEXT = ["sort these digits upward, then say what you found", "the answer to each question is a row of digits"]


def untrained(bench: Any, seed: int) -> Model:
    """Publish a Llama of two layers and random weights."""
    import torch

    torch.manual_seed(seed)
    config = PicoModel(hidden=64, layers=2, vocabulary=300, context=64, seed=seed)
    tokenizer = train_tokenizer(TEXT, config.vocabulary, config.context)
    return _published(bench, f"untrained-{seed}", new_llama(config, tokenizer), tokenizer)


def lone_ended(bench: Any) -> Model:
    """Publish a model whose tokenizer is like GPT-2's: the end is its only special token, and the last; 0 is `!`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", model_max_length=64)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(62)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=len(letters),
    )
    return _published(bench, "lone-ended", LlamaForCausalLM(config), tokenizer)


def _published(bench: Any, name: str, model: Any, tokenizer: Any) -> Model:
    staging = bench.root / "made" / name
    staging.mkdir(parents=True)
    save_model(model.bfloat16(), tokenizer, staging)
    stop_at_turn_end(staging)
    tree = digest_tree(staging)
    manifest = Manifest(
        kind="Model",
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="test.untrained",
        output="",
        key=tree.sha256,
        config={},
        libraries={},
        facts=model_facts(staging, licence=None, origin="test").as_plain(),
    )
    published: Any = bench.store.publish(staging, manifest)
    return published
