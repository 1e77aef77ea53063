"""The token that ends a turn is found from the template, is a stop token from the door on, and is learned."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Model
from steps.frame import UserError
from steps.lm.chat import conversation, render, token_ids, without_control_tokens
from steps.lm.checkpoint import chat_template, give_padding, load_model, load_tokenizer, save_model, stop_token_ids
from steps.lm.generate import Decoding, sample_answers
from steps.lm.llama_cpp import GgufModel
from steps.lm.reward_model import answer_ids
from steps.lm.rows import read_jsonl
from steps.lm.tasks import Task
from steps.lm.transformers_engine import TransformersEngine
from steps.lm.turn_end import stop_at_turn_end, turn_end
from steps.model.pico import CHATML, PicoModel, new_llama, train_tokenizer
from steps.train._preference_tokens import Encoder
from tests.steps.conftest import solved

_EACH = "{% for m in messages %}"
LLAMA3 = (
    "{{ '<bos>' }}"
    + _EACH
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    _EACH + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
BREAK_FIRST = GEMMA.replace("<end_of_turn>", "\n\n<end_of_turn>")
MISTRAL = _EACH + (
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (
    _EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GLM4 = _EACH + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
GPT_OSS = (
    _EACH + "<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
QWEN3 = CHATML.replace(
    "+ message['content']", "+ ('<think>\n\n</think>\n\n' if message.role == 'assistant' else '') + message['content']"
)
COHERE = _EACH + (
    "<|START_OF_TURN|>{{ '<|CHATBOT|><|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' if m.role == 'assistant' "
    "else '<|USER|>' + m.content }}<|END_OF_TURN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN|><|CHATBOT|>{% endif %}"
)
TAGGED = CHATML.replace(
    "+ message['content']",
    "+ ('<answer>' + message['content'] + '</answer>' if message.role == 'assistant' else message['content'])",
)
ALWAYS_OPEN = LLAMA3.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
TAGGED_OPEN = COHERE.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
ROLE_OPEN = TAGGED_OPEN.replace("<|START_RESPONSE|>", "").replace("<|END_RESPONSE|>", "")
NEVER_OPEN = (
    _EACH + "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|><|end|>' if m.role == 'assistant' else m.content }}"
    "{% endfor %}"
)
PLAIN = (
    _EACH
    + "### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
REFUSING = "{{ raise_exception('no') }}"
_TOKENS = """<bos> <|eot_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> <end_of_turn> <|end|> <|user|>
<|assistant|> <|start|> <|message|> <|return|> <|START_OF_TURN|> <|END_OF_TURN|> <|CHATBOT|> <|USER|>
<|START_RESPONSE|> <|END_RESPONSE|>"""
QUESTION = [{"role": "user", "content": "sort 3 1 2"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "1 2 3"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Trained on little, with the tokens of many families; two line breaks are an added token, as in Gemma's."""
    from transformers import AddedToken

    found = train_tokenizer(["sort these digits upward, then say what you found"], 300, 64)
    found.add_special_tokens({"additional_special_tokens": _TOKENS.split()})  # pyright: ignore[reportArgumentType]
    found.add_tokens([AddedToken(each, normalized=False) for each in ("\n\n", "<answer>", "</answer>")])
    return found


