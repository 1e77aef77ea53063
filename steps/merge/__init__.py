"""Merging: several weights into one model, each merge with its proof."""
