"""Step kinds that bring or make models."""
