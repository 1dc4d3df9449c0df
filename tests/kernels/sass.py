"""Reads the machine code of Hopper kernels, as nvdisasm prints it.

A warpgroup's matrix product (HGMMA, QGMMA in fp8) runs on while the next instructions do, and reads
its left operand from registers all that time, if that is where it has it. Whoever writes to one of
them before the product was waited for (WARPGROUP.DEPBAR) spoils it. ptxas takes care of that within
a stretch of code, but was seen to forget it over the end of a loop's body.
"""

import re
from collections.abc import Iterator

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?(.*?)\s*;")
TARGET = re.compile(r"\.L_x_\d+")
PRODUCT = re.compile(r"[HQ]GMMA\.\S+ R\d+, (?:R(\d+), )?gdesc")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
WRITE = re.compile(r"([A-Z]\S*) R(\d+)")
LEFT_REGISTERS = 4  # of a thread: 64 x 16 numbers of 16 bits in a warpgroup
# What has a register first without writing to it, or is a product itself.
NO_WRITES = ("ST", "HGMMA", "QGMMA", "BAR", "RED", "ATOM", "SYNCS", "UTMA", "EXIT", "WARPGROUP")


def _instructions(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in their order, and where labels are."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := INSTRUCTION.match(line):
            found.append(instruction[1])
    return found, labels


def loops_with_products(text: str) -> list[list[str]]:
    """Bodies of the innermost loops that hold matrix products."""
    found, labels = _instructions(text)
    spans = []
    for index, instruction in enumerate(found):
        target = TARGET.search(instruction) if instruction.startswith("BRA") else None
        start = labels.get(target[0], index) if target else index
        if any("GMMA." in one for one in found[start:index]):
            spans.append((start, index))

    def holds_another(span: tuple[int, int]) -> bool:
        return any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)

    return [found[start : end + 1] for start, end in spans if not holds_another((start, end))]


def _written(instruction: str) -> set[int]:
    """Registers of a thread that an instruction writes to."""
    match = WRITE.match(instruction)
    if not match or match[1].startswith(NO_WRITES):
        return set()
    name, first = match[1], int(match[2])
    wide = ".128" in name or (name.startswith("LDSM") and name.endswith(".4"))
    count = 4 if wide else 2 if ".64" in name or "WIDE" in name else 1
    return set(range(first, first + count))


def spoilt_products(body: list[str]) -> Iterator[str]:
    """Instructions of a loop's body that write to a left operand while its product may still run:
    in any two rounds, the first of which may have left products to the second.
    """
    groups: list[set[int]] = [set()]  # of registers, the last one not committed yet
    for instruction in body * 2:
        product, wait = PRODUCT.match(instruction), WAIT.match(instruction)
        if product:
            if product[1]:
                first = int(product[1])
                groups[-1] |= set(range(first, first + LEFT_REGISTERS))
            if "gsb0" in instruction:
                groups.append(set())
        elif wait:
            running = int(wait[1], 16)
            groups = groups[len(groups) - 1 - running :] if running else [set()]
        elif _written(instruction) & set().union(*groups):
            yield instruction
