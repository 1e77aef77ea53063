"""`python-stdlib-docs`: questions and answers from the documentation that the running interpreter carries.

Real prose, thousands of rows, no download. The sources of the standard library are parsed, never imported (a module
may do anything when it is imported); only the built-in types and some C modules, which have no source to parse, are
looked at alive. Every answer has the same form, so that a model tuned on it is told apart at a glance:

    **`os.path.join(a, *p)`**

    Join two or more pathname components, inserting '/' as needed. ...

    *Module `os.path`, function.*
"""

import ast
import hashlib
import importlib
import inspect
import platform
import re
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steps.sources.rows import SourceRow

NAME = "python-stdlib-docs"
_VERSION = 1

_PHRASINGS = (
    "What does `{name}` do?",
    "Explain `{name}`.",
    "What is `{name}` for?",
    "How is `{name}` called?",
    "Describe the {sort} `{name}`.",
    "Give me the signature and purpose of `{name}`.",
    "In Python, what is `{name}`?",
    "When would I use `{name}`?",
)

# Modules that are not the library a user calls: tests, applications, platforms' twins, tables, and jokes.
_SKIPPED = {
    "antigravity", "distutils", "ensurepip", "idlelib", "lib2to3", "ntpath", "nturl2path", "pydoc_data",
    "site-packages", "test", "tests", "this", "tkinter", "turtledemo",
}  # fmt: skip
_C_MODULES = (
    "array",
    "binascii",
    "cmath",
    "errno",
    "gc",
    "itertools",
    "math",
    "select",
    "sys",
    "time",
    "unicodedata",
    "zlib",
)
# Where a module's public name is not that of its file.
_PUBLIC_NAMES = {"posixpath": "os.path"}
_LONGEST_ANSWER = 60
_LONGEST_SIGNATURE = 100


@dataclass(frozen=True)
class Entry:
    """One documented thing."""

    name: str
    """Dotted name without the module, e.g. `Path.glob`."""
    module: str
    sort: str
    """`function`, `class`, `method` or `property`."""
    signature: str
    """Parameters in parentheses, without annotations; may be empty."""
    text: str
    """First paragraph of its documentation."""

    @property
    def full_name(self) -> str:
        """Name as a user writes it; built-ins need no module."""
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"


def fingerprint() -> str:
    """Return what identifies the rows: the interpreter's full version and this file's own."""
    return f"{NAME}:{platform.python_version()}:v{_VERSION}"


def read_rows() -> Iterator[SourceRow]:
    """Yield one question with its answer for every documented function, class and method, in a fixed order."""
    seen: set[str] = set()
    for entry in (*_from_sources(), *_from_c_modules()):
        if entry.full_name not in seen:
            seen.add(entry.full_name)
            messages = [
                {"role": "user", "content": question(entry)},
                {"role": "assistant", "content": answer(entry)},
            ]
            yield SourceRow({"messages": messages}, f"{NAME}: {entry.full_name}")


def question(entry: Entry) -> str:
    """Ask about an entry, in the phrasing that its name's hash chooses."""
    number = int.from_bytes(hashlib.sha256(entry.full_name.encode()).digest()[:4], "big")
    return _PHRASINGS[number % len(_PHRASINGS)].format(name=entry.full_name, sort=entry.sort)


def answer(entry: Entry) -> str:
    """Answer in the house style: bold signature, one paragraph, the place in italics."""
    return f"**`{entry.full_name}{entry.signature}`**\n\n{entry.text}\n\n*Module `{entry.module}`, {entry.sort}.*"


