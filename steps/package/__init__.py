"""Step kinds that bundle models for hand-out."""
