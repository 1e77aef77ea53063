"""Step configs: frozen pydantic models whose `Input[...]` fields are the edges of the recipe's graph."""

import math
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from steps.artifacts import Artifact
from steps.frame.metric import Metric

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Where random numbers begin; NumPy's generators take no other."""


@dataclass(frozen=True)
class Ref:
    """A reference to another step's output, as a recipe writes it: `sft` or `data.train`."""

    step: str
    output: str = ""

    @classmethod
    def parse(cls, text: str) -> "Ref":
        """Read `step` or `step.output`. Names of matrix members, `gguf[Q4_K_M]`, keep their brackets."""
        head, bracket, tail = text.partition("]")
        if bracket:
            return cls(head + bracket, tail.removeprefix("."))
        step, _, output = text.partition(".")
        return cls(step, output)

    def __str__(self) -> str:
        return f"{self.step}.{self.output}" if self.output else self.step


class Edge:
    """Marks a field as an input. Before the run it holds a `Ref`, inside the step the artifact itself."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds = kinds_in(source)

        def check(value: Any) -> Any:
            if isinstance(value, (Ref, *kinds)):
                return value
            if isinstance(value, str):
                return Ref.parse(value)
            raise ValueError(f"name the step that makes it, not {value!r}")

        return core_schema.no_info_plain_validator_function(
            check, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "description": "Name of a step (`sft`) or of one output of a step (`data.train`)."}


class SourceMark:
    """Marks a string field as an external source; its fingerprint is part of the step's key."""


class Chooses:
    """Marks an input by whose rows a step chooses what it gives out: a checkpoint, or one of several candidates.

    `eval: Annotated[Input[Dataset] | None, Chooses()]`. What was chosen looks better on those rows than it is; which
    they were travels with it, as `chosen_on` of its facts.
    """


K = TypeVar("K")
Input = Annotated[K, Edge()]
"""`Input[Model]`: the field takes the output of a step that gives a Model. `Input[Model | Quantized]` takes either."""

Source = Annotated[str, SourceMark()]
"""A URI outside the recipe: `pypi://`, `hf://`, `file://`, `registry://`, a path, or a built-in data source."""


@dataclass(frozen=True)
class Follow:
    """Default of an input: what to connect when the recipe does not say.

    `Follow("base")` is the recipe's own base; `Follow("adapter.model")` is whatever the step behind the field
    `adapter` took as its `model`.
    """

    path: str
    required: bool = True
    """Whether it is an error that there is nothing to follow."""


def Follows(path: str, *, required: bool = True) -> Any:  # noqa: N802 - reads as a field default, like pydantic's Field
    """Field default that makes the graph fill an unset input, see `Follow`."""
    return Field(default=None, json_schema_extra={"follows": path, "required": required})


def NamesOf(field: str) -> Any:  # noqa: N802 - reads as a field default, like pydantic's Field
    """Field default that the graph fills with the names of the steps behind an input field.

    For a list of inputs the field is a `tuple[str, ...]`, for a single one a `str`.
    """
    return Field(default=None, json_schema_extra={"names_of": field})


Launch = Literal["ddp", "ddp-cpu", "fsdp2", "zero2", "zero3"]
"""How several processes share the work; each is a file of `infra/accelerate/`, which says what it is for."""


class Resources(BaseModel):
    """What a step asks of the machine that runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    cpus: int = Field(default=0, ge=0)
    """Cores of each node; 0 takes all."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of each node; with more than one, each is driven by a process of its own. 0 reserves none: the step may use
    the first, beside others, where the machine has one."""
    nodes: int = Field(default=1, ge=1)
    """Machines that take part."""
    processes: int = Field(default=0, ge=0)
    """Processes on each node; 0 is one for each GPU, and one where there is none."""
    launch: Launch | None = None
    """How several processes share the work: `ddp` on GPUs and `ddp-cpu` without any, unless it says otherwise."""
    memory_gb: float = Field(default=0, ge=0)
    """Memory to reserve in GB; 0 leaves it unreserved."""
    timeout_minutes: float = Field(default=0, ge=0)
    """Minutes after which the step is killed; 0 is no limit."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.launch == "ddp-cpu" and self.gpus:
            raise ValueError("`launch: ddp-cpu` computes on processors; leave `gpus` out, or take `launch: ddp`")
        if self.launch not in (None, "ddp-cpu") and not self.gpus:
            raise ValueError(f"`launch: {self.launch}` needs `gpus`; processes without any take `launch: ddp-cpu`")
        if self.gpus and self.processes not in (0, self.gpus):
            raise ValueError("each GPU is driven by one process; leave `processes` out")
        return self

    @property
    def local_processes(self) -> int:
        """Processes on each node."""
        return self.processes or self.gpus or 1

    @property
    def world(self) -> int:
        """Processes on all nodes together."""
        return self.local_processes * self.nodes

    @property
    def divided(self) -> bool:
        """Whether processes hold only parts of the weights, gradients or optimizer state."""
        return self.world > 1 and self.launcher in ("fsdp2", "zero2", "zero3")

    @property
    def launcher(self) -> Launch:
        """How several processes share the work."""
        return self.launch or ("ddp" if self.gpus else "ddp-cpu")


