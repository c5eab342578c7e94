"""A kernel's loops, found in its machine code; and the one that does the work."""

import re
from dataclasses import dataclass

# A line of SASS:  /*0080*/  @!P0 LDG.E.128 R4, [R2.64] ;
LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "" where it always runs
    op: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def name(self):
        return self.op.split(".")[0]

    @property
    def target(self):
        """The address that a branch goes to."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands) if self.name in ("BRA", "BRX") else []
        return int(found[-1], 16) if found else None

    @property
    def falls_through(self):
        """Whether the next instruction may follow."""
        if self.name not in ("BRA", "BRX", "EXIT", "RET"):
            return True
        also = re.search(r"U?P\d", self.operands.split("0x")[0])  # BRA.U UP0, or BRA P1
        return bool(self.predicate or also or ".DIV" in self.op)


def parse(sass):
    """The instructions of one kernel's listing (``cuobjdump -sass``), its padding left out."""
    code = [Instruction(int(a, 16), p, op, rest) for a, p, op, rest in LINE.findall(sass)]
    while code and (code[-1].name == "NOP" or code[-1].target == code[-1].address):
        code.pop()
    return code


def loops(code, nested=None):
    """Natural loops, in the order of their addresses, each as a list of its own instructions. A
    loop inside of it is left out, but for those that have an instruction that matches ``nested``,
    and so are the ways that lead through one, where there are others. Of a branch both sides
    count."""
    import networkx  # torch needs it, too

    at = {i.address: n for n, i in enumerate(code)}
    jumps = {n: at[i.target] for n, i in enumerate(code) if i.target in at}
    ends = {n + 1 for n, i in enumerate(code) if n in jumps or not i.falls_through}
    starts = sorted(({0} | ends | set(jumps.values())) - {len(code)})
    blocks = {s: code[s:e] for s, e in zip(starts, [*starts[1:], len(code)], strict=True)}
    flow = networkx.DiGraph()
    flow.add_nodes_from(blocks)
    for start, block in blocks.items():
        last = start + len(block) - 1
        if last in jumps:
            flow.add_edge(start, jumps[last])
        if block[-1].falls_through and last + 1 in blocks:
            flow.add_edge(start, last + 1)
    above = networkx.immediate_dominators(flow, 0) | {0: None}

    def dominates(header, block):
        while block is not None and block != header:
            block = above[block]
        return block == header

    bodies = {}
    for block, header in flow.edges:
        if block in above and dominates(header, block):
            inside = flow.subgraph(set(flow) - {header})
            before = networkx.ancestors(inside, block) | {block} if block != header else set()
            bodies[header] = bodies.get(header, set()) | before | {header}
    found = []
    for header, body in sorted(bodies.items()):
        inner = [o for h, o in bodies.items() if h in body and o < body]
        if nested:
            inner = [o for o in inner if not any(nested.match(i.op) for n in o for i in blocks[n])]
        own = flow.subgraph(body - set().union(*inner))
        turn = networkx.descendants(own, header) & networkx.ancestors(own, header)
        turn = {header} | turn if turn or own.has_edge(header, header) else set(own)
        found.append([i for start in sorted(turn) for i in blocks[start]])
    return found


def main_loop(code, products, nested=False, number=1):
    """The instructions that do the work, and whether they are a loop. Of a kernel of matrix
    ``products`` the loop that has most of them, and of two the shorter: whole tiles go there, the
    last through the other; the first ``number`` of these together. Else the largest that reads
    global memory. A kernel without such a loop is its own."""
    wanted = re.compile(r"LDG|UTMALDG")
    if products:  # without tensor cores they are FFMA
        wanted = MATRIX if any(MATRIX.match(i.op) for i in code) else re.compile("FFMA")
    found = loops(code, wanted if nested else None)
    found = [(sum(bool(wanted.match(i.op)) for i in body), body) for body in found]
    found = [(matching, body) for matching, body in found if matching]
    if not found:
        return code, False
    if products:
        found.sort(key=lambda pair: (-pair[0], len(pair[1])))
        return [i for _, body in found[:number] for i in body], True
    return max(found, key=lambda pair: len(pair[1]))[1], True
