"""Stable hashes: the same text lands in the same place on every machine and beside any other rows."""

import hashlib


def hexdigest(content: bytes) -> str:
    """Return the sha256 as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def uniform(*parts: object) -> float:
    """Return a number in [0, 1) that depends on the parts alone; as good as drawn at random for different parts."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
