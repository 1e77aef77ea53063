"""The commands of `posttrain`."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="posttrain",
    help="From an open-weights language model to an evaluated, quantized, versioned artifact that people pull by name.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or a name in recipes/.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a key, e.g. steps.sft.epochs=2. Repeatable."),
]
ProfileOption = Annotated[
    str, typer.Option("--profile", metavar="NAME", help="One of the recipe's profiles: the same in another size.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def main() -> None:
    """Run the command line; bad input ends in one sentence and exit code 2."""
    sys.exit(call(app))


def call(command: Any) -> int:
    """Call a typer application and translate its errors into an exit code."""
    from registry.errors import RegistryError
    from steps.frame.errors import UserError

    try:
        command()
    except (UserError, RegistryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or ' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SystemExit as end:
        # By which Typer tells of a KeyboardInterrupt.
        if end.code == 130:
            print("stopped; run the same command again to go on", file=sys.stderr)
        return end.code if isinstance(end.code, int) else 1
    return 0


@app.command()
def plan(
    recipe: RecipeArgument, profile: ProfileOption = "", set_: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show what a run would do: per step cached, run, resume or blocked, with predicted time, memory and disk."""
    from flows.cli.tables import describe, plan_table
    from flows.prepare import plan_recipe

    made = plan_recipe(recipe, set_ or [], thorough=False, profile=profile)
    if as_json:
        print_json({"recipe": made.graph.loaded.name, "steps": describe(made)})
    else:
        console().print(plan_table(made))
    if made.blocked:
        raise typer.Exit(2)


