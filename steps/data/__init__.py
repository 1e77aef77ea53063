"""Step kinds that make data sets."""
