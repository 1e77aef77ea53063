"""The team on one machine, really: servers and a worker on loopback, nights that train, and an end without leftovers.

The tests tell one story in the order in which they stand: each needs what those before it left.
"""

import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest

from flows.team.deployments import nightly_schedules
from flows.team.processes import MARK, members
from registry.home import Home
from steps.artifacts import write_atomic

ROOT = Path(__file__).parents[2]
ZONE = "Asia/Kathmandu"
"""Far from the machine's time, and off by three quarters of an hour: a cron line read in another zone misses it."""

RECIPE = """
name: night
base: {{uses: model.pico, hidden: 64, layers: 1, heads: 2, kv_heads: 1, pretrain_steps: 2}}
seed: 5
schedule: {{cron: "{cron}", timezone: {zone}}}
steps:
  data: {{uses: data.prepare, source: rows.jsonl, near_dedup: null, eval_fraction: 0.2}}
  sft: {{uses: train.sft, model: base, data: data.train, adapter: {{kind: full}}, max_steps: 24, batch_size: 8,
        learning_rate: 5.0e-3}}
  quality: {{uses: evaluate.compare, reference: sft, candidates: [base], data: data.eval, rows: 16, generate_rows: 2,
            new_tokens: 4}}
publish:
  family: night
  members: [sft]
  gates: [{{metric: quality.perplexity, against: champion, no_worse_by: 2.0}}]
"""


