"""Step keys: one sha256 over everything that shapes a step's result, known before anything runs."""

import hashlib
from collections.abc import Mapping, Sequence

from steps.artifacts.manifest import canonical_json
from steps.frame.code import code_digest
from steps.frame.config import StepConfig
from steps.frame.kinds import StepKind


def plain_config(kind: StepKind, config: StepConfig) -> dict[str, object]:
    """Return a config as JSON values, without its edges (they enter the key as the parents' keys)."""
    return config.model_dump(mode="json", exclude=set(kind.edges))


def step_key(
    kind: StepKind,
    config: StepConfig,
    parents: Mapping[str, Sequence[str]],
    sources: Mapping[str, str],
    processes: int = 1,
    code: str | None = None,
) -> str:
    """Compute a step's key.

    Args:
        kind: the step kind; its name, the digest of its code and library versions enter the key.
        config: validated config; defaults count, so an explicit default gives the same key.
        parents: for each input field the `<key of the producing step>:<output>` of its parents, in order.
        sources: fingerprint of each external source by URI.
        processes: how many share the work; of a training each adds a batch of its own to every optimizer step.
        code: digest of the kind's code, where it is known already.
    """
    content = {
        "kind": kind.name,
        "code": code or code_digest(kind.run.__module__),
        "config": plain_config(kind, config),
        "parents": {field: list(keys) for field, keys in parents.items()},
        "sources": dict(sources),
        "libraries": kind.library_versions(config),
        **({"processes": processes} if processes > 1 and config.processes_shape_result else {}),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()
