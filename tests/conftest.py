"""What many tests share: a fork server, a store, and a pico model made once in the session."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from steps.artifacts import Artifact, Store
from steps.frame import Resources
from steps.frame.keys import step_key
from steps.frame.kinds import all_kinds, load_kind, modules_of
from steps.frame.launch import Launcher
from steps.frame.spec import InputSpec, StepResult, StepSpec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def pytest_configure() -> None:
    """Give each of several test processes cores of its own: on shared ones their threads wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and sys.platform == "linux":
        every = sorted(os.sched_getaffinity(0))
        own = every[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
        os.sched_setaffinity(0, own or every)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one of two test processes take the steps, which share models, and the other all the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class Rooms(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "steps" if nodeid.startswith("tests/steps/") else "flows"

    return Rooms(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the fast tests first: what is broken should show at once."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


class Bench:
    """Runs single steps as the flow would: spec, process of its own, published artifacts."""

    def __init__(self, root: Path, launcher: Launcher) -> None:
        self.root = root
        self.launcher = launcher
        self.store = Store(root / "artifacts")
        self.last: StepResult | None = None

    def attempt(self, kind: str, inputs: Any = None, **config: Any) -> StepResult:
        """Run a step and return what became of it, refused and failed included."""
        self.last = self.launcher.run(self.spec(kind, inputs, **config))
        return self.last

    def spec(
        self,
        kind: str,
        inputs: Mapping[str, Artifact[Any] | Sequence[Artifact[Any]]] | None = None,
        name: str | None = None,
        resources: Resources | None = None,
        **config: Any,
    ) -> StepSpec:
        """Write down a step as the flow would, on one core: what is asserted must not depend on how many there are."""
        declared = load_kind(kind)
        granted = resources or declared.resources.model_copy(update={"cpus": declared.resources.cpus or 1})
        given = {
            field: [value] if isinstance(value, Artifact) else list(value) for field, value in (inputs or {}).items()
        }
        lists = tuple(field for field, value in (inputs or {}).items() if not isinstance(value, Artifact))
        parents = {
            field: [f"{artifact.manifest.key}:{artifact.manifest.output}" for artifact in value]
            for field, value in given.items()
        }
        whole = declared.config.model_validate(
            {**config, **{field: value if field in lists else value[0] for field, value in given.items()}}
        )
        plain = whole.model_dump(mode="json", exclude=set(given))
        key = step_key(declared, whole, parents, {}, granted.world)
        return StepSpec(
            name=name or kind.rpartition(".")[2],
            kind=kind,
            key=key,
            config=plain,
            inputs={
                field: tuple(InputSpec(path=artifact.path, digest=artifact.digest) for artifact in value)
                for field, value in given.items()
            },
            lists=lists,
            work=self.root / "work" / key[:16],
            store=self.store.root,
            cache=self.root / "cache",
            resources=granted,
        )

    def run(self, kind: str, inputs: Any = None, **config: Any) -> dict[str, Any]:
        """Run a step that must finish; return its artifacts by output name."""
        result = self.attempt(kind, inputs, **config)
        assert result.status == "finished", result.message
        return {name: self.store.open(digest) for name, digest in result.outputs.items()}


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One fork server for all tests, with the heavy libraries loaded."""
    launcher = Launcher(modules_of(all_kinds()), tmp_path_factory.mktemp("forkserver") / "log.txt")
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Bench:
    """A store and work directory that last for the session."""
    root = tmp_path_factory.mktemp("bench")
    (root / "cache").mkdir()
    return Bench(root, launcher)


@pytest.fixture(scope="session")
def pico(bench: Bench) -> Any:
    """A pretrained pico model (hidden 256, 2 layers)."""
    return bench.run("model.pico", seed=1)[""]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a text file below the test's directory."""

    def writer(name: str, content: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        return path

    return writer
