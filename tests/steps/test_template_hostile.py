"""What hostile readers found where a template is given, and where a model is looked at before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.lm.chat import conversation, whole_text
from steps.lm.checkpoint import load_model, load_tokenizer, named_templates
from steps.lm.plain_text import document_end
from steps.lm.turn_end import turn_end
from steps.train.sft import labelled
from tests.steps.test_given_template import TALK, make_base

STRIPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def base(pico: Any, tmp_path: Path) -> Path:
    return make_base(pico.path, tmp_path / "base")


def extended(folder: Path, names: list[str], *, zero: bool = True) -> None:
    """Add special tokens to a checkpoint, with rows of zeros."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, "bfloat16")
    tokenizer.add_tokens(names, special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight: Any = model.get_input_embeddings().weight
        weight[-len(names) :] = 0 if zero else weight[: len(names)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_tokens_that_are_there_with_rows_of_zeros_are_new_too(bench: Any, base: Path) -> None:
    """As Mistral's base models have them; their turns end in a token at which the model stops already."""
    extended(base, ["[INST]", "[/INST]"])
    model = bench.run("model.source", uri=f"file://{base}", template="mistral")[""]
    ids = load_tokenizer(model.path).convert_tokens_to_ids(["[INST]", "[/INST]"])
    assert list(model.facts.new_tokens) == ids
    weight: Any = load_model(model.path, "float32").get_input_embeddings().weight
    assert all(weight[token].norm() > 0 for token in model.facts.new_tokens)


def test_a_reserved_token_that_pads_keeps_its_name(bench: Any, base: Path) -> None:
    extended(base, [f"<|reserved_special_token_{number}|>" for number in range(5)])
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|reserved_special_token_0|>"}))
    model = bench.run("model.source", uri=f"file://{base}", template="llama3")[""]
    tokenizer = load_tokenizer(model.path)
    assert tokenizer.pad_token == "<|reserved_special_token_0|>"
    assert tokenizer.pad_token_id not in model.facts.new_tokens and len(model.facts.new_tokens) == 3


def test_a_file_with_a_mark_of_its_order_and_words_in_brackets(bench: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    body = "{# tokens: <|im_end|> #}\nAnswer in [JSON]. {% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    file.write_text("\ufeff" + body, encoding="utf-8")
    model = bench.run("model.source", uri=f"file://{base}", template=str(file))[""]
    assert (model.path / "chat_template.jinja").read_text().startswith("Answer in [JSON].")
    file.write_text(body.partition("\n")[2])
    model = bench.run("model.source", uri=f"file://{base}", template=str(file))[""]
    assert model.facts.new_tokens == () and "[JSON]" not in load_tokenizer(model.path).get_vocab()


def test_what_the_vocabulary_has_no_token_for_ends_no_turn(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    tokenizer.add_tokens(["<unk>"], special_tokens=True)
    tokenizer.unk_token = "<unk>"
    tokenizer.chat_template = STRIPS.replace("<|im_end|>\n", "<|im_end|><unk>")
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_templates_in_files_of_their_own_are_names_too(bench: Any, base: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(STRIPS)
    (base / "chat_template.jinja").write_text(STRIPS.replace("assistant\n", "assistant:\n"))
    assert "tool_use" in named_templates(base)
    model = bench.run("model.source", uri=f"file://{base}", template="tool_use")[""]
    assert (model.path / "chat_template.jinja").read_text() == STRIPS
    plain = bench.run("model.source", uri=f"file://{base}")[""]
    assert "additional_chat_templates/tool_use.jinja" in plain.manifest.files


def test_thoughts_that_the_answer_repeats_are_kept_all_the_same(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    tokenizer.chat_template = STRIPS
    talk = [TALK[1], {"role": "assistant", "content": "<think>4</think>The answer is 4."}]
    assert "<think>4</think>The answer is 4." in whole_text(tokenizer, talk)
    ((_, labels),) = labelled(talk, tokenizer, (2,), "all")
    said = str(tokenizer.decode([label for label in labels if label != -100]))
    assert said == "<think>4</think>The answer is 4.<|im_end|>"
    assert conversation(tokenizer, talk, (2,)).last_ids[-1] == 2


def test_documents_end_with_the_tokenizers_own_end_where_several_stop(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    tokenizer.chat_template = None
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    tokenizer.eos_token = "</s>"
    end = tokenizer.eos_token_id
    assert isinstance(end, int) and document_end(tokenizer, (0, end)) == end


def test_a_comparison_answers_within_learned_positions(bench: Any, base: Path, sums: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    words = len(load_tokenizer(base))
    (base / "model.safetensors").unlink()
    sizes = GPT2Config(vocab_size=words, n_embd=64, n_layer=1, n_head=2, n_positions=32, eos_token_id=0, bos_token_id=0)
    GPT2LMHeadModel(sizes).save_pretrained(base)
    model = bench.run("model.source", uri=f"file://{base}", template="chatml")[""]
    inputs = {"reference": model, "candidates": [model], "data": sums["eval"]}
    result = bench.attempt("evaluate.compare", inputs, names=("again",), reference_name="once", new_tokens=64, rows=8)
    assert result.status == "finished", result.message
    assert any("the model has no more positions behind its longest prompt" in note for note in result.notes)
