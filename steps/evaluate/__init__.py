"""Step kinds that compare models."""
