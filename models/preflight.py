"""Whether devices compute, remember and talk to each other rightly: `python -m models.preflight cuda:0 cuda:1 …`.

For devices on which nothing else runs: it takes most of their memory. Prints a line per fault and exits with 1 when
there is one. Everything is exact: sums of small integers have one right value in fp32, in whatever order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from models.config import ModelError
from models.platform import device_facts

SHARE = 0.9  # of the free memory that is written and read back
PIECE_BYTES = 1 << 28
SIZE = 2048  # of square matrices with values -4 … 4: sums stay below 2^24
NUM_PRODUCTS = 20


def faults(devices: list[str], share: float = SHARE) -> list[str]:
    """What is wrong with the devices, a line each; empty when nothing is. share: of free memory that is tested."""
    found: list[str] = []
    usable = []
    for device in devices:
        try:
            here = [*_memory_faults(device, share), *_product_faults(device)]
        except (RuntimeError, ModelError) as error:  # what a broken device raises first
            here = [f"{device}: {str(error).splitlines()[0]}"]
        found += here
        if not here:
            usable.append(device)
    return found + list(_copy_faults(usable))


def _memory_faults(device: str, share: float) -> Iterator[str]:
    """Writes two complementary patterns over the memory; each is read back when all of it is written."""
    count = max(1, int(device_facts(device).free_memory_bytes * share) // PIECE_BYTES)
    pieces: list[torch.Tensor] = []
    for _ in range(count):
        try:
            pieces.append(torch.empty(PIECE_BYTES // 4, dtype=torch.int32, device=device))
        except torch.OutOfMemoryError:
            break
    for pattern in (0x55555555, ~0x55555555):
        for number, piece in enumerate(pieces):
            piece.fill_(pattern ^ number)
        for number, piece in enumerate(pieces):
            num_wrong = int((piece != (pattern ^ number)).sum())
            if num_wrong:
                yield f"{device}: {num_wrong} words of memory do not hold what was written"
                return


def _product_faults(device: str) -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, (SIZE, SIZE), generator=generator).float() for _ in range(2))
    expected = left @ right
    there, times, wanted = left.to(device), right.to(device), expected.to(device)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(NUM_PRODUCTS):
            product = (there.to(dtype) @ times.to(dtype)).float()
            num_wrong = int((product != wanted.to(dtype).float()).sum())
            if num_wrong:
                yield f"{device}: {num_wrong} elements of a {dtype} product are wrong"
                return


def _copy_faults(devices: list[str]) -> Iterator[str]:
    for source in devices:
        words = torch.arange(1 << 22, dtype=torch.int32, device=source)
        for target in devices:
            if target != source and not torch.equal(words.to(target).cpu(), words.cpu()):
                yield f"{source} -> {target}: a copy differs"


def main(devices: list[str]) -> int:
    """0: nothing is wrong, 1: something is, 2: no device was named."""
    if not devices:
        print("usage: python -m models.preflight DEVICE…, such as cuda:0", file=sys.stderr)
        return 2
    found = faults(devices)
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
