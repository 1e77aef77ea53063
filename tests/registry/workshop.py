"""Small artifacts of every kind, published and recorded as a flow would."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from registry.gates import Gate, GateDecision, GateOutcome
from registry.home import Home
from registry.record import Execution, Recorder, StepRecord
from steps.artifacts import Artifact, Dataset, Manifest, Parent, Quantized, Report, ReportFacts, digest_tree

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MODEL_FACTS: dict[str, Any] = {
    "architecture": "LlamaForCausalLM",
    "parameters": 1000,
    "dtype": "bfloat16",
    "hidden_size": 8,
    "vocabulary": 16,
    "tied_embeddings": True,
    "tokenizer_sha256": "0" * 64,
    "template_sha256": None,
    "stop_token_ids": [2],
}


def quantized_facts(form: str, scheme: str) -> dict[str, Any]:
    """Facts of a quantized model."""
    return {
        "format": form,
        "scheme": scheme,
        "bits_per_weight": 4.5,
        "template_sha256": None,
        "stop_token_ids": [2],
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
    }


def judged(against: int | None) -> GateDecision:
    """A decision that rests on a comparison with the champion."""
    gate = Gate(metric="quality.kl", against="champion")
    outcome = GateOutcome(gate=gate, member="merged", passed=True, value=0.1, sentence="It is as good.")
    return GateDecision(promote=True, outcomes=(outcome,), sentence="Promoted: it is as good.", against=against)


class Workshop:
    """Makes artifacts and records in one home."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.recorder = Recorder(home)

    def begin(self, recipe: str = "pico") -> Execution:
        return self.recorder.begin(recipe, f"name: {recipe}\n", {"torch": "2.13.0", "numpy": "2.2.6"}, {"who": "test"})

    def make(
        self,
        kind: str,
        files: Mapping[str, bytes],
        facts: Mapping[str, Any],
        parents: Mapping[str, Artifact[Any]] | None = None,
        step: str = "model.pico",
        output: str = "",
        key: str = "",
    ) -> Artifact[Any]:
        """Publish an artifact; its key follows from what it is made of, where none is given."""
        staging = self.home.root / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        for name, content in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)
        tree = digest_tree(staging)
        key = key or hashlib.sha256(f"{step}{tree.sha256}".encode()).hexdigest()
        manifest = Manifest(
            kind=kind,
            tree=tree.sha256,
            files=tree.files,
            parents={role: Parent(kind=each.kind, digest=each.digest) for role, each in (parents or {}).items()},
            step=step,
            output=output,
            key=key,
            config={},
            libraries={"torch": "2.13.0"},
            facts=facts,
        )
        return self.home.store.publish(staging, manifest)

    def model(self, content: bytes = b"weights", **more: Any) -> Artifact[Any]:
        files = {"model.safetensors": content * 1000, "config.json": b"{}", "tokenizer/vocab.json": b"{}"}
        return self.make("Model", files, MODEL_FACTS, **more)

    def gguf(self, model: Artifact[Any], scheme: str) -> Quantized:
        files = {f"{scheme}.gguf": model.digest.encode() * 1000 + scheme.encode()}
        made = self.make("Quantized", files, quantized_facts("gguf", scheme), {"model": model}, "quantize.gguf")
        assert isinstance(made, Quantized)
        return made

    def gptq(self, model: Artifact[Any], scheme: str = "Int4-g128") -> Artifact[Any]:
        files = {"model.safetensors": model.digest.encode() + scheme.encode(), "quantize_config.json": b"{}"}
        return self.make("Quantized", files, quantized_facts("gptq", scheme), {"model": model}, "quantize.gptq")

    def dataset(self, rows: int = 3) -> Dataset:
        lines = "".join(json.dumps({"id": str(row)}) + "\n" for row in range(rows))
        facts = {"rows": rows, "format": "messages", "template_sha256": None, "statistics": {"tokens": 5.0}}
        made = self.make("Dataset", {"rows.jsonl": lines.encode()}, facts, step="data.prepare", output="train")
        assert isinstance(made, Dataset)
        return made

    def report(self, metrics: Mapping[str, float], rows: str = "") -> Report:
        facts = ReportFacts(metrics=metrics).as_plain()
        made = self.make("Report", {"rows.jsonl": rows.encode()}, facts, step="evaluate.compare")
        assert isinstance(made, Report)
        return made

    def step(
        self, name: str, *made: Artifact[Any], inputs: Mapping[str, Artifact[Any]] | None = None, **more: Any
    ) -> StepRecord:
        """Describe the finished step that made these artifacts."""
        return StepRecord(
            name=name,
            kind=made[0].manifest.step,
            key=made[0].manifest.key,
            outputs={artifact.manifest.output: artifact.digest for artifact in made},
            inputs={role: artifact.digest for role, artifact in (inputs or {}).items()},
            **{
                "config": {"seed": 1},
                "seconds": 2.5,
                "peak_memory": 10**9,
                "began": BEGAN,
                "ended": BEGAN + timedelta(seconds=2.5),
                **more,
            },
        )
