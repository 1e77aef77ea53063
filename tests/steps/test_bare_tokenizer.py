"""Models whose tokenizer names no padding and no end token: trained where they stop at something, else refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts, Model, Preferences, PreferencesFacts
from steps.frame import UserError
from steps.lm.chat import control_tokens, conversation
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.generate import Decoding, text_of
from steps.lm.tasks import Task
from steps.lm.transformers_engine import TransformersEngine
from steps.train._audits import Audits
from steps.train._settings import training_tokenizer
from steps.train.sft import TrainSft
from tests.conftest import Bench
from tests.steps.conftest import publish, sum_row
from tests.steps.untrained import lone_ended, untrained
from tests.steps.variants import replace, variant

SETTINGS = {"max_steps": 1, "batch_size": 4, "dtype": "float32"}
LOUD = [{**sum_row(left, 1), "messages": [{"role": "user", "content": f"{left}!"}, {}]} for left in range(4)]
SAMPLED = {"group_size": 2, "max_new_tokens": 4, "rewards": [{"kind": "exact"}]}


def without(directory: Path, file: str, *keys: str) -> None:
    settings = json.loads((directory / file).read_text())
    replace(directory / file, json.dumps({name: value for name, value in settings.items() if name not in keys}))


def unnamed(directory: Path) -> None:
    """Let the tokenizer name neither token; the model's own files still say where it stops."""
    without(directory, "tokenizer_config.json", "eos_token", "pad_token", "bos_token")
    without(directory, "config.json", "pad_token_id")
    without(directory, "generation_config.json", "pad_token_id")


def endless(directory: Path) -> None:
    """Name no end anywhere."""
    unnamed(directory)
    without(directory, "config.json", "eos_token_id")
    without(directory, "generation_config.json", "eos_token_id")


@pytest.fixture(scope="module")
def data(bench: Bench) -> Dataset:
    rows = [sum_row(left, 1) for left in range(8)]
    return publish(bench, Dataset, "bare", rows, DatasetFacts(rows=8))


@pytest.fixture(scope="module")
def models(bench: Bench) -> dict[str, Model]:
    whole = untrained(bench, 61)
    return {change.__name__: variant(bench.store, whole, change) for change in (unnamed, endless)}


@pytest.fixture(scope="module")
def lone(bench: Bench) -> Model:
    return lone_ended(bench)


