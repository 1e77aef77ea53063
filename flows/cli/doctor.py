"""`posttrain doctor`: what this machine is, and which native runtimes work on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import psutil
from rich.console import Group
from rich.text import Text

from flows.plain_table import PlainTable
from flows.units import size
from steps.frame import UserError
from steps.frame.errors import did_you_mean
from steps.frame.hardware import fast_dtype
from steps.frame.scale import cores
from steps.runtime.gpus import gpus_identity
from steps.runtime.processor import this_processor
from steps.runtime.proof import all_proofs
from steps.runtime.verdicts import machine, prove_and_keep

_COLOURS = {"works": "green", "broken": "red", "absent": "dim"}


def examine(runtimes: Sequence[str]) -> dict[str, Any]:
    """Prove the named runtimes, or all, keep the verdicts, and return them with what this machine is.

    Raises:
        UserError: there is no such runtime.
    """
    known = all_proofs()
    for name in runtimes:
        if name not in known:
            raise UserError(f"doctor: unknown runtime `{name}`{did_you_mean(name, known)}")
    verdicts = prove_and_keep(runtimes or known)
    processor = this_processor()
    return {
        "machine": machine(),
        "processor": processor.model,
        "architecture": processor.architecture,
        "level": processor.level,
        "features": sorted(processor.features),
        "cores": cores(),
        "memory": psutil.virtual_memory().total,
        "gpus": gpus_identity(),
        "fast_dtype": fast_dtype(),
        "runtimes": [
            {**verdict.model_dump(mode="json"), "serves": known[verdict.runtime].serves} for verdict in verdicts
        ],
    }


def is_missing(row: Mapping[str, Any]) -> bool:
    """Whether a runtime that posttrain needs on every machine is not there."""
    return row["status"] == "absent" and not row["optional"]


def doctor_table(found: Mapping[str, Any]) -> Group:
    """Draw what `examine` found."""
    head = Text.assemble(
        (found["processor"], "bold"),
        f" ({found['architecture']}: {found['level']}), {found['cores']} cores, {size(found['memory'])} of memory, "
        f"{found['gpus'] or 'no GPU'}; computes in {found['fast_dtype']} unless a recipe says otherwise",
    )
    table = PlainTable("runtime", "version", "", "found", "what to do", "serves")
    table.header_style = "dim"
    for row in found["runtimes"]:
        facts = [f"{name.replace('_', ' ')} {value}" for name, value in row["facts"].items() if value]
        # What works in another variant than its best says both.
        told = "; ".join(filter(None, [", ".join(facts), row["reason"]]))
        status = Text(row["status"], style=_COLOURS[row["status"]])
        rest = (Text(text) for text in (told, row["advice"], row["serves"]))
        table.add_row(Text(row["runtime"], style="bold"), row["version"], status, *rest)
    return Group(head, table)