class StepConfig(BaseModel):
    """Base of every step's config. Unknown keys are refused; nothing can be changed after validation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )

    processes_shape_result: ClassVar[bool] = False
    """Whether several processes give another result than one: then how many they are is part of the key."""

    @model_validator(mode="after")
    def _is_finite(self) -> Self:
        """Refuse what a key cannot hold in settings of settings, too (`adapter.alpha`), whatever models they are."""
        for name in type(self).model_fields:
            if place := next(_infinite(getattr(self, name), name), None):
                raise ValueError(f"`{place}` must be a finite number")
        return self

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that these settings need beside those that every step of the kind does.

        They are not among the project's own: the plan blocks a step whose are not installed, and their versions enter
        its key.
        """
        return ()

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Native runtimes (`posttrain doctor` lists them) that these settings call, torch and CUDA aside.

        The plan blocks a step whose runtime is broken on this machine.
        """
        return ()

    @property
    def opened_by(self) -> tuple[str, ...]:
        """Native runtimes by which what these settings make is opened, torch aside: steps that take it need them."""
        return ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Figures of the report that these settings give; gates can be put on no other."""
        return ()

    @property
    def scheme_made(self) -> tuple[str, str] | None:
        """Format and scheme of the quantized model that these settings give, `("gguf", "Q4_K_M")`.

        None where they give none, or do not say which. A release has one of each.
        """
        return None

    @property
    def not_given(self) -> Mapping[str, str]:
        """Outputs of the step that these settings leave out, each with the reason and what would give it.

        The plan refuses a recipe that takes one. An empty set in its place would only be found out by the step that
        takes it, after all the training that comes before.
        """
        return {}

    def rendering(self, *, has_rows: bool) -> tuple[str, ...]:
        """Return the fields of the models whose chat template writes conversations.

        Args:
            has_rows: whether the step takes conversations of another.
        """
        return ("model",) if has_rows else ()

    @property
    def gives_tied(self) -> bool | None:
        """Whether the embedding of the model that these settings give is its output layer, too; None: not known."""
        return None

    def check_tied(self, fields: Collection[str]) -> None:
        """Check the settings against models whose embedding is their output layer, too, before anything runs.

        Args:
            fields: inputs that get such a model, as far as that is known then.

        Raises:
            ValueError: the settings do not fit one of them; the sentence says what would.
        """

    def check_resources(self, resources: Resources) -> None:
        """Check that what the step is granted can run these settings; steps that processes can share say so here.

        Raises:
            ValueError: it cannot; the sentence says what would be right.
        """
        if resources.world > 1:
            raise ValueError(
                f"{resources.world} processes cannot share this step; leave `processes` and `nodes` out, and ask for "
                "one GPU at most"
            )


@dataclass(frozen=True)
class EdgeSpec:
    """What the planner knows of one input field."""

    field: str
    kinds: tuple[type[Artifact[Any]], ...]
    many: bool
    optional: bool
    follow: Follow | None


def _infinite(value: Any, place: str) -> Iterator[str]:
    """Yield where a setting holds infinity or what is no number."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield place
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _infinite(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _infinite(each, f"{place}.{key}")


def edges_of(config: type[StepConfig]) -> dict[str, EdgeSpec]:
    """Return the input fields of a config class, by field name."""
    edges = {}
    for name, field in config.model_fields.items():
        annotation: Any = field.annotation
        if any(isinstance(mark, Edge) for mark in field.metadata):
            annotation = Annotated[annotation, Edge()]
        marked = list(_marked(annotation, Edge))
        if not marked:
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        path = extra.get("follows")
        edges[name] = EdgeSpec(
            field=name,
            kinds=tuple(kind for source in marked for kind in kinds_in(source)),
            many=get_origin(annotation) in (list, tuple),
            optional=not field.is_required(),
            follow=Follow(str(path), bool(extra["required"])) if path else None,
        )
    return edges


def choices_of(config: type[StepConfig]) -> tuple[str, ...]:
    """Return the input fields that are marked with `Chooses`."""
    return tuple(
        name for name, field in config.model_fields.items() if any(isinstance(mark, Chooses) for mark in field.metadata)
    )


def name_fields_of(config: type[StepConfig]) -> dict[str, str]:
    """Return the fields declared by `NamesOf`, each with the input field whose steps it names."""
    found = {}
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "names_of" in extra:
            found[name] = str(extra["names_of"])
    return found


def sources_of(config: StepConfig) -> dict[str, list[str]]:
    """Return the external sources that a config names, by field."""
    found = {}
    for name, field in type(config).model_fields.items():
        marked = any(isinstance(mark, SourceMark) for mark in field.metadata)
        if not marked and not any(True for _ in _marked(field.annotation, SourceMark)):
            continue
        value = getattr(config, name)
        found[name] = [value] if isinstance(value, str) else list(value or ())
    return found


def kinds_in(annotation: Any) -> tuple[type[Artifact[Any]], ...]:
    """Return the artifact classes in `Model` or `Model | Quantized`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for part in get_args(annotation) for kind in kinds_in(part))
    return (annotation,) if isinstance(annotation, type) and issubclass(annotation, Artifact) else ()


def _marked(annotation: Any, mark: type) -> Iterator[Any]:
    """Yield what each `Annotated[..., mark]` inside an annotation wraps."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        if any(isinstance(each, mark) for each in marks):
            yield inner
            return
    for part in get_args(annotation):
        yield from _marked(part, mark)
