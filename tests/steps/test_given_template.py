"""A base model without a chat template is given one: its tokens, its embeddings, and what travels on with the model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steps.frame import UserError
from steps.lm.chat import conversation, render, token_ids
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.model._template import template_text
from steps.sources import fetch_template
from steps.sources.chat_templates import NAMES
from tests.steps.hub_server import running_hub

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "Yes."},
]
MARKS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


@pytest.fixture
def base(pico: Any, tmp_path: Path) -> Path:
    """A base model as they come: no chat template, one token that ends documents."""
    return make_base(pico.path, tmp_path / "base")


def make_base(pico: Path, folder: Path) -> Path:
    """Copy the pico checkpoint, its template taken out and its end token that of documents."""
    shutil.copytree(pico, folder, ignore=shutil.ignore_patterns("artifact.json", "chat_template.jinja"))
    for path in folder.iterdir():
        path.chmod(0o644)
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        settings = json.loads((folder / name).read_text())
        settings.pop("chat_template", None)
        settings["eos_token" if name.startswith("tok") else "eos_token_id"] = (
            "<|endoftext|>" if name.startswith("tok") else 0
        )
        (folder / name).write_text(json.dumps(settings))
    return folder


def reserve(folder: Path, count: int) -> None:
    """Add reserved tokens as Llama 3 has them, with rows that were never trained."""
    tokenizer, model = load_tokenizer(folder), load_model(folder, "bfloat16")
    tokenizer.add_tokens([f"<|reserved_special_token_{number}|>" for number in range(count)], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[-count:] = 0  # pyright: ignore[reportIndexIssue]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_template_gives_a_model_that_talks_and_ends_its_turn(bench: Any, base: Path, name: str) -> None:
    model = bench.run("model.source", uri=f"file://{base}", template=name)[""]
    tokenizer = load_tokenizer(model.path)
    text = render(tokenizer, TALK)
    assert text.index("Be brief.") < text.index("Is it so?") < text.index("Yes.")
    end = model.facts.stop_token_ids if name not in MARKS else [tokenizer.convert_tokens_to_ids(MARKS[name])]
    talk = conversation(tokenizer, TALK, model.facts.stop_token_ids)
    assert talk.last_ids[-1] == end[0] and end[0] in model.facts.stop_token_ids
    assert str(tokenizer.decode(talk.last_ids[:-1])).strip() == "Yes."
    rows: Any = load_model(model.path, "float32").get_input_embeddings().weight
    assert len(rows) >= len(tokenizer) and model.facts.vocabulary == len(rows)
    for token in model.facts.new_tokens:
        assert len(token_ids(tokenizer, f"x{tokenizer.convert_ids_to_tokens(token)}y")) == 3


def test_new_rows_are_the_mean_of_the_old_and_all_else_stays_to_the_bit(bench: Any, base: Path) -> None:
    before = load_file(base / "model.safetensors")
    model = bench.run("model.source", uri=f"file://{base}", template="llama3")[""]
    after = load_file(model.path / "model.safetensors")
    name = "model.embed_tokens.weight"
    rows = len(before[name])
    assert model.facts.new_tokens == tuple(range(rows, rows + 3)) and model.facts.tied_embeddings
    mean = before[name].double().mean(0).bfloat16()
    assert torch.equal(after[name][:rows], before[name])
    assert all(torch.equal(after[name][token], mean) for token in model.facts.new_tokens)
    assert all(torch.equal(after[each], before[each]) for each in before if each != name)
    # The user's own files are what they were.
    assert torch.equal(load_file(base / "model.safetensors")[name], before[name])


def test_reserved_tokens_take_the_names_where_there_are_enough(bench: Any, base: Path) -> None:
    rows = len(load_tokenizer(base))
    reserve(base, 4)
    size = (base / "model.safetensors").stat().st_size
    result = bench.attempt("model.source", {}, uri=f"file://{base}", template="llama3")
    assert any(
        "<|eot_id|> takes the place of the reserved token <|reserved_special_token_2|>" in n for n in result.notes
    )
    model = bench.run("model.source", uri=f"file://{base}", template="llama3")[""]
    tokenizer = load_tokenizer(model.path)
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == rows + 2
    assert "<|reserved_special_token_2|>" not in tokenizer.get_vocab()
    assert "<|reserved_special_token_3|>" in tokenizer.get_vocab()
    assert model.facts.new_tokens == (rows, rows + 1, rows + 2)
    assert (model.path / "model.safetensors").stat().st_size == pytest.approx(size, rel=0.01)
    weight = load_file(model.path / "model.safetensors")["model.embed_tokens.weight"]
    assert weight[rows].float().norm() > 0 and weight[rows + 3].float().norm() == 0


def test_a_file_a_model_and_a_name_of_its_own_are_templates_too(
    bench: Any, base: Path, pico: Any, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    model = bench.run("model.source", uri=f"file://{base}", template=str(file))[""]
    names = load_tokenizer(model.path).convert_ids_to_tokens(list(model.facts.new_tokens))
    assert set(names) == {"<|user|>", "<|stop|>", "<|assistant|>", "<|system|>"}
    given = bench.run("model.source", uri=f"file://{base}", template=f"file://{pico.path}")[""]
    assert given.facts.template_sha256 == pico.facts.template_sha256
    assert given.facts.stop_token_ids == pico.facts.stop_token_ids and given.facts.new_tokens == ()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    named = [{"name": name, "template": text + name} for name, text in (("default", file.read_text()), ("tools", "x"))]
    named[1]["template"] = file.read_text().replace("stop", "im_end")
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    other = bench.run("model.source", uri=f"file://{base}", template="tools")[""]
    assert render(load_tokenizer(other.path), TALK[1:]).endswith("Yes.<|im_end|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("chatlm", "did you mean `chatml`"),
        ("nothing", "no chat template `nothing`; known here: chatml, gemma"),
        ("./missing.jinja", "no such file"),
    ],
)
def test_a_template_that_is_none_is_refused(bench: Any, base: Path, template: str, said: str) -> None:
    result = bench.attempt("model.source", {}, uri=f"file://{base}", template=template)
    assert result.status == "refused" and said in result.message


def test_a_template_without_an_end_is_refused(bench: Any, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "endless.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    result = bench.attempt("model.source", {}, uri=f"file://{base}", template=str(file))
    assert result.status == "refused" and "no token ends the assistant's turn" in result.message


def test_a_hubs_model_lends_its_template_and_a_registrys_too(
    bench: Any, base: Path, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("chat_template.jinja", "tokenizer_config.json", "config.json", "model.safetensors")
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        commit = hub.add("models/org/talks", {name: (pico.path / name).read_bytes() for name in files})
        uri = f"hf://org/talks@{commit}"
        place = fetch_template(uri, tmp_path / "cache", tmp_path)
        assert {path.name for path in place.iterdir()} == {"chat_template.jinja", "tokenizer_config.json"}
        one = fetch_template(f"{uri}/chat_template.jinja", tmp_path / "cache", tmp_path)
        assert one.read_bytes() == (pico.path / "chat_template.jinja").read_bytes()
        with pytest.raises(UserError, match=r"the repository holds no other\.jinja"):
            fetch_template(f"{uri}/other.jinja", tmp_path / "cache", tmp_path)
    # The hub is gone: the commit is in the cache.
    assert fetch_template(uri, tmp_path / "cache", tmp_path) == place
    text = template_text("registry://talks@champion", base, tmp_path, pico.path)
    assert text == (pico.path / "chat_template.jinja").read_text()