@app.command()
def run(
    recipe: RecipeArgument,
    profile: ProfileOption = "",
    set_: SetOption = None,
    publish: Annotated[bool, typer.Option(help="Register the family that the recipe publishes.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: only what is not done yet; a second run costs nothing, a killed one goes on."""
    from flows.cli.running import run_recipe

    ending = run_recipe(recipe, set_ or [], profile=profile, publish=publish, console=console(stderr=as_json))
    if as_json:
        print_json(ending.summary())
    raise typer.Exit(ending.exit_code)


@app.command("ls")
def list_families(as_json: JsonOption = False) -> None:
    """List the families in the registry, with their champion and their formats."""
    from flows.cli.tables import families_table
    from registry.family import list_families as families
    from registry.home import Home

    found = families(Home.from_environment())
    if as_json:
        print_json(found)
    else:
        console().print(families_table(found))


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="FAMILY", help="Name of a family.")], as_json: JsonOption = False
) -> None:
    """Show a family: its releases, members, aliases, gate decisions."""
    from flows.cli.tables import family_table
    from registry.family import load
    from registry.home import Home

    found = load(Home.from_environment(), name)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        console().print(family_table(found))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="FAMILY[@ALIAS]", help="A family; @champion where nothing is said.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Directory to place it in.")],
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="gguf:Q4_K_M, gptq-int4, hf or adapter.")
    ] = "hf",
    as_json: JsonOption = False,
) -> None:
    """Fetch a member of a family, verify every byte and place it in one move; goes on where it was interrupted."""
    from registry.home import Home
    from registry.pull import pull as pull_member

    result = pull_member(Home.from_environment(), name, format_, to)
    if as_json:
        print_json(result.as_plain())
    else:
        from flows.units import size

        done = "was there already" if result.already_there else "pulled and verified"
        console().print(f"{result.member} (version {result.version}, {size(result.size)}) {done}:", highlight=False)
        for file in result.files:
            console().print(f"  {result.path / file}", highlight=False, soft_wrap=True)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="FAMILY", help="Name of a family.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the release that is taken back.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make the previous champion the champion again."""
    from registry.family import rollback as roll_back
    from registry.home import Home
    from registry.record import Recorder

    release = roll_back(Recorder(Home.from_environment(writes=True)), name, reason)
    if as_json:
        print_json(release.model_dump(mode="json"))
    else:
        console().print(f"{name}: version {release.version} is champion again.", highlight=False)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="FAMILY", help="Name of a family.")],
    reference: Annotated[str, typer.Argument(metavar="VERSION", help="A version, an alias or a release's id.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept with the decision.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a release champion by hand, whatever its gates said, also one that was rolled back."""
    from registry.family import promote as promote_release
    from registry.home import Home
    from registry.record import Recorder

    release = promote_release(Recorder(Home.from_environment()), name, reference, reason)
    if as_json:
        print_json(release.model_dump(mode="json"))
    else:
        console().print(f"{name}: version {release.version} is champion.", highlight=False)


@app.command()
def steps(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="A step kind, e.g. train.sft.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the step kinds, or the keys of one."""
    from flows.cli.tables import describe_kind, kind_table, kinds_table
    from steps.frame import all_kinds, load_kind

    kinds = [load_kind(kind)] if kind else all_kinds()
    if as_json:
        print_json([describe_kind(each) for each in kinds])
    else:
        console().print(kind_table(kinds[0]) if kind else kinds_table(kinds))


@app.command()
def doctor(
    runtimes: Annotated[
        list[str] | None, typer.Argument(metavar="[RUNTIME]...", help="llama.cpp, torch, ...; all where none is named.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove every native library by a real call in a child process, and say what to do about those that are broken.

    Exit code 1 where one is broken, or one that posttrain needs is not installed. `plan` and `run` read the verdicts:
    a step whose runtime is broken is blocked.
    """
    from flows.cli.doctor import doctor_table, examine, is_missing

    found = examine(runtimes or [])
    if as_json:
        print_json(found)
    else:
        console().print(doctor_table(found))
    wrong = [each for each in found["runtimes"] if each["status"] == "broken" or is_missing(each)]
    raise typer.Exit(1 if wrong else 0)


@app.command()
def schema(
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Write it there instead of printing.")] = None,
) -> None:
    """Write the JSON Schema of recipes, by which an editor completes and checks them."""
    from flows.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if to is None:
        print(text, end="")
    else:
        to.write_text(text, encoding="utf-8")


@app.command()
def up(as_json: JsonOption = False) -> None:
    """Start Prefect, MLflow and a worker on this machine, with the deployments of infra/prefect.yaml."""
    from flows.team.up import up as start
    from registry.home import Home

    out = console(stderr=as_json)
    team = start(Home.from_environment(writes=True), lambda line: out.print(line, highlight=False, soft_wrap=True))
    if as_json:
        print_json(team.model_dump(mode="json"))


@app.command()
def down(as_json: JsonOption = False) -> None:
    """Stop them, with every run that the worker has begun; what had finished is kept."""
    from flows.team.down import down as stop
    from registry.home import Home

    stopped = stop(Home.from_environment(writes=True))
    if as_json:
        print_json(asdict(stopped))
        return
    print("Nothing is up now." + (f" Cut off: {', '.join(stopped.cut_off)}." if stopped.cut_off else ""))
    if stopped.without_server:
        print(f"Begun by others on its Prefect server, and ending now: {', '.join(stopped.without_server)}.")


@app.command()
def join() -> None:
    """Take part, on another node than the flow's, in the steps that ask for several; NODE_RANK says which node this is.

    Every node sees the same home (POSTTRAIN_HOME) and names the flow's node in MASTER_ADDR. Ends by Ctrl-C.
    """
    from registry.home import Home
    from steps.frame.scale import join as take_part

    take_part(Home.from_environment().root / "work")


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Show what is up, what is scheduled and how the last runs ended; exit code 1 where something is not up."""
    from flows.cli.tables import status_tables
    from flows.team.status import status as read_status
    from registry.home import Home

    found = read_status(Home.from_environment())
    if as_json:
        print_json(found)
    elif found["services"]:
        console().print(*status_tables(found), sep="\n")
    else:
        print("Nothing is up; `posttrain up` starts it.")
    raise typer.Exit(0 if found["up"] else 1)


def print_json(value: Any) -> None:
    """Print indented JSON on standard output."""
    print(json.dumps(value, indent=2, default=str))


def console(*, stderr: bool = False) -> "Console":
    """Return the console for people; scripts that asked for JSON get it on standard error.

    What it shows comes from recipes, models and paths: brackets and colons in it are no markup.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
    return Console(stderr=stderr, width=width, markup=False, emoji=False)
