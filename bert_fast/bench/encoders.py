"""The backends of the sentence-transformers protocol: each encodes texts at a batch size. Those of
others are plugged into ``SentenceTransformer``, whose tokens, sorting and pooling they share."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from bert_fast.bench.compare import served
from bert_fast.bench.peers.engines import CTranslate2, OnnxRuntime, OpenVINO
from bert_fast.bench.peers.hugging_face import QuantisedInt8
from bert_fast.bench.peers.peer import Absent, Peer
from bert_fast.extras import missing

REFERENCE = "sentence-transformers float32"
OURS = "bert_fast"
PEERS: dict[str, type[Peer]] = {
    "ONNX Runtime": OnnxRuntime, "OpenVINO": OpenVINO, "CTranslate2": CTranslate2,
    "torch dynamic": QuantisedInt8,
}  # fmt: skip
BACKENDS = (
    REFERENCE, "sentence-transformers bfloat16",
    "bert_fast float32", "bert_fast bfloat16", "bert_fast int8",
    "ONNX Runtime float32", "ONNX Runtime int8",
    "OpenVINO float32", "OpenVINO bfloat16", "OpenVINO int8",
    "CTranslate2 float32", "CTranslate2 int8", "torch dynamic int8",
)  # fmt: skip


@dataclass
class Checkpoint:
    """What engines want of a work."""

    checkpoint: str
    dtype: torch.dtype
    calibration: tuple = ()

    kind, device, backward, compute = "model", "cpu", False, torch.float32

    @functools.cached_property
    def config(self):
        import transformers

        return transformers.AutoConfig.from_pretrained(self.checkpoint)

    def in_dtype(self, dtype):
        work = copy.copy(self)
        work.dtype = dtype
        return work


def parted(name):
    """A backend's name without its dtype, and the dtype."""
    who, _, dtype = name.rpartition(" ")
    return who, getattr(torch, dtype)


def absent(name):
    """Why a backend is not here, or None."""
    who, dtype = parted(name)
    if who in PEERS:
        reason = PEERS[who]().why_absent(Checkpoint("", dtype))
        if reason is not None:
            return reason
    return missing("sentence_transformers") if who != OURS else None


def make(name, directory, texts):
    """encode(texts, batch_size) -> (texts, width) float32 array. ``texts`` calibrate what wants it.

    Raises:
        Absent: this version, or this processor, does not have it.
    """
    who, dtype = parted(name)
    if who == OURS:
        try:
            ours = served(directory, str(dtype).removeprefix("torch."), "cpu")
        except ValueError as error:
            raise Absent(str(error)) from error
        return lambda some, size: ours.encode(some, batch_size=size, progress=False)
    from sentence_transformers import SentenceTransformer

    wanted = dtype if who == "sentence-transformers" else torch.float32
    theirs = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": wanted})
    if who in PEERS:
        _plug(theirs, PEERS[who](), directory, dtype, texts)

    def encode(some, size):
        found = theirs.encode(
            some, batch_size=size, convert_to_tensor=True, show_progress_bar=False
        )
        return found.float().numpy()

    return encode


def _plug(theirs, peer, directory, dtype, texts):
    """Puts the peer's model where ``theirs`` has transformers'."""
    inner = theirs[0]
    if isinstance(peer, QuantisedInt8):
        inner.model = peer.quantised(inner.model)
        return
    tokens = [theirs.preprocess([text]) for text in texts]
    names = ("input_ids", "attention_mask")
    batches = tuple({name: batch[name] for name in names} for batch in tokens)
    work = Checkpoint(str(Path(directory)), dtype, batches)
    # Two texts, of which one is padded, to trace by: nothing of it may be taken for fixed.
    example = theirs.preprocess([texts[0], texts[0] + " " + texts[1]])
    engine = peer.engine(work, [{name: example[name] for name in names}], dynamic=True)
    inner.model = _Plugged(inner.model.config, engine)


class _Plugged(torch.nn.Module):
    """An engine with the face of transformers' model."""

    def __init__(self, config, engine):
        super().__init__()
        self.config, self.engine = config, engine
        self.place = torch.nn.Parameter(torch.zeros(()), requires_grad=False)  # says: on the CPU

    def forward(self, input_ids, attention_mask, **_):
        from transformers.modeling_outputs import BaseModelOutput

        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        return BaseModelOutput(last_hidden_state=self.engine(batch))
