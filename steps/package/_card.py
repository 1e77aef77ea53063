"""The model card: YAML front matter as on the hub, then prose that a stranger can act on.

Source: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steps.artifacts import Adapter, Dataset, Model, Quantized

Member = Model | Quantized | Adapter

_LLAMA_CPP = """\
```shell
llama-cli -m {file} -cnv
```

```python
from llama_cpp import Llama

model = Llama("{file}", n_ctx=2048, verbose=False)
answer = model.create_chat_completion([{{"role": "user", "content": "Hello!"}}], max_tokens=128)
print(answer["choices"][0]["message"]["content"])
```
"""
_TRANSFORMERS = """\
```python
{imports}

tokenizer = AutoTokenizer.from_pretrained("./{tokenizer}")
{load}
chat = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
_IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer"
_NEEDS = {"gptq": "gptqmodel", "awq": "gptqmodel", "bnb": "bitsandbytes", "fp8": "compressed-tensors"}


@dataclass(frozen=True)
class Folder:
    """A member's place in the package."""

    name: str
    artifact: Member
    tokenizer: str
    """Folder with its tokenizer and chat template; empty where they are inside the GGUF file."""


@dataclass(frozen=True)
class Licence:
    """The licence of a package, and what is wrong with it."""

    name: str | None
    disagreement: str = ""
    """One sentence where the members' licences differ among themselves or from the one given; else empty."""


def licence_of(given: str | None, members: Mapping[str, Any]) -> Licence:
    """Settle the licence: the one given, else the one that all members with a known licence share.

    Args:
        given: the step's `licence`.
        members: artifacts by name; those whose facts name no licence say nothing.
    """
    known = {name: str(found) for name, each in members.items() if (found := getattr(each.facts, "licence", None))}
    stated = {found.lower() for found in known.values()} | ({given.lower()} if given else set())
    name = given or (next(iter(known.values())) if len(stated) == 1 else None)
    if len(stated) < 2:
        return Licence(name)
    parts = [f"`{member}` is {found}" for member, found in known.items()]
    package = [f"the package is given as {given}"] if given else []
    return Licence(name, f"The licences disagree: {', '.join([*parts, *package])}; settle this before handing it out.")


def card(title: str, licence: Licence, folders: Sequence[Folder], table: str, data: Dataset | None) -> str:
    """Return the text of the card."""
    sections = [
        _front_matter(licence, folders),
        f"# {title}\n",
        _introduction(folders),
        f"> **Licence.** {licence.disagreement}\n" if licence.disagreement else "",
        "## Members\n",
        _members(folders),
        *(["## Comparison\n", table] if table else []),
        "## How to run\n",
        *(_how_to_run(each, folders) for each in folders),
        *(["## Training data\n", _data(data)] if data is not None else []),
        "## Lineage\n",
        _lineage(folders),
        "## Verify\n",
        "```shell\nsha256sum -c SHA256SUMS\n```\n",
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(licence: Licence, folders: Sequence[Folder]) -> str:
    import yaml

    formats = {each.artifact.facts.format for each in folders if isinstance(each.artifact, Quantized)}
    all_gguf = formats == {"gguf"} and all(isinstance(each.artifact, Quantized) for each in folders)
    adapters = any(isinstance(each.artifact, Adapter) for each in folders)
    content: dict[str, Any] = {
        "license": (licence.name or "unknown").lower(),
        "library_name": "gguf" if all_gguf else "transformers",
        "pipeline_tag": "text-generation",
        "tags": sorted({"posttrain", *formats, *(["peft"] if adapters else [])}),
    }
    if origins := _origins(folders):
        content["base_model"] = [_hub_name(origin) for origin in origins]
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _introduction(folders: Sequence[Folder]) -> str:
    architectures = sorted({_architecture(each) for each in folders})
    origins = _origins(folders)
    derived = f", derived from {' and '.join(f'`{each}`' for each in origins)}" if origins else ""
    count = f"{len(folders)} members" if len(folders) > 1 else "one member"
    return f"A language model ({', '.join(architectures)}){derived}, in {count}. Made by posttrain.\n"


def _members(folders: Sequence[Folder]) -> str:
    lines = ["| folder | what | parameters | size, MB | chat template |", "| --- | --- | ---: | ---: | --- |"]
    for each in folders:
        facts = each.artifact.facts
        template = f"`{facts.template_sha256[:12]}`" if facts.template_sha256 else "none"
        size = f"{each.artifact.size / 1e6:.1f}"
        lines.append(f"| `{each.name}` | {_what(each)} | {facts.parameters:,} | {size} | {template} |")
    return "\n".join([*lines, ""])


def _what(folder: Folder) -> str:
    artifact = folder.artifact
    if isinstance(artifact, Quantized):
        note = f", {artifact.facts.fallbacks} tensors in another type" if artifact.facts.fallbacks else ""
        return f"{artifact.facts.format.upper()} {artifact.facts.scheme}{note}"
    if isinstance(artifact, Adapter):
        rank = f" of rank {artifact.facts.rank}" if artifact.facts.rank else ""
        return f"{artifact.facts.method} adapter{rank}"
    return f"full checkpoint, {artifact.facts.dtype}"


def _how_to_run(folder: Folder, folders: Sequence[Folder]) -> str:
    artifact, name = folder.artifact, folder.name
    if isinstance(artifact, Quantized) and artifact.facts.format == "gguf":
        body = _LLAMA_CPP.format(file=f"{name}/{artifact.gguf_file.name}")
        left = ", ".join(map(str, artifact.facts.unmarked_stop_token_ids))
        note = f"The file has no room for all stop tokens: have your runtime stop at {left} too.\n\n" if left else ""
        return f"### `{name}` with llama.cpp\n\n{note}{body}"
    if isinstance(artifact, Adapter):
        base = next((each.name for each in folders if each.artifact.digest == artifact.facts.base), None)
        place = f"./{base}" if base else "BASE"
        note = "" if base else f"`BASE` is the model with digest `{artifact.facts.base}`.\n\n"
        imports = f"from peft import PeftModel\n{_IMPORTS}"
        load = f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{place}"), "./{name}")'
        body = _TRANSFORMERS.format(imports=imports, tokenizer=folder.tokenizer, load=load)
        return f"### `{name}` with peft\n\n{note}{body}"
    needs = f"Needs `{_NEEDS[artifact.facts.format]}`.\n\n" if isinstance(artifact, Quantized) else ""
    load = f'model = AutoModelForCausalLM.from_pretrained("./{name}")'
    body = _TRANSFORMERS.format(imports=_IMPORTS, tokenizer=folder.tokenizer, load=load)
    return f"### `{name}` with transformers\n\n{needs}{body}"


def _data(data: Dataset) -> str:
    facts = data.facts
    lines = [f"{facts.rows} rows of `{facts.format}`, made by `{data.manifest.step}`, digest `{data.digest}`."]
    if source := data.manifest.config.get("source"):
        lines.append(f"\nSource: `{source}`.")
    if facts.statistics:
        lines += ["", "| statistic | value |", "| --- | ---: |"]
        lines += [f"| {name} | {value:g} |" for name, value in sorted(facts.statistics.items())]
    return "\n".join([*lines, ""])


def _lineage(folders: Sequence[Folder]) -> str:
    lines = [
        "Every member's manifest is `artifact.json` in its folder; its digest is that file's sha256.",
        "",
        "| folder | digest | made by | from |",
        "| --- | --- | --- | --- |",
    ]
    for each in folders:
        manifest = each.artifact.manifest
        parents = ", ".join(f"{role}: {parent.kind} `{parent.digest}`" for role, parent in manifest.parents.items())
        lines.append(f"| `{each.name}` | `{manifest.digest}` | `{manifest.step}` | {parents} |")
    return "\n".join([*lines, ""])


def _architecture(folder: Folder) -> str:
    artifact = folder.artifact
    return artifact.facts.base_architecture if isinstance(artifact, Adapter) else artifact.facts.architecture


def _origins(folders: Sequence[Folder]) -> list[str]:
    found = {each.artifact.facts.origin for each in folders if isinstance(each.artifact, Model)}
    return sorted(origin for origin in found if origin)


def _hub_name(origin: str) -> str:
    """Return a hub URI as the hub writes it, `ORG/NAME`; any other origin as it stands."""
    return origin.removeprefix("hf://").partition("@")[0] if origin.startswith("hf://") else origin
