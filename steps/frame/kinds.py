"""Step kinds: the decorator that declares one, and how a kind's name finds its file.

The kind `train.sft` lives in `steps/train/sft.py`, so a new kind is one new file. A step's module imports only light
things at its top; torch and its friends are imported inside the functions, because planning reads every module.
"""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import steps as rooms
from steps.artifacts import Artifact
from steps.frame.config import EdgeSpec, Resources, StepConfig, edges_of
from steps.frame.errors import UserError, did_you_mean

C = TypeVar("C", bound=StepConfig)

ABSENT = "absent"
# Packages of `steps` that hold the frame and what step kinds share, not step kinds.
_NOT_KINDS = {"artifacts", "frame", "runtime", "sources", "lm"}


@dataclass(frozen=True)
class Like:
    """Declares an output of whatever kind the artifacts of an input are."""

    field: str


Produces = type[Artifact[Any]] | tuple[type[Artifact[Any]], ...] | Like
"""What an output may be: one kind, several among which the config's `produced()` chooses, or an input's own kind."""


@dataclass(frozen=True)
class StepKind:
    """A step kind as the planner sees it."""

    name: str
    config: type[StepConfig]
    produces: Mapping[str, Produces]
    """What each output may be; the only output of a step has the name ``."""
    run: Callable[..., Any]
    reference: str
    """The paper or page that it implements."""
    libraries: tuple[str, ...]
    """Distributions whose versions shape the result."""
    preload: tuple[str, ...]
    """Modules the fork server imports once for all steps."""
    resources: Resources
    environment: str
    """Name of the environment it runs in; empty is the project's own."""
    opens: bool = True
    """Whether it opens the models among its inputs, so that it needs the native runtimes that open them."""
    edges: Mapping[str, EdgeSpec] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, tuple[type[Artifact[Any]], ...]]:
        """Kinds that each output may be; a config may leave some of them out (`StepConfig.not_given`)."""
        return {name: self._choice(declared) for name, declared in self.produces.items()}

    def outputs_of(
        self, config: StepConfig, given: Mapping[str, type[Artifact[Any]]]
    ) -> dict[str, type[Artifact[Any]]]:
        """Kind of each output that this config gives, for the kinds of its inputs, by field."""
        found = {}
        for name, declared in self.produces.items():
            if name in config.not_given:
                continue
            choice = self._choice(declared)
            if isinstance(declared, Like):
                found[name] = given.get(declared.field, choice[0])
            else:
                found[name] = choice[0] if len(choice) == 1 else config.produced()  # pyright: ignore[reportAttributeAccessIssue]
        return found

    def _choice(self, declared: Produces) -> tuple[type[Artifact[Any]], ...]:
        if isinstance(declared, Like):
            return self.edges[declared.field].kinds
        return declared if isinstance(declared, tuple) else (declared,)

    @property
    def summary(self) -> str:
        """First line of the config's docstring."""
        return (self.config.__doc__ or "").strip().splitlines()[0]

    def library_versions(self, config: StepConfig) -> dict[str, str]:
        """Installed versions of `libraries` and of what the config needs beside them, without importing them."""
        return {name: version_of(name) for name in (*self.libraries, *config.packages)}


_kinds: dict[str, StepKind] = {}


def step(
    name: str,
    *,
    produces: Produces | Mapping[str, Produces],
    reference: str,
    libraries: tuple[str, ...] = (),
    preload: tuple[str, ...] = (),
    resources: Resources | None = None,
    environment: str = "",
    opens: bool = True,
) -> Callable[[Callable[[C, Any], Any]], Callable[[C, Any], Any]]:
    """Register the decorated function as a step kind.

    The function takes its config (inputs already resolved to artifacts) and a `Job`, and returns a draft, or one
    draft per output. `name` must be the module's own path, so that a kind is found without a table. `produces` is
    one artifact kind, a tuple of kinds among which the config's method `produced()` chooses, `Like("field")` for the
    kind of an input, or a mapping for several outputs, of which the config's `not_given` may leave out some.
    """

    def register(run: Callable[[C, Any], Any]) -> Callable[[C, Any], Any]:
        if run.__module__ != f"steps.{name}":
            raise TypeError(f"step kind {name} must live in steps/{name.replace('.', '/')}.py, not {run.__module__}")
        config = next(iter(run.__annotations__.values()))
        _kinds[name] = StepKind(
            name=name,
            config=config,
            produces=dict(produces) if isinstance(produces, Mapping) else {"": produces},
            run=run,
            reference=reference,
            libraries=libraries,
            preload=preload,
            resources=resources or Resources(cpus=1),
            environment=environment,
            opens=opens,
            edges=edges_of(config),
        )
        return run

    return register


def load_kind(name: str) -> StepKind:
    """Return a step kind by name, importing only its own module.

    Raises:
        UserError: there is no such kind.
    """
    if name not in kind_names():
        raise UserError(f"unknown step kind `{name}`{did_you_mean(name, kind_names())}")
    importlib.import_module(f"steps.{name}")
    return _kinds[name]


def all_kinds() -> list[StepKind]:
    """Return every step kind, sorted by name."""
    return [load_kind(name) for name in kind_names()]


def modules_of(kinds: Iterable[StepKind]) -> list[str]:
    """Return the modules that the fork server imports for steps of these kinds: their own first, then the heavy ones.

    In this order because pydantic, which reads each setting's docstring, looks for its source among all modules that
    are loaded: the settings of `train.grpo` take 0.1 s before torch is there and 2.7 s after it.
    """
    every = list(kinds)
    return list(
        dict.fromkeys([*(f"steps.{kind.name}" for kind in every), *(name for k in every for name in k.preload)])
    )


@cache
def kind_names() -> tuple[str, ...]:
    """Return the names of all step kinds: the modules `steps/<room>/<kind>.py` whose names have no underscore first."""
    names = []
    for room in pkgutil.iter_modules(rooms.__path__):
        if not room.ispkg or room.name in _NOT_KINDS:
            continue
        path = [f"{base}/{room.name}" for base in rooms.__path__]
        modules = pkgutil.iter_modules(path)
        names += [
            f"{room.name}.{module.name}" for module in modules if not (module.ispkg or module.name.startswith("_"))
        ]
    return tuple(sorted(names))


@cache
def version_of(distribution: str) -> str:
    """Return the version of a distribution as it is installed, ABSENT where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT
