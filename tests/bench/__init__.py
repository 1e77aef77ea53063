"""Measurements of what posttrain itself costs, each beside the bare thing, in one run: `make bench`."""
