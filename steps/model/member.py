"""`model.member`: a family's member, as it was published."""

from typing import Literal

from steps.artifacts import Artifact, Draft, Manifest, Model, Quantized, kind_named, link_or_copy
from steps.frame import Job, Resources, Source, StepConfig, UserError, step


class ModelMember(StepConfig):
    """Take a member of a family from the registry, as it was published."""

    uri: Source
    """`registry://FAMILY@REFERENCE/FORMAT`, e.g. `registry://smollm2-stdlib@champion/gguf:Q4_K_M`."""
    kind: Literal["Model", "Quantized"] = "Model"
    """What it is; a `Model` is trained and evaluated as any other, a `Quantized` one only evaluated."""

    @property
    def opened_by(self) -> tuple[str, ...]:
        """llama.cpp, for a GGUF."""
        return ("llama.cpp",) if self.uri.partition("@")[2].partition("/")[2].startswith("gguf") else ()

    def produced(self) -> type[Artifact]:
        """The kind that the settings say."""
        return kind_named(self.kind)


@step(
    "model.member",
    produces=(Model, Quantized),
    reference="https://mlflow.org/docs/latest/ml/model-registry/",
    resources=Resources(cpus=1),
    opens=False,
)
def model_member(config: ModelMember, job: Job) -> Draft:
    """Link the member's files, which the flow has fetched; its facts stay what they were.

    Raises:
        UserError: the URI is not of a registry, or the member is of another kind.
    """
    if config.uri not in job.resolved:
        raise UserError(f"model.member: `{config.uri}` names no member; write `registry://FAMILY@REFERENCE/FORMAT`")
    path = job.resolved[config.uri].path
    manifest = Manifest.read(path)
    if manifest.kind != config.kind:
        raise UserError(f"{config.uri}: this is of kind {manifest.kind}; set `kind` to it, or name another format")
    out = job.output()
    for name in manifest.files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path / name, out / name)
    member = kind_named(config.kind)(path, manifest)
    return Draft(type(member), out, member.facts)
