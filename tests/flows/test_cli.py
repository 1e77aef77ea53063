"""The commands: instant, light, one sentence for bad input, JSON for scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flows.prepare import recipe_names
from flows.recipe import load_recipe
from flows.schema import recipe_schema
from tests.flows.command import ROOT, Command

COMMANDS = ("plan", "run", "ls", "show", "pull", "rollback", "promote", "steps", "doctor", "schema")
SERVICE_COMMANDS = ("up", "down", "join", "status")


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "home")


@pytest.mark.parametrize("name", [*COMMANDS, *SERVICE_COMMANDS])
def test_every_command_has_help(command: Command, name: str) -> None:
    ended = command(name, "--help")
    assert ended.code == 0
    assert "Usage:" in ended.out


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "pico"], ["steps"], ["schema"], ["ls"]])
def test_light_commands_import_nothing_heavy(command: Command, arguments: list[str]) -> None:
    code = (
        "import sys; from flows.cli.app import app, call; call(app); "
        "print([m for m in ('torch', 'transformers', 'mlflow', 'prefect') if m in sys.modules], file=sys.stderr)"
    )
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, cwd=ROOT, env=command.environment, capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_plans_and_points_to_the_schema(command: Command, name: str) -> None:
    # Those for real hardware begin with a model on a hub, which tests do without; their pico profile does not.
    small = load_recipe(ROOT / "recipes" / f"{name}.yaml").profiles
    ended = command("plan", name, *(("--profile", "pico") if "pico" in small else ()), "--json")
    assert ended.code == 0, ended.err
    assert all(step["status"] == "run" for step in ended.json["steps"])
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert all(f"# {heading}:" in text for heading in ("Needs", "Run", "Expect"))


def test_the_schema_in_recipes_is_the_one_that_the_command_writes() -> None:
    written = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert written == recipe_schema(), "run `make schema`"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "picoo"], "recipes/picoo.yaml: no such recipe; did you mean `pico`?"),
        (["plan", "none.yaml"], "none.yaml: no such file"),
        (["run", "pico", "--set", "steps.sft.rank=2"], "steps.sft.rank: unknown key"),
        (["show", "nobody"], "no family `nobody`"),
        (["pull", "nobody", "--to", "x"], "no family `nobody`"),
        (["steps", "train.stf"], "did you mean `train.sft`?"),
        (["plan", "pico", "--set", "steps.data.source=missing/*.jsonl"], "missing/*.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(command: Command, arguments: list[str], sentence: str) -> None:
    ended = command(*arguments)
    assert ended.code == 2
    assert sentence in ended.out + ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") <= 1
    assert not (command.home / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "home", "said"),
    [
        (
            ["schema", "--to", "/nonexistent/dir/s.json"],
            "",
            "error: /nonexistent/dir/s.json: No such file",
        ),
        (["plan", "pico"], "/dev/null", "error: /dev/null: this can be no home"),
        (["run", "pico"], "/dev/null/x", "error: /dev/null"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence_and_code_2(
    command: Command, arguments: list[str], home: str, said: str
) -> None:
    if home:
        command.environment["POSTTRAIN_HOME"] = home
    ended = command(*arguments)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert ended.err.startswith(said)


def test_bad_rows_name_file_and_line(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a", "answer": "b"}\n{"question": \n', encoding="utf-8")
    recipe = tmp_path / "rows.yaml"
    recipe.write_text(f"name: rows\nsteps:\n  data: {{uses: data.prepare, source: {file}}}\n", encoding="utf-8")
    ended = command("run", str(recipe))
    assert ended.code == 2, ended.out + ended.err
    assert "rows.jsonl" in ended.out.replace("\n", "")
    assert "line 2" in ended.out.replace("\n", " ")
    assert "Traceback" not in ended.out + ended.err
    assert not list((command.home / "artifacts").glob("*"))


@pytest.mark.parametrize(
    "line", ["plan pico", "run pico", "ls", "show x", "pull x --to x", "rollback x", "up", "down", "status"]
)
def test_a_home_that_is_a_file_is_one_sentence(command: Command, line: str) -> None:
    command.home.touch()
    ended = command(*line.split())
    why = f"{command.home}: this can be no home: it is no directory; POSTTRAIN_HOME names another place"
    assert (ended.code, ended.out, ended.err) == (2, "", f"error: {why}\n")


@pytest.mark.parametrize("line", ["plan pico", f"plan {ROOT}/recipes/pico.yaml", "ls"])
@pytest.mark.parametrize("named", [True, False])
def test_a_working_directory_that_is_gone_is_one_sentence(
    command: Command, line: str, named: bool, tmp_path: Path
) -> None:
    if not named:
        del command.environment["POSTTRAIN_HOME"]
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from flows.cli import main; main()"
    words = [sys.executable, "-c", code, *line.split()]
    ended = subprocess.run(words, cwd=ROOT, env=command.environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == ((0, 0) if named and line == "ls" else (2, 1))


@pytest.mark.parametrize("name", COMMANDS + SERVICE_COMMANDS)
def test_the_readme_says_which_commands_have_json(command: Command, name: str) -> None:
    assert ("--json" in command(name, "--help").out) == (name not in ("join", "schema"))


def test_down_for_scripts(command: Command) -> None:
    assert command("down", "--json").json == {"cut_off": [], "without_server": []}
