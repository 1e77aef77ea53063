"""The frame: a step runs in its own process, publishes whole or not at all, and its digest is the same twice."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from steps.artifacts import Dataset, DatasetFacts, Manifest, Store, digest_tree
from steps.frame import Resources, StepConfig, all_kinds, load_kind
from steps.frame.config import edges_of
from steps.frame.launch import Launcher
from steps.frame.spec import InputSpec, StepSpec
from tests.conftest import Bench
from tests.steps.conftest import publish, sum_row

TINY = {"hidden": 32, "layers": 1, "vocabulary": 300, "pretrain_steps": 2}


def staged(root: Path, content: dict[str, bytes]) -> Manifest:
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    tree = digest_tree(root)
    return Manifest(
        kind="Report",
        tree=tree.sha256,
        files=tree.files,
        parents={},
        step="test",
        output="",
        key="k",
        config={},
        libraries={},
        facts={"metrics": {}},
    )


def spec_of(root: Path, **changes: Any) -> StepSpec:
    config = load_kind("model.pico").config.model_validate(TINY).model_dump(mode="json")
    values = {
        "name": "tiny",
        "kind": "model.pico",
        "key": "0" * 64,
        "config": config,
        "inputs": {},
        "work": root / "work",
        "store": root / "artifacts",
        "cache": root / "cache",
        "resources": Resources(cpus=1),
    }
    return StepSpec.model_validate({**values, **changes})


def test_tree_digest_is_what_sha256sum_prints(tmp_path: Path) -> None:
    staged(tmp_path, {"a.txt": b"one", "sub/b.txt": b"two", "sub/a.txt": b""})
    line = "find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    printed = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert digest_tree(tmp_path).sha256 == printed.split()[0]


def test_artifact_digest_is_what_sha256sum_prints(tmp_path: Path) -> None:
    manifest = staged(tmp_path / "staging", {"a.txt": b"one"})
    artifact = Store(tmp_path / "store").publish(tmp_path / "staging", manifest)
    command = ["sha256sum", str(artifact.path / "artifact.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split()[0] == artifact.digest == artifact.path.name


def test_publishing_again_replaces_what_is_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    manifest = staged(tmp_path / "one", {"a.txt": b"one"})
    artifact = store.publish(tmp_path / "one", manifest)
    (artifact.path / "a.txt").chmod(0o644)
    (artifact.path / "a.txt").write_bytes(b"0ne")
    assert store.fault(artifact.digest) == "a.txt was changed"
    store.publish(tmp_path / "two", staged(tmp_path / "two", {"a.txt": b"one"}))
    assert store.fault(artifact.digest) is None


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda path: (path / "a.txt").unlink(), "a.txt is missing"),
        (lambda path: (path / "b.txt").write_bytes(b""), "b.txt does not belong to it"),
        (lambda path: (path / "artifact.json").write_bytes(b"{}"), "artifact.json is damaged"),
    ],
)
def test_every_kind_of_damage_is_seen(tmp_path: Path, harm: Any, fault: str) -> None:
    store = Store(tmp_path / "store")
    artifact = store.publish(tmp_path / "one", staged(tmp_path / "one", {"a.txt": b"one"}))
    for path in artifact.path.iterdir():
        path.chmod(0o644)
    harm(artifact.path)
    assert store.fault(artifact.digest) == fault


@pytest.mark.parametrize("target", ["/etc/passwd", "/etc", "/nowhere", "."])
def test_a_symbolic_link_is_no_content(target: str, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "link").symlink_to(target)
    with pytest.raises(ValueError, match="symbolic link"):
        digest_tree(tmp_path)


def test_what_is_no_file_is_no_content(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        digest_tree(tmp_path)


def test_pico_model_is_published_with_its_facts(bench: Bench, pico: Any) -> None:
    assert pico.kind == "Model"
    assert 0.5e6 < pico.facts.parameters < 2e6
    assert pico.facts.template_sha256
    assert bench.store.fault(pico.digest) is None


def test_same_step_gives_the_same_digest_in_any_process(bench: Bench, tmp_path: Path) -> None:
    forked = bench.launcher.run(spec_of(tmp_path / "forked"))
    fresh = bench.launcher.run(spec_of(tmp_path / "fresh"), python=sys.executable)
    assert forked.status == fresh.status == "finished", forked.message + fresh.message
    assert forked.outputs == fresh.outputs
    assert forked.peak_memory > 100e6


def test_what_a_step_prints_is_in_its_log(bench: Bench, tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    bench.launcher.run(spec)
    assert "begins: tiny (model.pico)" in (spec.work / "log.txt").read_text()
    losses = [json.loads(line) for line in (spec.work / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in losses] == [0, 1]


def test_a_step_beyond_its_timeout_is_killed_with_its_group(bench: Bench, tmp_path: Path) -> None:
    config = load_kind("model.pico").config.model_validate({"pretrain_steps": 100_000}).model_dump(mode="json")
    spec = spec_of(tmp_path, config=config, resources=Resources(cpus=1, timeout_minutes=0.05))
    result = bench.launcher.run(spec)
    assert result.status == "failed"
    assert "killed after its timeout of 0.05 minutes" in result.message
    assert not (tmp_path / "artifacts").exists()


def test_steps_die_with_their_flow(tmp_path: Path) -> None:
    launcher = Launcher([], tmp_path / "log.txt")
    config = load_kind("model.pico").config.model_validate({"pretrain_steps": 100_000}).model_dump(mode="json")
    spec = spec_of(tmp_path, config=config)
    code = (
        "import sys; from pathlib import Path; from steps.frame.launch import Launcher; "
        "from steps.frame.spec import InputSpec, StepSpec; "
        "Launcher([], Path(sys.argv[1])).run(StepSpec.model_validate_json(sys.argv[2]))"
    )
    launcher.close()
    import time

    import psutil

    flow = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log.txt"), spec.model_dump_json()])
    deadline = time.monotonic() + 60
    while not (spec.work / "progress.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(flow.pid).children(recursive=True)
    assert len(family) >= 2
    flow.kill()
    flow.wait()
    gone, alive = psutil.wait_procs(family, timeout=15)
    assert not alive
    assert gone


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_full_disk_is_one_sentence_and_leaves_nothing(bench: Bench, small_disk: Path) -> None:
    config = load_kind("model.pico").config.model_validate({"pretrain_steps": 1}).model_dump(mode="json")
    result = bench.launcher.run(spec_of(small_disk, config=config))
    assert result.status == "refused"
    assert "is full" in result.message
    assert "\n" not in result.message
    assert not list(small_disk.glob("artifacts/*"))
    assert not (small_disk / "work" / "staging").exists()


def test_what_pydantic_refuses_in_a_step_is_one_sentence(bench: Bench, tmp_path: Path) -> None:
    result = bench.launcher.run(spec_of(tmp_path, config={"hidden": "many", "layers": 0}))
    assert result.status == "refused"
    assert result.message.startswith("step `tiny` (model.pico): hidden: input should be a valid integer")
    assert "\n" not in result.message
    # An artifact whose facts are none of its kind's.
    manifest = staged(tmp_path / "staging", {"a.txt": b"one"}).model_copy(update={"facts": {"metrics": 3}})
    with pytest.raises(ValidationError):
        Store(tmp_path / "artifacts").publish(tmp_path / "staging", manifest)
    report = InputSpec(path=tmp_path / "artifacts" / manifest.digest, digest=manifest.digest)
    bundle = spec_of(tmp_path, kind="package.bundle", config={"title": "x"}, inputs={"report": (report,)})
    result = bench.launcher.run(bundle)
    assert result.status == "failed" and "\n" not in result.message
    assert result.message.startswith("ReportFacts: metrics: input should be a valid dictionary (at steps/")
    assert result.message.endswith(f"; its log is {bundle.work / 'log.txt'}")


def test_planning_sees_every_kind_without_torch() -> None:
    code = "import sys; from steps.frame import all_kinds; all_kinds(); print([m for m in ('torch', 'transformers', 'mlflow', 'prefect') if m in sys.modules])"  # noqa: E501
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.name)
def test_every_kind_is_documented(kind: Any) -> None:
    assert issubclass(kind.config, StepConfig)
    assert kind.summary.endswith(".")
    assert kind.reference.startswith("https://")
    assert set(edges_of(kind.config)) == set(kind.edges)


def test_numbers_without_end_are_refused_at_any_depth_for_a_key_cannot_hold_them() -> None:
    class Inner(BaseModel):
        share: float = 0.0

    class Outer(StepConfig):
        own: float = 0.0
        inner: Inner = Inner()
        several: dict[str, list[Inner]] = {}

    for odd in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValidationError, match=r"own\n.*finite number"):
            Outer.model_validate({"own": odd})
        with pytest.raises(ValidationError, match=r"`inner\.share` must be a finite number"):
            Outer.model_validate({"inner": {"share": odd}})
        with pytest.raises(ValidationError, match=r"`several\.a\.1\.share` must be a finite number"):
            Outer.model_validate({"several": {"a": [{}, {"share": odd}]}})
    assert Outer.model_validate({"own": 1e308, "several": {"a": [{"share": -1e308}]}})


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file or directory"), ("name: x", "invalid JSON"), ("{}", "name: field")]
)
def test_what_is_no_spec_is_one_sentence_and_code_2(content: str | None, why: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    if content is not None:
        spec.write_text(content)
    ended = subprocess.run([sys.executable, "-m", "steps", str(spec)], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"{spec}: ")
    assert why in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("train.grpo", {"rewards": [{"kind": "exact"}], "batch_size": 8, "max_steps": 1}),
        ("train.sft", {"max_steps": 1}),
        ("evaluate.tasks", {}),
    ],
)
def test_an_empty_set_is_refused_before_the_step_begins(bench: Bench, kind: str, settings: dict[str, Any]) -> None:
    rows = [sum_row(left, 3) for left in range(8)]
    full, empty = (
        publish(bench, Dataset, f"{kind} {len(part)}", part, DatasetFacts(rows=len(part))) for part in (rows, [])
    )
    model = bench.run("model.pico", **TINY)[""]
    trained = {"model": model, "data": full, "eval": empty}
    result = bench.attempt(kind, {"candidates": [model], "data": empty} if "evaluate" in kind else trained, **settings)
    assert result.status == "refused"
    assert f"`{'data' if 'evaluate' in kind else 'eval'}` (from test) has no rows" in result.message
