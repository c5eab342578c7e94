"""The checkpoint's tokenizer, and batches of similar length."""

from pathlib import Path
from typing import NamedTuple

from bert_fast.embeddings.settings import read_json
from bert_fast.extras import missing
from bert_fast.files import CheckpointError

VOCABULARIES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip
BERTS = "BertTokenizer", "BertTokenizerFast"
UNBOUNDED = int(1e30)  # transformers' model_max_length where none is set


def load_tokenizer(directory):
    """The checkpoint's tokenizer, of the library tokenizers.

    Where there is a tokenizer_config.json it is transformers' AutoTokenizer's (that file decides
    what tokenizer.json also says: lower case, accents, Chinese characters, added tokens), else
    tokenizer.json's as it stands, else BERT's WordPiece over vocab.txt. Without transformers the
    settings of a BERT are obeyed here, and other tokenizers are refused.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    return load_tokenizer_and_settings(directory)[0]


class TokenizerSettings(NamedTuple):
    """What a tokenizer's files say beside how texts become tokens."""

    limit: int = UNBOUNDED  # tokens of the longest input
    truncation_side: str = "right"
    padding_side: str = "right"
    types: bool = True  # whether the model is given token_type_ids


def load_tokenizer_and_settings(directory):
    """:func:`load_tokenizer`, and its :class:`TokenizerSettings`."""
    directory = Path(directory)
    whole, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
    settings = read_json(directory / "tokenizer_config.json")
    named = read_json(directory / "config.json").get("tokenizer_class")
    if not settings and named not in (None, *BERTS):
        settings = {"tokenizer_class": named}
    # Of a directory without a vocabulary transformers makes a tokenizer of five tokens.
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(f"{directory} has neither tokenizer.json nor vocab.txt")
    try:
        if settings and missing("transformers") is None:
            return _transformers(directory, whole)
        tokenizer = _own(directory, whole, vocabulary, settings)
        return tokenizer, _settings(settings, tokenizer.truncation)
    except CheckpointError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{directory}: the tokenizer cannot be read: {error}") from error


def _transformers(directory, whole):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    if whole.is_file():
        Tokenizer.from_file(str(whole))  # that it can be read; AutoTokenizer makes do without
    auto = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if not getattr(auto, "is_fast", False):
        raise CheckpointError(f"{directory}: {type(auto).__name__} is no fast tokenizer")
    said = ("model_max_length", "truncation_side", "padding_side", "model_input_names")
    return auto.backend_tokenizer, _settings({name: getattr(auto, name) for name in said}, None)


def _settings(said, truncation):
    side = said.get("truncation_side") or str((truncation or {}).get("direction", "right")).lower()
    names = said.get("model_input_names") or ("token_type_ids",)
    return TokenizerSettings(
        int(min(said.get("model_max_length") or UNBOUNDED, UNBOUNDED)), side,
        said.get("padding_side") or "right", "token_type_ids" in names,
    )  # fmt: skip


def _own(directory, whole, vocabulary, settings):
    from tokenizers import Tokenizer, normalizers
    from tokenizers.implementations import BertWordPieceTokenizer

    if not whole.is_file() and not vocabulary.is_file():
        raise CheckpointError(f"{directory}: its vocabulary needs transformers; {_without()}")
    kind = settings.get("tokenizer_class", "BertTokenizer")
    if kind not in BERTS:
        raise CheckpointError(f"{directory}: its {kind} needs transformers; {_without()}")
    lower = settings.get("do_lower_case", True)
    accents, chinese = settings.get("strip_accents"), settings.get("tokenize_chinese_chars", True)
    if whole.is_file():
        tokenizer = Tokenizer.from_file(str(whole))
        if settings:
            tokenizer.normalizer = normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=chinese, strip_accents=accents,
                lowercase=lower,
            )  # fmt: skip
        return tokenizer
    if settings.get("added_tokens_decoder") or (directory / "added_tokens.json").is_file():
        raise CheckpointError(f"{directory}: its added tokens need transformers; {_without()}")
    return BertWordPieceTokenizer(
        str(vocabulary), lowercase=lower, strip_accents=accents, handle_chinese_chars=chinese
    )._tokenizer  # the library's own class, which takes a side to cut


def _without():
    return missing("transformers") or "which is here, but finds no tokenizer_config.json"


def lower_case(tokenizer):
    """Puts lower-casing in front of a tokenizer that has none, as sentence-transformers does where
    its own files say do_lower_case."""
    from tokenizers import normalizers

    given = tokenizer.normalizer
    if given is None:
        tokenizer.normalizer = normalizers.Lowercase()
    elif "Lowercase()" not in repr(given):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), given])


def batches_by_tokens(lengths, budget, most=None, order=None):
    """Indices in batches, each of at most ``budget`` tokens or one sequence, and of at most
    ``most`` sequences; in ``order``, or by default by length, so that a batch's are similar."""
    if order is None:
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    batch, used = [], 0
    for i in order:
        if batch and (used + lengths[i] > budget or len(batch) == most):
            yield batch
            batch, used = [], 0
        batch.append(i)
        used += lengths[i]
    if batch:
        yield batch


class Tokenizer:
    """The tokenizer of a loaded model, by the names of transformers': what is set by hand holds.
    Everything else is that of the library tokenizers.

    Args:
        backend: a ``tokenizers.Tokenizer``.
        positions: tokens of the longest text that the model takes.
        pads_left: whether texts padded on the left keep their positions.
        values: of ``padding_side``, ``truncation_side`` and ``model_max_length``.
    """

    def __init__(self, backend, positions, pads_left, **values):
        self.__dict__.update(backend=backend, positions=positions, pads_left=pads_left)
        for name, value in values.items():
            setattr(self, name, value)
        backend.no_padding()

    def __getattr__(self, name):
        if name.startswith("__") or "backend" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.backend, name)

    def __setattr__(self, name, value):
        if name in ("padding_side", "truncation_side"):
            if value not in ("left", "right"):
                raise ValueError(f"{name} must be 'left' or 'right', not {value!r}")
            if name == "padding_side" and value == "left" and not self.pads_left:
                raise ValueError(
                    "the tokenizer's padding_side is 'left', by which a text's positions would "
                    "depend on its batch; only 'right' is supported"
                )
        elif name == "model_max_length":
            if not 1 <= value <= self.positions:
                raise ValueError(f"max_seq_length must be 1 to {self.positions}, not {value}")
        elif hasattr(type(self.backend), name):
            setattr(self.backend, name, value)
            return
        else:
            raise AttributeError(f"a tokenizer has no {name} that could be set")
        self.__dict__[name] = value

    def encodings(self, texts):
        """Of texts, or of pairs, cut to ``model_max_length``."""
        self.backend.enable_truncation(self.model_max_length, direction=self.truncation_side)
        return self.backend.encode_batch(texts)
