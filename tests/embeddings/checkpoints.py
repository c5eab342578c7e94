"""Small drawn checkpoints, written by transformers and sentence-transformers themselves."""

import string

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer

LETTERS = list(string.ascii_lowercase)
WORDS = ["the", "film", "good", "bad", "plot", "acting", "é", "Good", "中"]
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS,
    *"?.,!:'",
]  # fmt: skip
SIZES = dict(
    vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=40, initializer_range=0.3,
)  # fmt: skip
TEXTS = [
    "the film", "Good plot, bad acting!", "a", "", "the good film: the bad film? the plot " * 3,
    "Élan 中文 GOOD", "z" * 12,
]  # fmt: skip


def bert(directory, tokenizer=None, kind=transformers.BertModel, **config):
    """A BERT and its tokenizer, in a directory."""
    torch.manual_seed(torch.initial_seed())
    directory.mkdir(parents=True, exist_ok=True)
    kind(transformers.BertConfig(**{**SIZES, **config})).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    options = tokenizer or {}
    transformers.BertTokenizer(str(directory / "vocab.txt"), **options).save_pretrained(directory)
    return directory


def sentence_transformer(tmp_path, *modules, tokenizer=None, transformer=None, **options):
    """(theirs, the directory it was saved to)."""
    base = bert(tmp_path / "base", tokenizer)
    theirs = SentenceTransformer(
        modules=[Transformer(str(base), **(transformer or {})), *modules], device="cpu", **options
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    return theirs, tmp_path / "saved"


def cross_encoder(tmp_path, num_labels=1, **options):
    kind = transformers.BertForSequenceClassification
    base = bert(tmp_path / "base", kind=kind, num_labels=num_labels)
    theirs = CrossEncoder(str(base), device="cpu", **options)
    theirs.save_pretrained(str(tmp_path / "saved"))
    return theirs, tmp_path / "saved"
