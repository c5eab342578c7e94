"""Who is measured. A peer is a class with a method for each kind of work it does; the method takes
the work and one copy of its inputs, and returns a Run (``bench/contestant.py``) in whatever layout
suits the peer. A new peer or kernel variant: a class in one of the files here, and a line in
:func:`peers`.
"""

from bert_fast import backends
from bert_fast.bench.peers.ceilings import Copy, Gemms
from bert_fast.bench.peers.engines import CTranslate2, OnnxRuntime, OpenVINO
from bert_fast.bench.peers.gpu import FlashAttention, Xformers
from bert_fast.bench.peers.hugging_face import (
    Accelerated,
    HuggingFace,
    InFloat32,
    QuantisedInt8,
    TorchAo,
    Zentorch,
)
from bert_fast.bench.peers.ours import Eager, Graphs, NotPrepacked, Ours
from bert_fast.bench.peers.peer import Absent, Peer
from bert_fast.bench.peers.torch import Compiled, Sdpa, SdpaLoop, Torch, TorchEncoderLayer

__all__ = [
    "Absent",
    "Compiled",
    "Eager",
    "Gemms",
    "InFloat32",
    "Ours",
    "Peer",
    "Sdpa",
    "SdpaLoop",
    "Torch",
    "peers",
]


def peers(device):
    """Everyone, ours first: what the others' times are divided by."""
    own = [b for b in backends.AUTO[device] if b != "eager" and not backends.why_unavailable(b)]
    return [
        Ours(),
        *(Ours(b, name=f"bert_fast {b}") for b in own if len(own) > 1),
        Graphs(),
        NotPrepacked(),
        Accelerated(),
        Eager(),
        Torch(),
        Compiled("default"),
        Compiled("reduce-overhead"),
        Compiled("max-autotune"),
        Sdpa(),
        Sdpa("MATH"),
        Sdpa("FLASH_ATTENTION"),
        Sdpa("EFFICIENT_ATTENTION"),
        Sdpa("CUDNN_ATTENTION"),
        SdpaLoop(),
        TorchEncoderLayer(),
        HuggingFace("eager"),
        HuggingFace("sdpa"),
        HuggingFace("flash_attention_2"),
        QuantisedInt8(),
        TorchAo(),
        Zentorch(),
        OnnxRuntime(),
        OpenVINO(),
        CTranslate2(),
        FlashAttention(),
        Xformers(),
        Copy(),
        Gemms(),
        Gemms(packed=True),
    ]
