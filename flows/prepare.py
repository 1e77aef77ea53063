"""From a recipe's name to a plan and an execution."""

from collections.abc import Sequence
from pathlib import Path

from flows.execution import Execution, OnProgress, clean
from flows.graph import build_graph
from flows.layers import NotSet
from flows.opponent import with_opponent
from flows.plan import Plan, make_plan
from flows.recipe import load_recipe
from flows.runtimes import Say, gpu_fault, prove_unproven
from registry.home import Home, silence_telemetry
from steps.frame import UserError
from steps.frame.errors import did_you_mean
from steps.frame.hardware import elsewhere
from steps.frame.scale import cores
from steps.runtime.gpus import gpus

RECIPES = Path("recipes")


def recipe_path(recipe: str) -> Path:
    """Return the file of a recipe that is given by path, or by its name in `recipes/`.

    Raises:
        UserError: there is no such recipe.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{path}: no such file{did_you_mean(path.stem, recipe_names())}")
        return path
    if recipe not in recipe_names():
        raise UserError(f"{RECIPES / recipe}.yaml: no such recipe{did_you_mean(recipe, recipe_names())}")
    return RECIPES / f"{recipe}.yaml"


def recipe_names() -> list[str]:
    """Return the names of the recipes in `recipes/`."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def plan_recipe(
    recipe: str,
    overrides: Sequence[str],
    *,
    thorough: bool,
    profile: str = "",
    home: Home | None = None,
    say: Say = lambda _: None,
) -> Plan:
    """Load, check and plan a recipe; relative paths in it refer to the working directory.

    Its other profiles, and the recipe without one, are checked, too: a misspelt key should not wait for the day on
    which they are wanted.

    Raises:
        UserError: anything wrong with it, in one sentence.
    """
    silence_telemetry()
    home = home or Home.from_environment()
    root = _working_directory()
    path = recipe_path(recipe)
    loaded = load_recipe(path, overrides, profile)
    graph = build_graph(loaded)
    for other in sorted({"", *loaded.profiles} - {profile}):
        _check_other(path, other)
    return make_plan(with_opponent(graph, home, root), home, root, thorough=thorough, say=say)


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UserError("the working directory is gone; change to one that exists") from None


def _check_other(path: Path, profile: str) -> None:
    try:
        with elsewhere():
            build_graph(load_recipe(path, (), profile))
    except NotSet:
        # What is set for the chosen profile alone need not be there for the others.
        return
    except UserError as error:
        said = f"profile `{profile}`" if profile else "without a profile"
        raise UserError(f"{said}: {error}") from None


def prepare(
    recipe: str,
    overrides: Sequence[str],
    *,
    profile: str = "",
    home: Home | None = None,
    on_progress: OnProgress | None = None,
    say: Say = lambda _: None,
) -> Execution:
    """Plan a recipe for a run: every byte of what is cached has been checked.

    Raises:
        UserError: the recipe is wrong, or a step cannot run here.
    """
    home = home or Home.from_environment()
    clean(home)
    recipe_path(recipe)
    # Which precision is fast here enters the keys.
    prove_unproven(["torch", *(["CUDA"] if gpus() else [])], say)
    if why := gpu_fault():
        say(f"steps are {why}")
    plan = plan_recipe(recipe, overrides, thorough=True, profile=profile, home=home, say=say)
    if plan.blocked:
        step = plan.blocked[0]
        raise UserError(f"step `{step.name}` cannot run: {step.reason}")
    return Execution(plan, home, cores(), on_progress)
