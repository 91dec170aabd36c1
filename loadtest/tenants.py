"""Several tenants: a file of names and API keys. Keys go into headers and nowhere else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from loadtest import spec
from loadtest.spec import SpecError

MAX_TENANTS = 10_000


class Tenant(NamedTuple):
    name: str
    key: str
    weight: float

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


ANONYMOUS = Tenant("", "", 1.0)


class Tenants:
    """Who sends; without a file a single nameless tenant without key."""

    def __init__(self, path: Path | str | None) -> None:
        """The file's lines are `name key` or `name key weight`; # begins a comment. Raises SpecError."""
        self.all = [ANONYMOUS] if path is None else _read(Path(path))
        self.by_name = {tenant.name: tenant for tenant in self.all}
        self._weights = [tenant.weight for tenant in self.all]

    def draw(self, draw: random.Random) -> Tenant:
        return self.all[0] if len(self.all) == 1 else draw.choices(self.all, self._weights)[0]


def _read(path: Path) -> list[Tenant]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--api-keys: {error}") from None
    tenants = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"--api-keys: {path}: line {number}"
        if not 2 <= len(words) <= 3 or not words[1].isascii():
            raise SpecError(f"{where} must be `name key` or `name key weight`")
        weight = spec.positive(words[2], f"{where}: weight") if len(words) == 3 else 1.0
        tenants.append(Tenant(words[0], words[1], weight))
    names = {tenant.name for tenant in tenants}
    if not 1 <= len(tenants) <= MAX_TENANTS or len(names) < len(tenants):
        raise SpecError(f"--api-keys: {path} must hold 1 to {MAX_TENANTS} tenants of different names")
    return tenants
