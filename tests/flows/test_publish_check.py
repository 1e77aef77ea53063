"""What a recipe publishes and by which gates: whatever can be seen before anything runs is refused before."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flows.graph import Graph
from steps.frame import UserError
from tests.flows.conftest import SMALL, builder

QUALITY = "  quality: {uses: evaluate.compare, reference: merged, candidates: [gguf], data: data.eval}\n"
SCORES = "  scores: {uses: evaluate.tasks, candidates: [merged, base], data: data.eval}\n"
Publish = Callable[..., Graph]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Build a graph that publishes members of a family by one gate."""

    def build(gate: str = "", members: str = "merged, gguf", family: str = "small") -> Graph:
        gates = f", gates: [{{{gate}}}]" if gate else ""
        whole = f"publish: {{family: {family}, members: [{members}]{gates}}}"
        return builder(SMALL, tmp_path / "small.yaml")(
            ("publish: {family: small, members: [merged, gguf]}", f"{QUALITY}{SCORES}{whole}")
        )

    return build


def refusal(publish: Publish, gate: str = "", **more: str) -> str:
    with pytest.raises(UserError) as caught:
        publish(gate, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("metric", ["quality.kl", "quality.kl_to_reference", "quality.top1_agreement"])
def test_a_distance_to_tonights_reference_takes_a_bound_and_is_not_held_against_the_champions(
    publish: Publish, metric: str
) -> None:
    message = refusal(publish, f"metric: {metric}, member: gguf, against: champion")
    assert f"publish.gates.0.against: {metric} is the distance to tonight's reference" in message
    assert "write `at_most:` or `at_least:` with a bound instead" in message
    assert publish(f"metric: {metric}, member: gguf, at_most: 0.1")
    assert publish("metric: quality.perplexity, against: champion")
