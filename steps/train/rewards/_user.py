"""The reward that is the user's own function."""

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from steps.frame.code import digest_modules, modules_behind
from steps.frame.errors import UserError, did_you_mean
from steps.frame.pinned import pin, pinned_spec
from steps.lm.tasks import Rollout
from steps.train.rewards._reward import reward

_OURS = ("steps", "flows", "registry")
"""Our own code, which enters the key by itself."""


def _has_function(path: str) -> str:
    module, separator, name = path.rpartition(":")
    if not separator or not name.isidentifier():
        raise ValueError(f"user: write `package.module:function` or `file.py:function`, not {path!r}")
    file = _file_of(module)
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ValueError(f"user: {file} line {error.lineno}: {error.msg}") from None
    if any(isinstance(node, ast.AsyncFunctionDef) and node.name == name for node in tree.body):
        raise ValueError(f"user: {file}: `{name}` is an `async def`, which nobody awaits; write `def {name}`")
    if name not in (known := _names_in(tree)):
        raise ValueError(f"user: {file} has no function `{name}`{did_you_mean(name, known)}")
    return path


def _pinned(given: str, info: ValidationInfo) -> str:
    if "path" not in info.data:
        return given
    module = info.data["path"].rpartition(":")[0]
    try:
        found = digest_modules(_modules_behind(module))
    except SyntaxError as error:
        raise ValueError(f"user: {error.filename} line {error.lineno}: {error.msg}") from None
    if given and given != found:
        raise ValueError(f"user: the code of {info.data['path']} is no longer what `sha256` says")
    return found


@reward(prepare=lambda path, sha256: _function(path, sha256))
def user(
    rollouts: Sequence[Rollout],
    *,
    path: Annotated[str, AfterValidator(_has_function)],
    sha256: Annotated[str, AfterValidator(_pinned), Field(validate_default=True)] = "",
) -> Sequence[float]:
    """What your own Python function gives: it takes a list of rollouts and returns one number for each.

    It is imported because the recipe names it, and runs in the trainer's own process. A step asks one function to its
    end: what is edited meanwhile is for the next run.

    Args:
        rollouts: sampled answers.
        path: `package.module:function`, or `file.py:function` relative to the project's directory.
        sha256: of the code of the function's file and of what it imports of your own. Filled in, so that a changed
            function is a new step.

    Raises:
        UserError: the module cannot be imported, has no such function, or is no longer what `sha256` says.
    """
    return _function(path, sha256)(rollouts)


@cache
def _function(path: str, sha256: str) -> Callable[[Sequence[Rollout]], Sequence[float]]:
    """Import the function, once in a process, and pin what it imports later."""
    module_name, _, name = path.rpartition(":")
    try:
        module = _imported(module_name, path, sha256)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward `user`: importing {module_name} raised {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"reward `user`: {module_name} has no function `{name}`")
    return getattr(module, name)


def _imported(name: str, path: str, sha256: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    modules = _modules_behind(name)
    own = name
    to_pin = dict(modules)
    if name.endswith(".py"):
        # A file may be called like any library; its module has a name that no other has.
        own = f"posttrain_user_{sha256[:16]}"
        to_pin[own] = to_pin.pop(Path(name).stem)
    pin(to_pin)
    if digest_modules(modules) != sha256:
        raise UserError(f"reward `user`: the code of {path} was changed between the plan and the step; run again")
    if own in sys.modules or own == name:
        return importlib.import_module(own)
    spec = pinned_spec(own)
    assert spec.loader is not None
    sys.modules[own] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[own]
        raise
    return module


def _modules_behind(module: str) -> dict[str, Path]:
    """Return the function's module and the user's own modules behind it: of its package, or below this directory."""
    file = _file_of(module)
    name = module if not module.endswith(".py") else file.stem
    package, here = name.partition(".")[0], Path.cwd()

    def find(wanted: str) -> Path | None:
        if wanted == name:
            return file
        room = wanted.partition(".")[0]
        if room in _OURS or room in sys.stdlib_module_names:
            return None
        try:
            found = _file_of(wanted)
        except ValueError:
            # A name in a module, or none of Python's files.
            return None
        is_local = found.is_relative_to(here) and "site-packages" not in found.parts
        return found if is_local or room == package else None

    return modules_behind(name, find)


def _file_of(module: str) -> Path:
    """Return the file of a module without importing it or the packages it is in.

    Raises:
        ValueError: there is none.
    """
    if module.endswith(".py"):
        file = Path.cwd() / module
        if not file.is_file():
            raise ValueError(f"user: {file}: no such file")
        return file
    file: Path | None = None
    places = [*sys.path, str(Path.cwd())]
    for depth, _ in enumerate(parts := module.split("."), start=1):
        # By its last name alone: a folder without `__init__.py` would ask for the package that it is in as imported.
        spec = PathFinder.find_spec(parts[depth - 1], places)
        if spec is None:
            raise ValueError(f"user: there is no module `{'.'.join(parts[:depth])}`")
        places = list(spec.submodule_search_locations or ())
        file = Path(spec.origin) if spec.origin else None
    if file is None or file.suffix != ".py":
        raise ValueError(f"user: the module `{module}` is no Python file")
    return file


def _names_in(tree: ast.Module) -> set[str]:
    """Return the names that a module defines or imports at its top."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
