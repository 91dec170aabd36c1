"""The model store: `pull` a reference, `resolve` its folder, `verify` what is there (C12)."""

from models.store.errors import StoreError
from models.store.manifest import Manifest, verify
from models.store.pull import Progress, pull, resolve
from models.store.sources import ALIASES

__all__ = ["ALIASES", "Manifest", "Progress", "StoreError", "pull", "resolve", "verify"]
