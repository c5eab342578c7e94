"""Greedy and beam search. A step is one query for each sentence that is not finished yet; keys and
values of what was written so far are kept."""

import torch
import torch.nn.functional as F

from bert_fast.models.workspace import NoWorkspace, can_reuse_memory


class Decoding:
    """What decoding carries from token to token. Rows are sentences, or their beams, each with room
    for ``capacity`` tokens; those that go on are ``live``.

    Two sequences a row tell the ops where its keys are: what it has said, and the empty rest of its
    room, to which no query belongs. So nothing is moved when sentences end or lengths grow.
    """

    def __init__(self, decoder, memory, source, beams, capacity):
        self.decoder, self.source, self.beams, self.capacity = decoder, source, beams, capacity
        self.batch, self.device = source.cu_seqlens.numel() - 1, memory.device
        self.rows, self.position = self.batch * beams, 0
        attention = [layer.cross_attention for layer in decoder.bert.layers]
        self.memory = [a.keys_and_values(memory) for a in attention]
        room = self.rows, capacity, 2
        self.caches = [memory.new_empty(*room, a.num_heads, a.head_dim) for a in attention]
        self.starts = torch.arange(self.rows + 1, device=self.device) * capacity

    def step(self, tokens, live):
        """Log-probabilities, up to a constant a row, of what follows ``tokens``, one a live row:
        (live rows, vocab)."""
        self.live = live
        counts = torch.zeros(self.rows, dtype=torch.int32, device=self.device)
        counts[live] = 1
        self.own_queries = offsets(torch.stack([counts, torch.zeros_like(counts)], 1).flatten())
        ends = torch.stack([self.starts[:-1], self.starts[:-1] + self.position + 1], 1).flatten()
        self.own_keys = torch.cat([ends, self.starts[-1:]]).int()
        self.queries = offsets(counts.view(self.batch, self.beams).sum(1, dtype=torch.int32))
        stack = self.decoder.bert
        x = stack.embeddings(tokens, torch.full_like(tokens, self.position), None)
        workspace = self.decoder.workspace if can_reuse_memory(x) else NoWorkspace()
        for layer, cache, kv in zip(stack.layers, self.caches, self.memory, strict=True):
            x = layer.step(x, self, cache, kv, workspace)
        self.position += 1
        return self.decoder.logits(x)

    def reorder(self, rows, sources):
        """What ``rows`` have said becomes what ``sources`` had."""
        for cache in self.caches:
            cache[rows, : self.position] = cache[sources, : self.position]


def offsets(counts):
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _said(decoding, config):
    """Padding to write to, after the token that starts."""
    said = torch.full(
        (decoding.rows, decoding.capacity + 1), config.pad_token_id, device=decoding.device
    )
    said[:, 0] = config.decoder_start_token_id
    return said


def greedy(decoding, config):
    said = _said(decoding, config)
    live = torch.arange(decoding.rows, device=decoding.device)
    while len(live) and decoding.position < decoding.capacity:
        best = decoding.step(said[live, decoding.position], live).argmax(1)
        said[live, decoding.position] = best
        live = live[best != config.eos_token_id]
    return said[:, : decoding.position + 1]


def beam_search(decoding, config, length_penalty):
    """A sentence is open while its best beam, were it to end now, would be among its best ends."""
    batch, beams, device = decoding.batch, decoding.beams, decoding.device
    said = _said(decoding, config).view(batch, beams, -1)
    ended = said.clone()
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams are alike at first
    ended_scores = torch.full_like(scores, -torch.inf)
    beam, opened = torch.arange(beams, device=device), torch.arange(batch, device=device)
    while len(opened) and decoding.position < decoding.capacity:
        rows = (opened[:, None] * beams + beam).flatten()
        logits = decoding.step(said.view(decoding.rows, -1)[rows, decoding.position], rows)
        length = decoding.position  # of what is said, without the start
        likely = logits.float().log_softmax(1).view(len(opened), beams, -1)
        likely = (likely + scores[opened, :, None]).flatten(1)
        top, place = likely.topk(2 * beams)  # half of them may end, and as many must go on
        origin, token = place // logits.shape[1], place % logits.shape[1]
        longer = said[opened[:, None], origin]
        longer[:, :, length] = token
        ends = token == config.eos_token_id
        if length == decoding.capacity:
            ends.fill_(True)

        ending = top[:, :beams].masked_fill(~ends[:, :beams], -torch.inf) / length**length_penalty
        all_scores = torch.cat([ended_scores[opened], ending], 1)
        best, which = all_scores.topk(beams)
        ended_scores[opened] = best
        every = torch.cat([ended[opened], longer[:, :beams]], 1)
        ended[opened] = every.gather(1, which[:, :, None].expand(-1, -1, every.shape[2]))

        going, which = top.masked_fill(ends, -torch.inf).topk(beams)
        scores[opened] = going
        said[opened] = longer.gather(1, which[:, :, None].expand(-1, -1, longer.shape[2]))
        sources = opened[:, None] * beams + origin.gather(1, which)
        decoding.reorder(rows, sources.flatten())
        opened = opened[going[:, 0] / length**length_penalty > best[:, -1]]
    best = ended[:, 0]
    padding = (best[:, 1:] == config.pad_token_id).flip(1).long().cumprod(1).sum(1)
    return best[:, : best.shape[1] - int(padding.min()) if batch else 1]
