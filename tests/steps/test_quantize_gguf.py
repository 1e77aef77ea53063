"""A GGUF is the same model: logits, template, stop tokens, tokens; and what would break that is refused or found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from calibration_rows import conversations, publish_conversations
from variants import replace, variant

from steps.artifacts import Dataset, Quantized
from steps.evaluate._runtimes import LlamaCppRuntime, TransformersRuntime
from steps.frame.errors import ProofFailed
from steps.lm.chat import render, token_ids
from steps.lm.checkpoint import chat_template, load_model, load_tokenizer
from steps.lm.llama_cpp import GgufModel
from steps.lm.turn_end import stop_at_turn_end
from steps.quantize._importance import importance_matrix
from steps.quantize._pre_tokenizer import pre_tokenizer_name
from steps.quantize.gguf import _SENTENCES, check_same_model

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


@pytest.fixture(scope="module")
def rows(bench: Any) -> Dataset:
    return publish_conversations(bench.store)


@pytest.fixture(scope="module")
def q8(bench: Any, pico: Any) -> Quantized:
    return bench.run("quantize.gguf", {"model": pico}, scheme="Q8_0")[""]


@pytest.fixture(scope="module")
def q4(bench: Any, pico: Any, rows: Dataset) -> Quantized:
    return bench.run("quantize.gguf", {"model": pico, "calibration": rows}, scheme="Q4_K_M")[""]


def agreement(pico: Any, gguf: Quantized) -> float:
    """Share of positions at which file and checkpoint find the same token likeliest."""
    import torch

    tokenizer, model = load_tokenizer(pico.path), load_model(pico.path, "float32")
    same, total = 0, 0
    with GgufModel(gguf.gguf_file, context=512, threads=2) as file, torch.inference_mode():
        for row in conversations()[:6]:
            ids = token_ids(tokenizer, render(tokenizer, row["messages"]))[:512]
            ours = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).numpy()
            same += int((file.logits(ids).argmax(-1) == ours).sum())
            total += len(ids)
    return same / total


def test_eight_bits_give_the_checkpoints_logits(pico: Any, q8: Quantized) -> None:
    assert agreement(pico, q8) > 0.98
    assert 8.5 <= q8.facts.bits_per_weight < 8.6  # 34 bytes for 32 weights, and the norms in full


def test_the_file_of_another_model_is_found_out(bench: Any, pico: Any, q8: Quantized) -> None:
    """Of the same size, tokens, template and stops: only its weights tell."""
    other = bench.run("model.pico", pretrain_steps=60, seed=2)[""]
    tokenizer = load_tokenizer(pico.path)
    with GgufModel(q8.gguf_file, context=128, threads=2) as file:
        check_same_model(file, pico, tokenizer, _SENTENCES, "cpu")
        with pytest.raises(ProofFailed, match="the converted file is not the model: its predictions diverge by"):
            check_same_model(file, other, load_tokenizer(other.path), _SENTENCES, "cpu")


def test_four_bits_come_close(pico: Any, q4: Quantized) -> None:
    assert agreement(pico, q4) > 0.9
    assert 4.5 < q4.facts.bits_per_weight < 5.5
    assert q4.facts.fallbacks == 0


def test_the_file_says_what_the_checkpoint_says(pico: Any, q4: Quantized) -> None:
    assert [path.name for path in q4.path.iterdir() if path.suffix != ".json"] == ["model-Q4_K_M.gguf"]
    assert (q4.facts.format, q4.facts.scheme) == ("gguf", "Q4_K_M")
    assert q4.facts.template_sha256 == pico.facts.template_sha256
    with GgufModel(q4.gguf_file, context=64) as file:
        assert file.template == chat_template(pico.path)
        assert set(pico.facts.stop_token_ids) <= file.stop_token_ids


def test_it_generates_what_its_logits_say_and_stops(q8: Quantized, pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    prompt = token_ids(tokenizer, "    def __init__(self")
    with GgufModel(q8.gguf_file, context=64, threads=2) as file:
        answer = file.generate(prompt, 12)
        greedy = file.logits(prompt + answer).argmax(-1)[len(prompt) - 1 : -1]
        assert list(greedy[: len(answer)]) == answer
        assert file.stop_token_ids.isdisjoint(answer)
        # What it stops on is what it is told, as the other runtimes: not what it knows by text.
        assert file.generate(prompt, 12, stops=[answer[2]]) == answer[: answer.index(answer[2])]
        assert len(file.generate(prompt, 12, stops=[file.vocabulary + 1])) == 12
        assert file.detokenize(prompt) == "    def __init__(self"
        assert len(file.generate(prompt, 1000)) <= 64 - len(prompt)
        with pytest.raises(ValueError, match="do not fit"):
            file.logits(list(range(3, 68)))


def test_both_runtimes_stop_where_the_facts_say_and_tell_where_else_one_would(q8: Quantized, pico: Any) -> None:
    """Else a score would tell of the runtime: llama.cpp knows ends by their text, whatever the checkpoint says."""
    prompt = token_ids(load_tokenizer(pico.path), "    def __init__(self")
    (answer,) = LlamaCppRuntime(q8.gguf_file, 64, 2, [1]).generate([prompt], 12).answers
    stops = [answer[3]]
    llama = LlamaCppRuntime(q8.gguf_file, 64, 2, stops)
    torch = TransformersRuntime(load_model(pico.path, "float32"), pico.path, stops)
    assert (
        llama.generate([prompt], 12).answers
        == torch.generate([prompt], 12).answers
        == [answer[: answer.index(stops[0])]]
    )
    assert set(llama.more_stops) == set(pico.facts.stop_token_ids) - {*stops} and torch.more_stops == ()


def test_the_same_model_elsewhere_gives_the_same_bytes(
    bench: Any, pico: Any, rows: Dataset, q4: Quantized, tmp_path: Path
) -> None:
    other = type(bench)(tmp_path, bench.launcher)
    for artifact in (pico, rows):
        shutil.copytree(artifact.path, other.store.path(artifact.digest))
    inputs = {"model": other.store.open(pico.digest), "calibration": other.store.open(rows.digest)}
    assert other.run("quantize.gguf", inputs, scheme="Q4_K_M")[""].digest == q4.digest


def test_importance_is_the_mean_square_input(pico: Any) -> None:
    import numpy as np
    import torch

    calls = []
    model = load_model(pico.path, "float32")
    ids = [[5, 6, 7, 8, 9], [10, 11, 12]]
    names = {"model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight"}
    found = importance_matrix(model, ids, names, lambda done, total: calls.append((done, total)))
    with torch.inference_mode():
        entry = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(ids[0] + ids[1])))
    assert list(found) == ["blk.0.attn_q.weight"]
    assert calls == [(1, 2), (2, 2)]
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], entry.square().mean(0).numpy(), rtol=1e-5)


def test_narrow_rows_fall_back_and_are_counted_and_every_stop_token_stops(bench: Any) -> None:
    narrow = bench.run("model.pico", hidden=128, heads=2, kv_heads=1, pretrain_steps=5)[""]

    def stop_at_turns(directory: Path) -> None:
        config = json.loads((directory / "generation_config.json").read_text())
        replace(directory / "generation_config.json", json.dumps({**config, "eos_token_id": [1, 2]}))

    model = variant(bench.store, narrow, stop_at_turns)
    result = bench.run("quantize.gguf", {"model": model}, scheme="Q4_K_M")[""]
    assert result.facts.fallbacks == 2 * 6  # all matrices of both layers but ffn_down, 256 wide
    with GgufModel(result.gguf_file, context=64) as file:
        assert {1, 2} <= file.stop_token_ids  # <|im_start|> is none that llama.cpp knows by its text


def test_more_stops_than_a_file_has_room_for_leave_out_the_least(bench: Any) -> None:
    """The converter's file names the tokenizer's end; two more have room, and the turn's end is one of them."""
    narrow = bench.run("model.pico", hidden=128, heads=2, kv_heads=1, pretrain_steps=5)[""]
    words = load_tokenizer(narrow.path)
    stops = [1, *sorted(words.convert_tokens_to_ids(["a", "b", "c"])), 2]  # pyright: ignore[reportArgumentType]

    def stop_often(directory: Path) -> None:
        config = json.loads((directory / "generation_config.json").read_text())
        replace(directory / "generation_config.json", json.dumps({**config, "eos_token_id": stops}))
        # Its turns end in a token that llama.cpp does not know by its text, and that is not the tokenizer's end token.
        template = "{% for m in messages %}<|im_start|>{{ m.content }}<think>{% endfor %}{{ eos_token }}"
        replace(directory / "chat_template.jinja", template)
        stop_at_turn_end(directory)

    model = variant(bench.store, narrow, stop_often)
    end: Any = words.convert_tokens_to_ids("<think>")
    assert set(model.facts.stop_token_ids) == {*stops, end}
    result = bench.run("quantize.gguf", {"model": model}, scheme="Q8_0")[""]
    assert result.facts.stop_token_ids == model.facts.stop_token_ids
    left = result.facts.unmarked_stop_token_ids
    assert left and set(left) < {1, *stops[1:4]}
    with GgufModel(result.gguf_file, context=64) as file:
        assert set(model.facts.stop_token_ids) - file.stop_token_ids == set(left)
        assert end in file.stop_token_ids


