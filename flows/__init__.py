"""Flows: when and where. A recipe becomes a typed graph, a plan, and a Prefect flow that runs it."""
