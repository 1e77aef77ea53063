"""A figure of a report, as the step that gives it declares it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A figure that a report gives of each model that it measures: what a gate of the recipe may name."""

    name: str
    paired: bool = False
    """Whether the report's rows hold it sample by sample, so that a paired test can tell two models apart by it."""
    distance: bool = False
    """Whether it is taken to the report's first model, which has none itself. One model's distance to its own
    reference and another's to its own say nothing of which model is better."""
    summed_up: bool = True
    """Whether the report gives it as one figure, on which a bound can be put."""