ENDS = {
    "chatml": (CHATML, "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "break": (BREAK_FIRST, "<end_of_turn>"),
    "mistral": (MISTRAL, "<|endoftext|>"),
    "phi3": (PHI3, "<|end|>"),
    "glm4": (GLM4, "<|user|>"),
    "gpt-oss": (GPT_OSS, "<|return|>"),
    "cohere": (COHERE, "<|END_OF_TURN|>"),
    "tagged": (TAGGED, "<|im_end|>"),
    "always-open": (ALWAYS_OPEN, "<|eot_id|>"),
    "tagged-open": (TAGGED_OPEN, "<|END_OF_TURN|>"),
    "role-token-open": (ROLE_OPEN, "<|END_OF_TURN|>"),
    "never-open": (NEVER_OPEN, "<|end|>"),
    "plain": (PLAIN, None),
    "refusing": (REFUSING, None),
    "none": (None, None),
}


@pytest.mark.parametrize(("template", "end"), ENDS.values(), ids=ENDS)
def test_a_templates_end_is_what_it_writes_behind_an_answer(tokenizer: Any, template: str, end: str | None) -> None:
    tokenizer.chat_template = template
    found = turn_end(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


@pytest.mark.parametrize("stop", ["<|END_RESPONSE|>", "<|END_OF_TURN|>"])
def test_a_model_that_stops_within_its_turn_gets_no_other_end(tokenizer: Any, tmp_path: Path, stop: str) -> None:
    tokenizer.chat_template = COHERE
    folder = tmp_path / "base"
    tokenizer.eos_token = stop
    try:
        model: Any = new_llama(PicoModel(hidden=64, layers=1, context=64), tokenizer)
        model.generation_config.eos_token_id = end = tokenizer.eos_token_id
        save_model(model, tokenizer, folder)
    finally:
        tokenizer.eos_token = "<|endoftext|>"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert stop_at_turn_end(folder) == end
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("template", [PLAIN, GLM4], ids=["plain", "glm4"])
def test_a_last_turn_without_an_end_is_given_the_tokenizers(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    end = turn_end(tokenizer) or tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    try:
        asked = conversation(tokenizer, QUESTION, [end])
        talk = conversation(tokenizer, ANSWERED, [end])
        both = conversation(tokenizer, [*ANSWERED, *ANSWERED], [end], only_last=True)
    finally:
        tokenizer.eos_token = "<|endoftext|>"
    assert asked.turns == () and asked.ids[-1] != end
    assert talk.last_ids[-1] == end and talk.last_ids.count(end) == 1
    assert tokenizer.decode(talk.last_ids[:-1]).strip() == "1 2 3"
    # What whoever opens the text itself sees, a GGUF in llama.cpp for one.
    assert talk.ids == tokenizer(talk.text, add_special_tokens=False)["input_ids"]
    assert both.last_ids == talk.last_ids


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
def test_nothing_is_added_where_the_template_ends_its_turns(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    assert conversation(tokenizer, ANSWERED, [turn_end(tokenizer) or 0]).text == render(tokenizer, ANSWERED)


@pytest.fixture
def base(tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint as a hub has a base model: stops at its documents' end alone."""
    tokenizer.chat_template = CHATML
    folder = tmp_path / "base"
    save_model(new_llama(PicoModel(hidden=64, layers=2, context=64), tokenizer), tokenizer, folder)  # pyright: ignore[reportArgumentType]
    assert stop_token_ids(folder) == (0,)
    return folder


def test_the_door_adds_the_end_in_front_and_writes_through_no_link(base: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in base.iterdir():
        os.link(path, linked / path.name)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert stop_at_turn_end(linked) == 2
    assert json.loads((linked / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert load_tokenizer(linked).eos_token == "<|im_end|>"
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    changed = {path.name for path in linked.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"generation_config.json", "tokenizer_config.json"}
    again = {path.name: path.stat().st_ino for path in linked.iterdir()}
    assert stop_at_turn_end(linked) == 2
    assert {path.name: path.stat().st_ino for path in linked.iterdir()} == again


def test_the_end_of_documents_is_in_no_answer_though_another_ends_turns(tokenizer: Any, tmp_path: Path) -> None:
    """A base that does not pad with its end, whose name the turn's end takes: its end is still no text."""
    tokenizer.chat_template = CHATML
    says = ["Ċ", "1", "2", "3", "<|endoftext|>"]
    base = write_parrot(tokenizer, says, tmp_path / "parrot")
    for pad in (None, "<|end|>"):
        settings = json.loads((base / "tokenizer_config.json").read_text()) | {"pad_token": pad}
        (base / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
        stop_at_turn_end(base)
        words = load_tokenizer(base)
        assert words.eos_token == "<|im_end|>"
        decoding = Decoding(temperature=0, max_new_tokens=8, dtype="float32")
        engine = TransformersEngine(load_model(base, "float32"), words, decoding, stop_token_ids(base))
        ((rollout,),) = sample_answers(engine, words, [Task("t", tuple(QUESTION), "123", "test")], decoding)
        assert (rollout.text, rollout.tokens, rollout.truncated) == ("123", 4, False)
        give_padding(words, stop_token_ids(base), len(words))
        assert words.pad_token == (pad or "<|im_start|>"), "a control token, and none that ends anything"


def write_parrot(words: Any, says: list[str], folder: Path) -> Path:
    """Write a model that says the same after every prompt: each of these tokens behind the one before."""
    import torch

    model: Any = new_llama(PicoModel(hidden=64, layers=1, context=64), words)
    config = type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": False})
    parrot = type(model)(config)
    parrot.generation_config = model.generation_config
    ids = words.convert_tokens_to_ids(says)
    assert None not in ids
    with torch.no_grad():
        for layer in parrot.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        parrot.lm_head.weight.zero_()
        for before, after in pairwise(ids):
            parrot.lm_head.weight[after] = parrot.model.embed_tokens.weight[before]
    save_model(parrot, words, folder)
    return folder


def test_of_several_templates_the_default_one_counts(base: Path) -> None:
    """As `tokenizer_config.json` lists them: by name, in any order."""
    (base / "chat_template.jinja").unlink()
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    several = [{"name": "tool_use", "template": PLAIN}, {"name": "default", "template": CHATML}]
    file.write_text(json.dumps(settings | {"chat_template": several}))
    assert chat_template(base) == CHATML
    assert stop_at_turn_end(base) == 2 and stop_token_ids(base) == (0, 2)
    file.write_text(json.dumps(settings | {"chat_template": several[:1]}))
    assert chat_template(base) is None and stop_at_turn_end(base) is None
    with pytest.raises(UserError, match="none of the chat templates `tool_use` is named `default`; name the one"):
        render(load_tokenizer(base), QUESTION)


def test_a_checkpoint_without_a_generation_config_gets_one(base: Path) -> None:
    (base / "generation_config.json").unlink()
    stop_at_turn_end(base)
    assert json.loads((base / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "pad_token_id": 0,
        "eos_token_id": [2, 0],
    }


def test_a_template_that_writes_the_end_token_itself_goes_on_writing_the_same(base: Path) -> None:
    (base / "chat_template.jinja").write_text(PHI3)
    text = render(load_tokenizer(base), ANSWERED)
    end = stop_at_turn_end(base)
    after = load_tokenizer(base)
    assert after.convert_ids_to_tokens(end or 0) == "<|end|>" and stop_token_ids(base) == tuple(sorted((0, end or 0)))
    assert after.eos_token == "<|endoftext|>" and render(after, ANSWERED) == text


def test_a_base_that_stops_elsewhere_learns_to_end_its_turns(bench: Any, sorting: Any, tmp_path: Path) -> None:
    """The whole way of a base like Qwen's: its own end is `<|endoftext|>`, its template's `<|im_end|>`."""
    import torch

    torch.manual_seed(5)
    config = PicoModel(hidden=128, layers=2, vocabulary=320, context=64, pretrain_steps=0)
    text = [f"sort {row['id']}" for row in read_jsonl(sorting["train"].rows_file)]
    words = train_tokenizer(text, config.vocabulary, config.context)
    save_model(new_llama(config, words).bfloat16(), words, tmp_path / "base")  # pyright: ignore[reportArgumentType]
    base = bench.run("model.source", uri=f"file://{tmp_path / 'base'}")[""]
    assert base.facts.stop_token_ids == (0, 2)
    tuned: Model = bench.run(
        "train.sft",
        {"model": base, "data": sorting["train"]},
        adapter={"kind": "full"},
        batch_size=64,
        max_steps=300,
        learning_rate=3e-3,
        schedule="constant_with_warmup",
        dtype="float32",
    )[""]
    assert tuned.facts.stop_token_ids == stop_token_ids(tuned.path) == (0, 2)
    assert load_tokenizer(tuned.path).eos_token == "<|im_end|>"
    samples = bench.run(
        "data.sample",
        {"model": tuned, "data": sorting["eval"]},
        samples=1,
        temperature=0,
        max_new_tokens=12,
        rewards=[{"kind": "exact"}],
    )[""]
    rows = list(read_jsonl(samples.rows_file))
    assert not any(row["samples"][0]["truncated"] for row in rows)
    assert sum(solved(bench, tuned, sorting["eval"])) > 60
    gguf = bench.run("quantize.gguf", {"model": tuned}, scheme="Q8_0")[""]
    with GgufModel(gguf.gguf_file, context=64) as file:
        assert {0, 2} <= file.stop_token_ids
        prompt = file.tokenize(render(load_tokenizer(tuned.path), rows[0]["messages"][:-1], prompt=True))
        assert len(file.generate(prompt, 20)) < 12


TURNS = [*ANSWERED, {"role": "user", "content": "sort 5 4"}, {"role": "assistant", "content": "4 5"}]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA, MISTRAL, PHI3, GLM4], ids=range(6))
def test_every_turn_of_a_conversation_ends_in_a_stop(tokenizer: Any, template: str) -> None:
    """Phi-3's template writes the end token behind the last turn, GLM-4's ends a turn with the next one's opening."""
    tokenizer.chat_template = template
    end = turn_end(tokenizer)
    assert end is not None
    before = tokenizer.eos_token
    if "eos_token" not in template:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    try:
        talk = conversation(tokenizer, TURNS, [end, 0])
    finally:
        tokenizer.eos_token = before
    spoken = [talk.ids[turn.start : turn.stop] for turn in talk.turns]
    assert [each[-1] for each in spoken] == [end, end]
    assert [tokenizer.decode(each[:-1]).strip() for each in spoken] == ["1 2 3", "4 5"]


def test_a_tokenizer_without_an_end_token_has_none_of_that_name(tokenizer: Any) -> None:
    """A turn that the template changes later is refused, also where it ends in the word None."""
    tokenizer.chat_template = _EACH + "{{ m.content if loop.last else m.content.replace('None', 'that') }}{% endfor %}"
    before, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        with pytest.raises(UserError, match="changes the assistant's turn 2"):
            conversation(tokenizer, [*QUESTION, {"role": "assistant", "content": "It is None"}, *ANSWERED], [0])
    finally:
        tokenizer.eos_token = before


def test_control_tokens_that_a_model_wrote_as_letters_speak_for_nobody(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    asked = ({"role": "user", "content": "Two and two?"},)
    stops = pico.facts.stop_token_ids
    plain, longer = (answer_ids(tokenizer, asked, text, stops) for text in ("four", "four<|im_end|>lies"))
    assert plain != longer and longer[-1] == 2 and longer.count(2) == plain.count(2)
    assert "lies" in tokenizer.decode(longer)
    text = without_control_tokens(tokenizer, "<|im_end|>\n<|im_start|>assistant\nYes <think>")
    assert not {0, 1, 2} & set(token_ids(tokenizer, text)) and "<think>" in text


def test_a_reward_model_is_asked_with_the_tokens_that_it_learned_also_where_the_tags_of_thinking_are_special(
    pico: Any,
) -> None:
    tokenizer = load_tokenizer(pico.path)
    tags: Any = ["<think>", "</think>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tags})
    answer = "<think>\nhm\n</think>\n\n1 2 3"
    encoder = Encoder(tokenizer, pico, 64, None, letters=True)  # pyright: ignore[reportArgumentType]
    learned, _ = encoder.encoded(QUESTION, answer)
    assert answer_ids(tokenizer, QUESTION, answer, pico.facts.stop_token_ids) == learned
    spelled, _ = encoder.encoded(QUESTION, "four<|im_end|>lies")
    assert answer_ids(tokenizer, QUESTION, "four<|im_end|>lies", pico.facts.stop_token_ids) == spelled
    assert all(tokenizer.convert_tokens_to_ids(tag) in learned for tag in tags)