def _from_sources() -> Iterator[Entry]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = list(path.relative_to(library).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if any(part in _SKIPPED or part.startswith("_") or not part.isidentifier() for part in parts):
            continue
        module = ".".join(parts)
        tree = ast.parse(path.read_bytes())
        yield from _from_body(tree.body, _PUBLIC_NAMES.get(module, module), "")


def _from_body(body: list[ast.stmt], module: str, owner: str) -> Iterator[Entry]:
    """Yield the public definitions of a module or of a class, also those under `if` and `try`."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _from_body([*node.body, *node.orelse], module, owner)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{owner}{node.name}"
        if isinstance(node, ast.ClassDef):
            sort, signature = "class", _class_signature(node)
        else:
            sort = _sort(node, method=bool(owner))
            signature = "" if sort == "property" else _signature(node, method=bool(owner))
        if text := first_paragraph(ast.get_docstring(node)):
            yield Entry(name, module, sort, signature, text)
        if isinstance(node, ast.ClassDef):
            yield from _from_body(node.body, module, f"{name}.")


def _class_signature(node: ast.ClassDef) -> str:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _signature(member, method=True)
    return ""


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> str:
    """Return the parameters as written, without annotations and without `self`."""
    given = node.args
    for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg):
        if argument is not None:
            argument.annotation = None
    if method and "staticmethod" not in _decorators(node):
        first = given.posonlyargs or given.args
        del first[:1]
    return _shortened(f"({ast.unparse(given)})")


def _sort(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> str:
    if not method:
        return "function"
    return "property" if _decorators(node) & {"property", "cached_property", "setter"} else "method"


def _decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}


def _shortened(signature: str) -> str:
    """Put a parameter list on one line and cut it after the last parameter that fits."""
    signature = " ".join(signature.split())
    if len(signature) <= _LONGEST_SIGNATURE:
        return signature
    return signature[: _LONGEST_SIGNATURE - 5].rpartition(",")[0] + ", ...)"


def first_paragraph(docstring: str | None) -> str:
    """Return the first paragraph of prose, on one line, of at most 60 words; empty where there is none.

    Old C docstrings begin with the call itself (`max(iterable) -> value`); that line is not prose.
    """
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring or "")):
        text = " ".join(paragraph.split())
        if re.match(r"[\w.]+\(.*?\)( -+> ?[\w .\[\],]+?)?( --? |$)", text) or text.startswith((">>>", "..", "-", "$")):
            continue
        words = text.split(" ")
        if len(words) < 3:
            continue
        return text if len(words) <= _LONGEST_ANSWER else " ".join(words[:_LONGEST_ANSWER]) + " ..."
    return ""


def _from_c_modules() -> Iterator[Entry]:
    """Yield the documented functions, types and methods of what is written in C."""
    for module in ("builtins", *_C_MODULES):
        try:
            members = vars(importlib.import_module(module))
        except ImportError:  # not every build of the interpreter has every one
            continue
        for name, member in sorted(members.items()):
            alias = getattr(member, "__name__", name) != name or getattr(member, "__module__", module) != module
            if name.startswith("_") or alias:
                continue
            if isinstance(member, type):
                yield from _from_type(member, name, module)
            elif isinstance(member, types.BuiltinFunctionType) and (text := first_paragraph(member.__doc__)):
                yield Entry(name, module, "function", _text_signature(member), text)


def _from_type(owner: type, name: str, module: str) -> Iterator[Entry]:
    if text := first_paragraph(owner.__doc__):
        yield Entry(name, module, "class", _text_signature(owner), text)
    for key, member in sorted(vars(owner).items()):
        callable_ = isinstance(member, types.MethodDescriptorType | types.ClassMethodDescriptorType)
        if not key.startswith("_") and callable_ and (text := first_paragraph(member.__doc__)):
            yield Entry(f"{name}.{key}", module, "method", _text_signature(member), text)


def _text_signature(member: object) -> str:
    """Return the signature that a C function states, as its own or in its first line; empty where it states none."""
    stated = getattr(member, "__text_signature__", None)
    if stated is None:
        first_line = re.match(r"[\w.]+(\(.*?\))(?= |$)", member.__doc__ or "", re.MULTILINE)
        stated = first_line.group(1) if first_line else ""
    return _shortened(re.sub(r"\(\$\w+(, /)?(, )?", "(", stated))
