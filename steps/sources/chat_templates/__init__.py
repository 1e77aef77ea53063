"""`template://NAME`: chat templates that a model without one can be given, one file `NAME.jinja` each.

The first line of a file is a comment that names the control tokens, `{# tokens: <|im_start|> <|im_end|> #}`; it is no
part of the template. What begins every text (`bos_token`) is left to the model's tokenizer.
"""

import hashlib
from pathlib import Path

from steps.frame.errors import UserError

PREFIX = "template://"
_FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.jinja")))


def fingerprint(uri: str, root: Path) -> str:
    """Return the name with the digest of its text; of a template of the model's own, the name alone."""
    name = uri.removeprefix(PREFIX)
    if name not in NAMES:
        return uri
    return f"{uri}@{hashlib.sha256((_FOLDER / f'{name}.jinja').read_bytes()).hexdigest()}"


def check(uri: str, root: Path, cache: Path) -> None:
    """Nothing: a name that is none of these may be one of the model's own."""


def fetch_model(uri: str, cache: Path, root: Path) -> Path:
    """Refuse: a template is no model."""
    raise UserError(f"{uri}: this is a chat template, where a model is needed")


def fetch_data(uri: str, cache: Path, root: Path) -> list[Path]:
    """Refuse: a template is no data."""
    raise UserError(f"{uri}: this is a chat template, where data is needed")


def fetch_template(uri: str, cache: Path, root: Path) -> Path:
    """Return the template's file; there is none for the name of a model's own."""
    return _FOLDER / f"{uri.removeprefix(PREFIX)}.jinja"
