"""The frame: a step runs in its own process, publishes, and its digest is the same twice."""

from typing import Any


def test_pico_model_is_published_with_its_facts(bench: Any, pico: Any) -> None:
    assert pico.kind == "Model"
    assert 0.5e6 < pico.facts.parameters < 2e6
    assert pico.facts.template_sha256
    assert bench.store.fault(pico.digest) is None
