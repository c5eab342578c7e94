"""How near a cheaper format comes to float32: cosines, the floors below which a result is wrong,
and how well one retrieves by it."""

import math

import torch

# (mean, least) cosine to float32, and by how much a vector's length may differ: what falls below
# is called wrong. A cosine alone would not see a scale. int8 leaves room for the coarsest scheme in
# use, one scale a tensor: PyTorch's gave 0.906 and 0.707 on all-MiniLM-L6-v2's tokens.
FLOORS = {
    torch.float32: (0.99999, 0.9999, 0.001),
    torch.bfloat16: (0.999, 0.99, 0.02),
    torch.int8: (0.85, 0.5, 0.1),
}


def cosines(found, reference):
    """{"mean", "p1", "least"} of the cosines of rows: two float tensors or arrays (rows, width).
    NaN where either is not finite."""
    found, reference = (torch.as_tensor(t).detach().double().cpu() for t in (found, reference))
    each = torch.nn.functional.cosine_similarity(found, reference, dim=-1)
    return {
        "mean": each.mean().item(),
        "p1": each.quantile(0.01).item(),
        "least": each.min().item(),
    }


def refusal(found, reference, dtype):
    """Why ``found`` (rows, width) is not what ``reference`` is in ``dtype``, or None."""
    if found.shape != reference.shape:
        return f"wrong: its result is {tuple(found.shape)}, not {tuple(reference.shape)}"
    mean, least, scale = FLOORS[dtype]
    measured = cosines(found, reference)
    lengths = [t.detach().double().cpu().norm(dim=-1).mean().item() for t in (found, reference)]
    off = abs(lengths[0] / lengths[1] - 1)
    for what, value, floor in (
        ("mean", measured["mean"], mean),
        ("least", measured["least"], least),
    ):
        if not value >= floor:
            return f"wrong: the {what} cosine to float32 is {value:.4f}; {floor} is the floor"
    if not off <= scale:
        return (
            f"wrong: its vectors are {off:.1%} longer or shorter than float32's; {scale:.1%} may be"
        )
    return None


def shown(measured):
    """Mean, 1st percentile and least in one cell of a table."""
    return " / ".join(f"{measured[name]:.4f}" for name in ("mean", "p1", "least"))


def recall(found, reference, k=10):
    """The share of each text's ``k`` nearest neighbours (by cosine, itself left out) that both have
    in common: embeddings (texts, width). NaN for a single text, which has no neighbours.

    Raises:
        ValueError: the two are not embeddings of as many texts.
    """
    if len(found) != len(reference):
        raise ValueError(f"{len(found)} embeddings beside {len(reference)}")
    k = min(k, len(found) - 1)
    if k < 1:
        return math.nan
    near = [_neighbours(embeddings, k) for embeddings in (found, reference)]
    common = (near[0][:, :, None] == near[1][:, None, :]).any(-1)
    return common.double().mean().item()


def _neighbours(embeddings, k, rows=1024):
    unit = torch.nn.functional.normalize(torch.as_tensor(embeddings).float(), dim=-1)
    found = []
    for begin in range(0, len(unit), rows):
        scores = unit[begin : begin + rows] @ unit.T
        scores[torch.arange(len(scores)), torch.arange(begin, begin + len(scores))] = -math.inf
        found.append(scores.topk(k).indices)
    return torch.cat(found)


def ndcg(queries, documents, relevant, k=10):
    """The mean nDCG@k of documents ranked by cosine: (queries, width), (documents, width), and for
    each query the set of the numbers of its documents."""
    queries, documents = (
        torch.nn.functional.normalize(torch.as_tensor(t).float(), dim=-1)
        for t in (queries, documents)
    )
    ranked = (queries @ documents.T).topk(min(k, len(documents))).indices.tolist()
    discount = [1 / math.log2(rank + 2) for rank in range(k)]
    found = [
        sum(d for d, number in zip(discount, row, strict=False) if number in wanted)
        / sum(discount[: len(wanted)])
        for row, wanted in zip(ranked, relevant, strict=True)
    ]
    return sum(found) / len(found)
