"""Bytes and times as a spec and Kubernetes write them."""

from __future__ import annotations

import math
import re
from typing import Final

_DECIMAL: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: Final = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
MI: Final = 1 << 20
GI: Final = 1 << 30


def parse_bytes(text: str) -> int:
    """ "512MiB", "140.5GB", "2Gi" or "1048576" as a number of bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if match is None:
        raise ValueError("expected a size such as 512MiB or 140GB")
    return round(float(match.group(1)) * (_DECIMAL | _BINARY)[match.group(2) or ""])


def quantity(num_bytes: float) -> str:
    """A Kubernetes quantity of at least so many bytes: whole Gi from 16 Gi on, whole Mi below."""
    unit, name = (GI, "Gi") if num_bytes >= 16 * GI else (MI, "Mi")
    count = math.ceil(num_bytes / unit)
    return f"{count // 1024}Gi" if name == "Mi" and count % 1024 == 0 and count else f"{count}{name}"


def num_bytes_of(quantity_text: str) -> int:
    """A Kubernetes quantity of memory as bytes: "1.5Gi", "500M", "123". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|T)?", quantity_text)
    if match is None:
        raise ValueError(f"expected a quantity of memory, not {quantity_text!r}")
    return round(float(match.group(1)) * (_DECIMAL | _BINARY)[(match.group(2) or "").lower()])


def cpus(count: float) -> str:
    """A Kubernetes quantity of processors."""
    return f"{count:g}" if float(count).is_integer() else f"{round(count * 1000)}m"