def test_a_wrong_pre_tokenizer_is_found_out(bench: Any, pico: Any) -> None:
    # One that cuts words at capitals; GPT-2's would give the same tokens, as no two digits are ever merged.
    result = bench.attempt("quantize.gguf", {"model": pico}, scheme="Q8_0", pre_tokenizer="tekken")
    assert result.status == "failed"
    assert "llama.cpp gives" in result.message


def test_an_unknown_pre_tokenizer_is_refused(bench: Any, pico: Any) -> None:
    def split_at_commas(directory: Path) -> None:
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        commas = {"type": "Split", "pattern": {"Regex": ","}, "behavior": "Isolated", "invert": False}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [commas, tokenizer["pre_tokenizer"]]}
        replace(directory / "tokenizer.json", json.dumps(tokenizer))

    result = bench.attempt("quantize.gguf", {"model": variant(bench.store, pico, split_at_commas)}, scheme="Q8_0")
    assert result.status == "refused"
    assert "`pre_tokenizer:`" in result.message


def test_a_scheme_that_needs_calibration_is_refused_without(bench: Any, pico: Any) -> None:
    result = bench.attempt("quantize.gguf", {"model": pico}, scheme="IQ2_M")
    assert (result.status, "`calibration:`" in result.message) == ("refused", True)


@pytest.mark.parametrize(
    ("parts", "ignore_merges", "name"),
    [
        (["gpt2"], False, "gpt-2"),
        (["digits", "gpt2"], False, "smollm"),
        ([QWEN2, "bytes"], False, "qwen2"),
        ([LLAMA3, "bytes"], True, "llama-bpe"),
        ([LLAMA3, "bytes"], False, "smaug-bpe"),
        ([LLAMA3 + "|x", "bytes"], True, None),
        ([QWEN2, "gpt2"], False, None),
    ],
)
def test_pre_tokenizers_are_recognised_by_their_definition(
    tmp_path: Path, parts: list[str], ignore_merges: bool, name: str | None
) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    known = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": pre_tokenizers.Digits(individual_digits=True),
    }
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [known.get(part) or pre_tokenizers.Split(Regex(part), "isolated") for part in parts]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert pre_tokenizer_name(tmp_path) == name
