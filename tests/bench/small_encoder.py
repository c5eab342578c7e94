"""A small drawn encoder of texts, written by transformers and sentence-transformers themselves."""

import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

WORDS = ["film", "plot", "good", "bad", "slow", "loud", "acting", "heist", "robot", "river"]


def save(directory, **config):
    """Saves it: mean pooling, unit vectors, 64 tokens at most. Returns the directory."""
    base = directory / "base"
    base.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (base / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    transformers.BertTokenizer(str(base / "vocab.txt")).save_pretrained(base)
    sizes = dict(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2,
                 num_attention_heads=2, intermediate_size=128, max_position_embeddings=64,
                 initializer_range=0.125)  # fmt: skip
    model = transformers.BertModel(transformers.BertConfig(**{**sizes, **config}))
    model.save_pretrained(base)
    inner = Transformer(str(base), max_seq_length=64)
    modules = [inner, Pooling(64, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(directory / "saved"))
    return directory / "saved"
