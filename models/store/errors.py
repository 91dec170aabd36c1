"""What the store raises. The text says which file or field is wrong and what to do about it."""

from __future__ import annotations


class StoreError(Exception):
    """A model that cannot be brought into the store, or that is not what its manifest says."""
