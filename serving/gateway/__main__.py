"""`python -m serving.gateway SETTINGS`: one gateway process. SETTINGS: GatewaySettings as JSON.

The supervisor starts it through serving/leash.py, which reads the settings from standard input.
"""

from __future__ import annotations

import sys

import msgspec

from serving.config import GatewaySettings
from serving.gateway.server import run


def main() -> int:
    try:
        settings = msgspec.json.decode(sys.argv[1], type=GatewaySettings)
    except (IndexError, msgspec.MsgspecError) as error:
        print(f"usage: python -m serving.gateway SETTINGS (GatewaySettings as JSON): {error}", file=sys.stderr)
        return 2
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