@dataclass
class Site:
    """A directory with recipes, a home, and the team that is up there."""

    folder: Path
    home: Home
    python: Path = Path(sys.executable)
    fires: datetime = datetime(2099, 12, 31, tzinfo=UTC)
    """When the recipe's cron line comes due."""

    def write_recipe(self) -> None:
        local = self.fires.astimezone(ZoneInfo(ZONE))
        cron = f"{local.minute} {local.hour} {local.day} {local.month} *"
        (self.folder / "recipes").mkdir(exist_ok=True)
        write_atomic(self.folder / "recipes" / "night.yaml", RECIPE.format(cron=cron, zone=ZONE).encode())

    def write_rows(self, count: int) -> None:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"How many minutes are {hours} hours?"},
                    {"role": "assistant", "content": f"{hours} hours are {60 * hours} minutes."},
                ]
            }
            for hours in range(2, 2 + count)
        ]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def posttrain(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", MARK, "no_proxy", "NO_PROXY")
        }
        # As where everything goes through a proxy: it does not reach this machine's own servers.
        environment |= dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
        return subprocess.run(
            [str(self.python), "-c", "from flows.cli import main; main()", *arguments],
            cwd=self.folder,
            env={**environment, "POSTTRAIN_HOME": str(self.home.root)},
            capture_output=True,
            text=True,
            timeout=180,
        )

    def run_data_only(self, eval_fraction: str) -> None:
        """Run the first two steps by `posttrain run`."""
        changes = ("steps.sft=null", "steps.quality=null", "publish=null", f"steps.data.eval_fraction={eval_fraction}")
        ended = self.posttrain("run", "night", *(word for change in changes for word in ("--set", change)))
        assert ended.returncode == 0, ended.stderr

    def status(self) -> dict[str, Any]:
        return json.loads(self.posttrain("status", "--json").stdout)

    def prefect(self, path: str, body: Any = None) -> Any:
        return ask(f"{self.status_url('prefect')}/api{path}", body)

    def status_url(self, service: str) -> str:
        return json.loads((self.home.root / "team" / "state.json").read_text())["services"][service]["url"]

    def submit(self, deployment: str, **parameters: Any) -> str:
        """Start a run as the form does; return its id."""
        found = self.prefect(f"/deployments/name/{deployment}/{deployment}")
        return self.prefect(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]

    def wait(self, run: str, timeout: float = 150) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.prefect(f"/flow_runs/{run}")
            if found["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                return found
            time.sleep(0.3)
        pytest.fail(f"run {run} did not end: {self.log()}")

    def night(self, *overrides: str) -> dict[str, Any]:
        return self.wait(self.submit("nightly", recipe="night", overrides=list(overrides)))

    def tasks(self, run: str) -> dict[str, str]:
        found = self.prefect("/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {each["name"]: each["state_name"] for each in found}

    def artifacts(self, run: str) -> dict[str, Any]:
        found = self.prefect("/artifacts/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {each["key"]: each["data"] for each in found}

    def aliases(self) -> dict[str, int]:
        """Ask the MLflow server, which people look at, for the family's aliases."""
        url = f"{self.status_url('mlflow')}/api/2.0/mlflow/registered-models/get?name=night"
        return {each["alias"]: int(each["version"]) for each in ask(url)["registered_model"]["aliases"]}

    def log(self) -> str:
        return (self.home.root / "team" / "worker.log").read_text()[-2000:]


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for patience in range(10):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            # Prefect says "busy" when two writers meet in SQLite; its own clients ask again, too.
            if error.code != 503 or patience == 9:
                raise
            time.sleep(0.5)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    # A checkout may lie anywhere, its environment with it.
    folder = tmp_path_factory.mktemp("my site")
    (folder / ".venv").symlink_to(sys.prefix)
    python = folder / ".venv" / "bin" / Path(sys.executable).name
    site = Site(folder, Home.at(tmp_path_factory.mktemp("my home")), python)
    site.write_recipe()
    site.write_rows(100)
    yield site
    site.posttrain("down")
    assert members(site.home) == []


def test_up_starts_everything_once(site: Site) -> None:
    assert site.posttrain("status").returncode == 1
    first = site.posttrain("up")
    assert first.returncode == 0, first.stderr
    shown = site.status()
    assert shown["up"] is True
    assert set(shown["services"]) == {"prefect", "mlflow", "worker"}
    assert {each["name"]: each["pool"] for each in shown["deployments"]} == {
        "lifecycle/lifecycle": "local",
        "nightly/nightly": "local",
    }
    (schedule,) = next(each["schedules"] for each in shown["deployments"] if each["name"] == "nightly/nightly")
    assert (schedule["recipe"], schedule["timezone"], schedule["active"]) == ("night", ZONE, True)

    processes = {process.pid for process in members(site.home)}
    again = site.posttrain("up")
    assert again.returncode == 0
    assert "Already up" in again.stdout
    assert {process.pid for process in members(site.home)} == processes


def test_a_recipe_submitted_through_the_form(site: Site) -> None:
    form = site.prefect("/deployments/name/lifecycle/lifecycle")["parameter_openapi_schema"]["properties"]
    assert form["recipe"]["enum"] == ["night"]
    assert {name: field["type"] for name, field in form.items()} == {
        "recipe": "string",
        "profile": "string",
        "overrides": "array",
        "publish": "boolean",
    }
    with pytest.raises(urllib.error.HTTPError) as refused:
        site.submit("lifecycle", recipe="quickstart")
    assert refused.value.code == 409

    submitted = site.submit("lifecycle", recipe="night")
    # The worker is busy with this run: the schedule that now comes due has to wait for its end.
    set_clock(site)
    run = site.wait(submitted)
    assert run["state"]["type"] == "COMPLETED", (run["state"]["message"], site.log())
    assert run["name"] == "night"
    assert site.tasks(run["id"]) == dict.fromkeys(("base", "data", "sft", "quality"), "Completed")
    shown = site.artifacts(run["id"])
    assert "promoted" in shown["night-outcome"]
    assert [row["step"] for row in json.loads(shown["night-steps"])] == ["base", "data", "sft", "quality"]
    assert shown["night-comparison"].startswith("data:image/png;base64,iVBOR")
    assert f"{site.status_url('mlflow')}/#/experiments/" in shown["night-mlflow-run"]
    assert site.aliases() == {"candidate": 1, "champion": 1}


def test_cron_runs_a_night_in_which_nothing_changed(site: Site) -> None:
    deadline = time.monotonic() + 120
    while not (nights := [run for run in site.status()["runs"] if run["scheduled"]]):
        assert time.monotonic() < deadline, "the schedule did not run"
        time.sleep(1)
    run = site.wait(nights[0]["id"])
    assert datetime.fromisoformat(run["expected_start_time"]) == site.fires
    assert run["state"]["name"] == "Unchanged", run["state"]["message"]
    assert "nothing changed" in run["state"]["message"]
    assert run["total_run_time"] < 10
    assert site.tasks(run["id"]) == {}
    assert "unchanged" in site.artifacts(run["id"])["night-outcome"]


def test_changed_rows_make_a_new_champion(site: Site) -> None:
    site.write_rows(120)
    run = site.night("steps.sft.max_steps=48")
    assert run["state"]["name"] == "Promoted", run["state"]["message"]
    states = site.tasks(run["id"])
    assert states["base"] == "Cached"
    assert {states[name] for name in ("champion", "data", "sft", "quality")} == {"Completed"}
    assert site.aliases() == {"candidate": 2, "champion": 2, "previous": 1}


def test_a_worse_candidate_leaves_the_champion(site: Site) -> None:
    run = site.night("steps.sft.max_steps=1")
    assert run["state"]["name"] == "NotPromoted", run["state"]["message"]
    assert "Not promoted: quality.perplexity of `sft`" in run["state"]["message"]
    assert "**no**" in site.artifacts(run["id"])["night-outcome"]
    assert site.aliases() == {"candidate": 3, "champion": 2, "previous": 1}


def test_a_run_from_the_command_line_uses_the_server_that_is_up(site: Site) -> None:
    site.run_data_only("0.3")
    last = site.status()["runs"][0]
    assert (last["flow"], last["name"], last["state"]) == ("lifecycle", "night", "Completed")
    assert site.tasks(last["id"]) == {"base": "Cached", "data": "Completed"}


def test_down_leaves_no_process_and_says_what_it_cut_off(site: Site) -> None:
    run = site.submit("lifecycle", recipe="night", overrides=["steps.sft.max_steps=100000"])
    deadline = time.monotonic() + 90
    while site.tasks(run).get("sft") != "Running" or not steps_of(site):
        assert time.monotonic() < deadline, site.log()
        time.sleep(0.5)
    before = members(site.home)
    ended = site.posttrain("down")
    assert ended.returncode == 0, ended.stderr
    assert "Cut off: night" in ended.stdout
    assert members(site.home) == []
    assert not any(process.is_running() for process in before)
    assert site.status() | {"home": ""} == {"up": False, "home": "", "services": {}, "deployments": [], "runs": []}
    with sqlite3.connect(site.home.root / "prefect" / "prefect.db") as database:
        states = (
            "SELECT state_name FROM flow_run WHERE id = ? UNION SELECT state_name FROM task_run WHERE flow_run_id = ?"
        )
        found = {name for (name,) in database.execute(states, (run, run))}
    assert "Cancelled" in found
    assert not found & {"Running", "Pending"}


def test_a_run_on_its_own_server_leaves_every_task_recorded(site: Site) -> None:
    site.run_data_only("0.4")
    with sqlite3.connect(site.home.root / "prefect" / "prefect.db") as database:
        (run,) = database.execute("SELECT id FROM flow_run ORDER BY created DESC LIMIT 1").fetchone()
        found = database.execute("SELECT name, state_type FROM task_run WHERE flow_run_id = ?", (run,)).fetchall()
    assert dict(found) == {"base": "COMPLETED", "data": "COMPLETED"}


def test_a_start_that_fails_leaves_nothing_running(site: Site, tmp_path: Path) -> None:
    broken = Site(site.folder, Home.at(tmp_path / "home"))
    broken.home.root.mkdir()
    broken.home.database.write_bytes(b"this is no database" * 100)
    ended = broken.posttrain("up")
    assert ended.returncode == 2
    assert "MLflow ended while it started; see" in ended.stderr
    assert members(broken.home) == []
    assert broken.posttrain("status").returncode == 1


def test_a_schedule_that_is_none_is_refused_before_anything_starts(site: Site, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    recipe = RECIPE.format(cron="every night", zone=ZONE)
    (tmp_path / "recipes" / "night.yaml").write_text(recipe)
    ended = Site(tmp_path, Home.at(tmp_path / "home")).posttrain("up")
    assert ended.returncode == 2
    assert "recipes/night.yaml:5: schedule.cron: " in ended.stderr
    assert not (tmp_path / "home" / "team").exists()


def test_the_shipped_nightly_recipe_is_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    schedule = nightly_schedules()["pico-nightly"]
    assert (schedule.cron, schedule.timezone) == ("0 2 * * *", "Europe/Berlin")


def set_clock(site: Site) -> None:
    """Put the recipe on a cron line that comes due within the next minute and a half."""
    site.fires = (datetime.now(UTC) + timedelta(seconds=80)).replace(second=0, microsecond=0)
    site.write_recipe()
    renewed = site.posttrain("up")
    assert renewed.returncode == 0, renewed.stderr


def steps_of(site: Site) -> list[psutil.Process]:
    return [process for process in members(site.home) if "steps.frame.forkserver" in " ".join(process.cmdline())]