@pytest.fixture(scope="module")
def loud(bench: Bench) -> Dataset:
    """Rows in which `!`, the token 0, is learned."""
    rows = [{**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": "so!"}]} for row in LOUD]
    return publish(bench, Dataset, "loud", rows, DatasetFacts(rows=len(rows)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("train.sft", {"max_tokens": 32}),
        ("train.sft", {"max_tokens": 32, "packing": True}),
        ("train.grpo", SAMPLED),
        ("train.rloo", SAMPLED),
        ("train.distill", {"max_new_tokens": 4}),
    ],
)
def test_a_tokenizer_that_names_no_tokens_is_trained_and_given_out_as_it_came(
    bench: Bench, data: Dataset, models: dict[str, Model], kind: str, settings: dict[str, Any]
) -> None:
    model = models["unnamed"]
    inputs = {"model": model, "data": data, **({"teacher": model} if kind == "train.distill" else {})}
    trained = bench.run(kind, inputs, adapter={"kind": "full"}, **SETTINGS, **settings)[""]
    before, after = load_tokenizer(model.path), load_tokenizer(trained.path)
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token) == (None, None)
    assert trained.facts.tokenizer_sha256 == model.facts.tokenizer_sha256


@pytest.mark.parametrize(("kind", "settings"), [("train.sft", {}), ("train.grpo", SAMPLED)])
def test_a_model_that_stops_at_nothing_is_not_trained(
    bench: Bench, data: Dataset, models: dict[str, Model], kind: str, settings: dict[str, Any]
) -> None:
    result = bench.attempt(kind, {"model": models["endless"], "data": data}, **SETTINGS, **settings)
    assert result.status == "refused"
    assert "`model` has no end token, so that it would never learn to stop; name one as `eos_token`" in result.message


def test_a_model_that_stops_at_nothing_answers_until_its_tokens_are_spent(models: dict[str, Model]) -> None:
    model = models["endless"]
    tokenizer = load_tokenizer(model.path)
    engine = TransformersEngine(load_model(model.path, "float32"), tokenizer, Decoding(temperature=0))
    written = engine.write([[5, 6, 7], [5]], ["a", "b"], 4)
    assert [(len(each.ids), each.stopped) for each in written] == [(4, False), (4, False)]


def test_a_turn_does_not_end_at_letters_where_there_is_no_end_token(models: dict[str, Model]) -> None:
    tokenizer = load_tokenizer(models["endless"].path)
    said = "one None more"
    talk = conversation(tokenizer, [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": said}])
    assert said in tokenizer.decode(talk.last_ids)


def settings_of(model: Model) -> dict[str, Any]:
    """What a checkpoint's files say of its tokens."""
    files = {name: json.loads((model.path / name).read_text()) for name in ("config.json", "generation_config.json")}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {f"{name} {key}": settings.get(key) for name, settings in files.items() for key in keys}


def test_a_trained_model_names_the_tokens_of_its_base_and_learns_them_all_when_trained_again(
    bench: Bench, lone: Model, loud: Dataset
) -> None:
    def padded(directory: Path) -> None:
        """As trainers leave a model behind: the token with which they pad is in its settings."""
        for name in ("config.json", "generation_config.json"):
            settings = json.loads((directory / name).read_text()) | {"pad_token_id": 0}
            replace(directory / name, json.dumps(settings))

    for base in (lone, variant(bench.store, lone, padded)):
        inputs = {"model": base, "data": loud}
        settings: dict[str, Any] = {**SETTINGS, "max_steps": 3, "learning_rate": 1e-2, "max_tokens": 32}
        trained = bench.run("train.sft", inputs, adapter={"kind": "full"}, **settings)[""]
        assert settings_of(trained) == settings_of(base)
        models: list[Any] = [load_model(each.path, "float32") for each in (base, trained)]
        before, after = (each.get_input_embeddings().weight[0] for each in models)
        assert not after.equal(before), "the embedding of `!`"


def for_training(model: Model, data: Dataset) -> Any:
    """The tokenizer as trainers get it."""
    job: Any = SimpleNamespace(name="sft")
    return training_tokenizer(TrainSft(model=model, data=data), job)


def test_what_only_trainers_name_is_read_as_text(lone: Model, loud: Dataset, bench: Bench) -> None:
    tokenizer, own = for_training(lone, loud), load_tokenizer(lone.path)
    assert tokenizer.pad_token == own.eos_token, "nothing else is special, and padding ends no answer by TRL's count"
    ids = own("so! it is!")["input_ids"]
    assert text_of(tokenizer, ids) == "so! it is!"

    def stops_at_a_letter(directory: Path) -> None:
        without(directory, "tokenizer_config.json", "eos_token")
        settings = json.loads((directory / "generation_config.json").read_text())
        replace(directory / "generation_config.json", json.dumps(settings | {"eos_token_id": [2]}))

    lettered = variant(bench.store, lone, stops_at_a_letter)
    tokenizer = for_training(lettered, loud)
    assert tokenizer.eos_token == "#" and 2 not in control_tokens(tokenizer)
    seen: list[tuple[str, int, bool]] = []
    audits: Any = SimpleNamespace(saw_rollouts=lambda each: seen.extend((r.text, r.tokens, r.truncated) for r in each))
    reward = Audits.rewards(audits, [Task("t", ({"role": "user", "content": "a"},), "", "s")], tokenizer, (2,))
    reward(completion_ids=[[*ids, 2], ids], task=[0, 0])
    assert seen == [("so! it is!", 11, False), ("so! it is!", 10, True)], "as `data.sample` reads them"


def test_a_reward_model_reads_an_answer_as_its_base_would(bench: Bench, lone: Model) -> None:
    """The token that pads for it, where none is special, is said like any other."""
    prompt = [{"role": "user", "content": "Well?"}]
    rows = [{"id": "1", "prompt": prompt, "chosen": "so!", "rejected": "no!", "source": "s"}] * 4
    data = publish(bench, Preferences, "loud-pairs", rows, PreferencesFacts(rows=4, paired=True))
    inputs = {"model": lone, "data": data}
    rated = bench.run("train.reward", inputs, adapter={"kind": "full"}, max_tokens=32, **SETTINGS)[""]
    assert rated.facts.tokenizer_sha256 == lone.facts.tokenizer_sha256
    assert control_tokens(load_tokenizer(rated.path)) == control_tokens(load_tokenizer(lone.path))
    pad = json.loads((rated.path / "config.json").read_text())["pad_token_id"]
    assert pad is not None and pad not in lone.facts.stop_token_ids
    assert settings_of(rated) == settings_of(lone) | {"config.json pad_token_id": pad}


def test_tokens_beyond_the_embedding_pad_nothing(bench: Bench, lone: Model, loud: Dataset) -> None:
    """Gemma 3's `<image_soft_token>` is such a token, as are padding tokens that were added to Llama 2's tokenizer."""

    def wider(directory: Path) -> None:
        tokenizer = load_tokenizer(directory)
        tokenizer.add_special_tokens({"pad_token": "<pad>", "extra_special_tokens": ["<image>"]})  # pyright: ignore[reportArgumentType]
        for file in directory.glob("tokenizer*"):
            file.unlink()
        tokenizer.save_pretrained(directory)

    wide = variant(bench.store, lone, wider)
    tokenizer = load_tokenizer(wide.path)
    assert tokenizer.pad_token_id == wide.facts.vocabulary
    assert for_training(wide, loud).pad_token_id < wide.facts.vocabulary
    engine = TransformersEngine(load_model(wide.path, "float32"), tokenizer, Decoding(temperature=0))
    assert len(engine.write([[5, 6, 7], [5]], ["a", "b"], 4)) == 2
    bench.run("train.sft", {"model": wide, "data": loud}, adapter={"kind": "full"}, max_tokens=32, **SETTINGS)


def test_a_stop_that_the_tokenizer_does_not_have_is_named(bench: Bench, lone: Model, loud: Dataset) -> None:
    def strange(directory: Path) -> None:
        without(directory, "tokenizer_config.json", "eos_token")
        settings = json.loads((directory / "generation_config.json").read_text())
        replace(directory / "generation_config.json", json.dumps(settings | {"eos_token_id": [350]}))

    with pytest.raises(UserError, match=r"`model` has no end token, so that it would never learn to stop; name one"):
        for_training(variant(bench.store, lone, strange), loud)
