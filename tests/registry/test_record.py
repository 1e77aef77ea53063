"""Executions and steps in a real embedded MLflow: whole or not at all, and no byte twice."""

import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from registry.errors import RegistryError
from registry.home import Home
from registry.index import Index
from registry.record import Recorder
from registry.run_data import flatten, mlflow_name, read_points
from tests.registry.workshop import BEGAN, Workshop


def curve(path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {"step": step, "time": 1e9 + step, "values": {"loss": 3.0 - step}} for step in range(3)
    ]
    lines.append({"step": 2, "time": 1e9 + 9, "values": {"loss": 0.5}})
    lines.append({"step": None, "time": 1e9 + 10, "values": {"gguf[Q4_K_M]/kl": 0.25}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ti')
    return path


def files_of(workshop: Workshop, run_id: str) -> dict[str, Path]:
    root = path_of(workshop.recorder.tracking.client.get_run(run_id).info.artifact_uri)
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}


def model_file(workshop: Workshop, model_id: str, name: str) -> Path:
    return path_of(workshop.recorder.tracking.client.get_logged_model(model_id).artifact_location) / name


def path_of(uri: str | None) -> Path:
    assert uri
    return Path(unquote(urlsplit(uri).path))


def test_importing_the_registry_leaves_mlflow_and_numpy_alone() -> None:
    code = (
        "import sys, registry.pull, registry.record, registry.family, registry.gates;"
        "print(*{'mlflow', 'numpy', 'torch', 'prefect', 'sqlalchemy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == []


def test_a_step_is_recorded_with_everything_it_was(workshop: Workshop, tmp_path: Path) -> None:
    client = workshop.recorder.tracking.client
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"png")
    (tmp_path / "log.txt").write_text("hello")
    base, data = workshop.model(b"base"), workshop.dataset()
    execution = workshop.begin()
    execution.record(workshop.step("base", base))
    execution.record(workshop.step("data", data))
    tuned = workshop.model(b"tuned", step="merge.adapter", parents={"model": base})
    entry = execution.record(
        workshop.step(
            "merged",
            tuned,
            inputs={"model": base, "data": data},
            config={"adapter": {"rank": 16}, "targets": ["q", "v"], "name": "x", "none": None},
            libraries={"torch": "2.13.0"},
            metrics_file=curve(tmp_path / "metrics.jsonl"),
            plots_dir=tmp_path / "plots",
            log_file=tmp_path / "log.txt",
            subjects={"gguf[Q4_K_M]": base.digest},
        )
    )
    execution.finish()

    run = client.get_run(entry.run_id)
    assert run.info.status == "FINISHED"
    assert (run.info.start_time, run.info.end_time) == (BEGAN.timestamp() * 1000, BEGAN.timestamp() * 1000 + 2500)
    assert run.data.tags["mlflow.parentRunId"] == execution.run_id
    assert run.data.tags["posttrain.key"] == tuned.manifest.key
    assert json.loads(run.data.tags["posttrain.outputs"]) == {"": tuned.digest}
    assert run.data.params == {"adapter.rank": "16", "targets": '["q", "v"]', "name": "x", "none": "null"}
    assert [(point.step, point.value) for point in client.get_metric_history(entry.run_id, "loss")] == [
        (0, 3.0),
        (1, 2.0),
        (2, 0.5),
    ]
    assert entry.metrics["loss"] == 0.5
    assert entry.metrics["gguf[Q4_K_M]/kl"] == run.data.metrics["gguf:Q4_K_M/kl"] == 0.25

    model = client.get_logged_model(entry.models[""])
    assert (model.status, model.source_run_id, model.name) == ("READY", entry.run_id, "merged")
    assert (model.tags["posttrain.digest"], model.tags["posttrain.format"]) == (tuned.digest, "hf")
    assert json.loads(model.tags["posttrain.parents"]) == {"model": base.digest}
    assert {metric.key: metric.value for metric in model.metrics or []}["loss"] == 0.5
    base_entry = workshop.recorder.find(base.manifest.key)
    assert base_entry
    about_base = client.get_logged_model(base_entry.models[""]).metrics or []
    assert ("gguf:Q4_K_M/kl", 0.25) in [(metric.key, metric.value) for metric in about_base]
    assert run.inputs
    assert run.outputs
    assert [output.model_id for output in run.outputs.model_outputs] == [entry.models[""]]
    assert [each.model_id for each in run.inputs.model_inputs] == [base_entry.models[""]]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == data.digest[:36]
    assert json.loads(dataset.dataset.source)["digest"] == data.digest
    assert {tag.key: tag.value for tag in dataset.tags} == {"mlflow.data.context": "data"}

    found = files_of(workshop, entry.run_id)
    assert set(found) == {"entry.json", "log.txt", "plots/loss.png", "manifests/output/artifact.json"}
    parent = client.get_run(execution.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["who"] == "test"
    assert "| merged | 2.5 s |" in parent.data.tags["mlflow.note.content"]
    assert files_of(workshop, execution.run_id)["environment.txt"].read_text() == "numpy==2.2.6\ntorch==2.13.0\n"
    assert files_of(workshop, execution.run_id)["recipe.yaml"].read_text() == "name: pico\n"


def test_files_are_linked_and_not_copied(workshop: Workshop) -> None:
    execution = workshop.begin()
    model, data = workshop.model(), workshop.dataset()
    made = execution.record(workshop.step("base", model))
    prepared = execution.record(workshop.step("data", data))
    for name in (*model.manifest.files, "artifact.json"):
        assert model_file(workshop, made.models[""], name).samefile(model.path / name)
    rows = files_of(workshop, prepared.run_id)["outputs/train/rows.jsonl"]
    assert rows.samefile(data.rows_file)
    assert rows.stat().st_nlink == 2


def test_recording_again_gives_the_same_run_and_links_what_was_made_again(workshop: Workshop) -> None:
    execution = workshop.begin()
    model = workshop.model()
    first = execution.record(workshop.step("base", model))
    linked = model_file(workshop, first.models[""], "model.safetensors")
    weights = model.path / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"flipped" + weights.read_bytes()[7:])
    assert linked.read_bytes().startswith(b"flipped"), "a link shows the damage"
    assert workshop.home.store.fault(model.digest) == "model.safetensors was changed"

    again = workshop.model()
    second = execution.record(workshop.step("base", again))
    assert second == first
    assert linked.samefile(weights)
    assert not linked.read_bytes().startswith(b"flipped")
    assert len(list(workshop.recorder.tracking.runs("tags.`posttrain.role` = 'step'"))) == 1


def test_a_record_that_fails_leaves_nothing_and_the_next_one_is_whole(workshop: Workshop) -> None:
    execution = workshop.begin()
    model = workshop.model()
    weights = model.path / "model.safetensors"
    away = weights.rename(workshop.home.root / "away")
    with pytest.raises(FileNotFoundError):
        execution.record(workshop.step("base", model))
    assert workshop.recorder.find(model.manifest.key) is None
    assert list(workshop.recorder.tracking.runs("tags.`posttrain.role` = 'step'")) == []
    assert list(workshop.home.mlruns.rglob("config.json")) == [], "links of the dropped model are gone"
    away.rename(weights)
    entry = execution.record(workshop.step("base", model))
    assert workshop.recorder.find(model.manifest.key) == entry


def test_the_index_answers_without_mlflow_and_is_rebuilt_from_it(workshop: Workshop) -> None:
    execution = workshop.begin()
    model = workshop.model()
    entry = execution.record(workshop.step("base", model))
    workshop.home.database.rename(workshop.home.root / "hidden")
    assert Recorder(workshop.home).find(model.manifest.key) == entry
    assert Recorder(workshop.home).find("0" * 64) is None
    (workshop.home.root / "hidden").rename(workshop.home.database)

    shutil.rmtree(workshop.home.index)
    assert Recorder(workshop.home).find(model.manifest.key) == entry
    (workshop.home.index / "keys" / f"{model.manifest.key}.json").write_text('{"half')
    assert Index(workshop.home.index).get(model.manifest.key) is None
    assert workshop.recorder.rebuild_index() == 1
    assert Index(workshop.home.index).get(model.manifest.key) == entry


def test_a_kill_between_mlflow_and_the_index_is_seen(workshop: Workshop) -> None:
    entry = workshop.begin().record(workshop.step("base", workshop.model()))
    (workshop.home.index / "keys" / f"{entry.key}.json").unlink()
    assert Recorder(workshop.home).find(entry.key) is None, "nothing was pending: the index is trusted"
    workshop.recorder.index.begin(entry.key)
    assert Recorder(workshop.home).find(entry.key) == entry


def test_a_lost_artifact_comes_back_from_mlflow(workshop: Workshop) -> None:
    execution = workshop.begin()
    model, data = workshop.model(), workshop.dataset()
    entries = {made.digest: execution.record(workshop.step("s", made)) for made in (model, data)}
    shutil.rmtree(workshop.home.store.root)
    for digest, entry in entries.items():
        assert Recorder(workshop.home).fetch(digest, entry).digest == digest
        assert workshop.home.store.fault(digest) is None
    assert [path.name for path in workshop.home.store.root.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(RegistryError, match="did not make artifact 000000000000"):
        workshop.recorder.fetch("0" * 64, entries[model.digest])


def test_damage_in_mlflow_is_refused(workshop: Workshop) -> None:
    model = workshop.model()
    entry = workshop.begin().record(workshop.step("base", model))
    weights = model_file(workshop, entry.models[""], "model.safetensors")
    weights.chmod(0o644)
    weights.write_bytes(b"x" * weights.stat().st_size)
    shutil.rmtree(workshop.home.store.root)
    with pytest.raises(RegistryError, match=r"`model.safetensors` of artifact \w+ is damaged in MLflow's store"):
        workshop.recorder.fetch(model.digest, entry)
    assert not workshop.home.store.has(model.digest)


def test_a_model_outside_the_home_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    client = workshop.recorder.tracking.client
    experiment = client.create_experiment("foreign", artifact_location=(tmp_path / "elsewhere").as_uri())
    model = client.create_logged_model(experiment, "m", tags={"posttrain.digest": "a" * 64})
    with pytest.raises(RegistryError, match="lies outside"):
        workshop.recorder.tracking.of_model(model.model_id, "a" * 64)
    with pytest.raises(RegistryError, match="is not artifact bbbbbbbbbbbb"):
        workshop.recorder.tracking.of_model(model.model_id, "b" * 64)
    with pytest.raises(RegistryError, match="is no MLflow model id"):
        workshop.recorder.tracking.of_model("../../etc", "b" * 64)


def test_a_dead_execution_is_marked_killed(workshop: Workshop) -> None:
    client = workshop.recorder.tracking.client
    dead, alive = workshop.begin(), workshop.begin()
    host, pid, start = client.get_run(dead.run_id).data.tags["posttrain.process"].split("/")
    client.set_tag(dead.run_id, "posttrain.process", f"{host}/{pid}/{float(start) - 5:.2f}")
    workshop.begin("other")
    assert client.get_run(dead.run_id).info.status == "KILLED"
    assert client.get_run(alive.run_id).info.status == "RUNNING"


def test_what_a_step_notes_is_kept_with_its_result(workshop: Workshop) -> None:
    note = "3 of 150 rows were left out: 3 near duplicates"
    entry = workshop.begin().record(workshop.step("data", workshop.dataset(), notes=(note,)))
    shutil.rmtree(workshop.home.index)
    found = Recorder(workshop.home).find(entry.key)
    assert found and found.notes == (note,)
    tags = workshop.recorder.tracking.client.get_run(entry.run_id).data.tags
    assert tags["mlflow.note.content"] == f"{note}.\n\n"


def test_a_cached_step_leads_to_the_run_that_made_it(workshop: Workshop) -> None:
    entry = workshop.begin().record(workshop.step("gguf[Q4_K_M]", workshop.gguf(workshop.model(), "Q4_K_M")))
    execution = workshop.begin()
    execution.note_cached("gguf[Q4_K_M]", entry)
    execution.log_table("comparison", [{"candidate": "merged", "kl": 0.1}, {"candidate": "gguf"}])
    execution.log_metrics({"steps.cached": 1})
    execution.log_file(b"<html>", "report.html")
    execution.finish("FAILED")
    run = workshop.recorder.tracking.client.get_run(execution.run_id)
    assert run.data.tags["posttrain.cached.gguf:Q4_K_M"] == entry.run_id
    assert f"| gguf[Q4_K_M] | cached | `{entry.run_id}` |" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics == {"steps.cached": 1}
    assert run.info.status == "FAILED"
    table = json.loads(files_of(workshop, execution.run_id)["tables/comparison.json"].read_text())
    assert table == {"columns": ["candidate", "kl"], "data": [["merged", 0.1], ["gguf", None]]}


def test_names_and_params_take_mlflows_form(tmp_path: Path) -> None:
    assert mlflow_name("a[b,c]/x//y") == "a:b_c/x/y"
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": True})) == {"a.b": "1", "a.c": "{}", "d": "true"}
    assert read_points(tmp_path / "none") == []


def test_bad_tracking_uris_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="name a server"):
        Recorder(Home.at(tmp_path, "file:///tmp/mlruns")).warm_up()
    with pytest.raises(RegistryError, match="does not answer"):
        Recorder(Home.at(tmp_path, "http://127.0.0.1:9")).find("0" * 64)


def test_steps_are_recorded_side_by_side(workshop: Workshop) -> None:
    execution = workshop.begin()
    model = workshop.model()
    made = [workshop.gguf(model, f"Q{bits}_K") for bits in range(2, 8)]
    records = [workshop.step(each.gguf_file.stem, each) for each in made for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(execution.record, records))
    assert len({entry.run_id for entry in entries}) == len(made), "the same step recorded twice at once is one run"
    runs = list(workshop.recorder.tracking.runs("tags.`posttrain.role` = 'step'"))
    assert [run.info.status for run in runs] == ["FINISHED"] * len(made)


def test_a_metric_that_is_no_number_is_kept_and_the_step_found_again(workshop: Workshop) -> None:
    report = workshop.report({"tuned/perplexity": float("nan"), "tuned/loss": float("inf"), "tuned/accuracy": 0.5})
    execution = workshop.begin()
    entry = execution.record(workshop.step("quality", report))
    execution.finish()

    found = Index(workshop.home.index).get(entry.key)
    assert found is not None
    assert math.isnan(found.metrics["tuned/perplexity"])
    assert (found.metrics["tuned/loss"], found.metrics["tuned/accuracy"]) == (math.inf, 0.5)
    logged = workshop.recorder.tracking.client.get_run(entry.run_id).data.metrics
    assert math.isnan(logged["tuned/perplexity"])
