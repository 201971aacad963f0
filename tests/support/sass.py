"""Reads machine code as `cuobjdump -sass` prints it: kernels, their loops, and the order of instructions in a loop."""

import re
from typing import NamedTuple

# the waits of a warpgroup for its products: all but one group, or all
WAIT_FOR_SCORES, WAIT_FOR_ALL = (f"WARPGROUP.DEPBAR.LE gsb0, 0x{left}" for left in (1, 0))
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;?\s*/\*")


class Instruction(NamedTuple):
    """An instruction with its address; the text has its predicate and operands."""

    address: int
    text: str

    def target(self) -> int | None:
        """The address that a branch goes to."""
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


def kernels(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name."""
    found = {}
    for function in text.split("Function : ")[1:]:
        lines = filter(None, map(_LINE.match, function.splitlines()))
        found[function.split(maxsplit=1)[0]] = [Instruction(int(line[1], 16), line[2]) for line in lines]
    return found


def loops_with(code: list[Instruction], text: str) -> list[list[Instruction]]:
    """The smallest loop around each instruction that contains `text`, from its first instruction to its last branch."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for end, instruction in enumerate(code):
        begin = index.get(instruction.target(), end + 1)
        if begin < end:
            spans.append((begin, end))
    found = set()
    for at, instruction in enumerate(code):
        if text in instruction.text:
            around = [(end - begin, begin, end) for begin, end in spans if begin <= at <= end]
            found |= {min(around)} if around else set()
    return [code[begin : end + 1] for _, begin, end in sorted(found, key=lambda span: span[1])]


def under_values(loop: list[Instruction]) -> tuple[int, int]:
    """Of a loop of the forward: exponentials between the wait for the scores and that for the values, and all."""
    texts = [instruction.text for instruction in loop]
    scores = next(i for i, text in enumerate(texts) if WAIT_FOR_SCORES in text)
    values = next(i for i, text in enumerate(texts) if i > scores and WAIT_FOR_ALL in text)
    return sum("MUFU.EX2" in text for text in texts[scores:values]), sum("MUFU.EX2" in text for text in texts)


def under_do_v(loop: list[Instruction]) -> tuple[int, int]:
    """Of a loop of dq: exponentials between the first instruction of the product do·v and the wait for it, and all.

    The loop has three groups of products, q·k, do·v and ds·k, each awaited on its own.
    """
    texts = [instruction.text for instruction in loop]
    waits = [i for i, text in enumerate(texts) if "WARPGROUP.DEPBAR" in text]
    assert [WAIT_FOR_ALL in texts[i] for i in waits] == [True] * 3, [texts[i] for i in waits]
    first = next(i for i in range(waits[0], waits[1]) if "HGMMA" in texts[i])
    return sum("MUFU.EX2" in text for text in texts[first : waits[1]]), sum("MUFU.EX2" in text for text in texts)
