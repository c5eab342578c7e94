"""Plain text to pre-training batches (Devlin et al. 2019, section 3.1 and appendix A.2).

A text file holds one sentence per line, and a blank line between documents. What an epoch
consists of follows from (seed, epoch) alone: its pairs (or sequences, where masked words are all
that is learned), their order, and which tokens are masked.
"""

import array
import itertools
import operator
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from bert_fast.embeddings.tokenizer import load_tokenizer
from bert_fast.files import atomic_path
from bert_fast.ops.cross_entropy import IGNORED
from bert_fast.text import iter_lines
from bert_fast.training.tokens import CHUNK, Tokens, tokenize, write_tokens

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def iter_sentences(paths):
    """(number of the document, sentence), one after another.

    Raises:
        ValueError: naming the file that is not UTF-8.
    """
    number = -1
    for path in paths:
        begins = True
        for line in map(str.strip, iter_lines(path)):
            if line:
                number += begins
                yield number, line
            begins = not line


def read_documents(paths, least=2):
    """Documents, each a list of sentences.

    Raises:
        ValueError: naming the file that is not UTF-8, or that there are not ``least`` documents.
    """
    numbered = itertools.groupby(iter_sentences(paths), key=operator.itemgetter(0))
    documents = [[sentence for _, sentence in some] for _, some in numbered]
    _enough(paths, len(documents), least)
    return documents


def check_documents(paths, least):
    """As :func:`read_documents`, of which no more is read than is needed to see it."""
    count = 0
    for number, _ in iter_sentences(paths):
        count = number + 1
        if count == least:
            break
    _enough(paths, count, least)


def _enough(paths, count, least):
    if count >= least:
        return
    names = ", ".join(map(str, paths))
    if not count:
        raise ValueError(f"{names}: no text")
    raise ValueError(
        f"{names}: {count} document; next-sentence prediction needs two at least, with a blank "
        "line between documents"
    )


def train_tokenizer(documents, vocab_size, lowercase=True):
    """A WordPiece vocabulary of these texts, as BERT tokenizes: a ``tokenizers.Tokenizer``."""
    from tokenizers.implementations import BertWordPieceTokenizer

    wordpiece = BertWordPieceTokenizer(lowercase=lowercase)
    sentences = (sentence for document in documents for sentence in document)
    wordpiece.train_from_iterator(
        sentences, vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False
    )
    # By name; which of two words that are equally frequent gets in may change from run to run.
    words = sorted(set(wordpiece.get_vocab()) - set(SPECIAL))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    return BertWordPieceTokenizer(vocabulary, lowercase=lowercase)._tokenizer


def special_ids(tokenizer):
    """Of [PAD], [UNK], [CLS], [SEP], [MASK].

    Raises:
        ValueError: naming those that the tokenizer does not have.
    """
    missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}")
    return [tokenizer.token_to_id(token) for token in SPECIAL]


def prepare(out, texts, resume, least, source, vocab_size):
    """Writes tokenizer.json (of ``source``, or trained on the texts) and tokens/ into ``out``; a
    run that is resumed keeps what is there.

    Raises:
        ValueError: naming what is missing, or has changed.
    """
    check_documents(texts, least)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "tokenizer.json"
    if not (resume and kept.is_file()):
        if source:
            tokenizer = load_tokenizer(source)
        else:
            sentences = ([sentence] for _, sentence in iter_sentences(texts))
            tokenizer = train_tokenizer(sentences, vocab_size)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        with atomic_path(kept) as path:
            tokenizer.save(str(path))
    tokenizer = load_tokenizer(out)
    special_ids(tokenizer)  # before the hours that a large text takes
    write_tokens(out / "tokens", texts, kept, iter_sentences(texts), tokenizer, resume)


class Corpus:
    """Documents as :class:`bert_fast.training.tokens.Tokens`, and the tokenizer that made them."""

    def __init__(self, documents, tokenizer):
        """documents: lists of sentences, or their Tokens."""
        special = special_ids(tokenizer)
        self.pad, _, self.cls, self.sep, self.mask = special
        vocabulary = tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.ordinary = np.array(sorted(set(vocabulary.values()) - set(special)))
        self.continues = np.zeros(self.vocab_size, bool)
        for token, i in vocabulary.items():
            self.continues[i] = token.startswith("##")
        if not isinstance(documents, Tokens):
            numbered = ((i, sentence) for i, some in enumerate(documents) for sentence in some)
            documents = tokenize(numbered, tokenizer)
        self.ids, self.sentences, self.documents = documents

    def split(self, share, least=2):
        """Numbers of the documents to train on, and of those held out: the last ``share``. Each
        part has ``least`` documents (a next sentence from elsewhere needs two); where there are too
        few for both, none is held out, with a warning."""
        count = len(self.documents) - 1
        held_out = min(max(round(count * share), least), count - least) if share else 0
        if share and held_out < least:
            held_out = 0
            few = "1 document is" if count == 1 else f"{count} documents are"
            warnings.warn(f"{few} too few to hold any out: {2 * least} are needed", stacklevel=2)
        return np.arange(count - held_out), np.arange(count - held_out, count)

    def counts(self, documents, part=0, parts=1):
        """How often each token is there in documents that follow one another: int64 (vocab_size,).
        ``part`` of as many ``parts``: of that share of their tokens, and no other is read."""
        begin, end = self.sentences[self.documents[[documents[0], documents[-1] + 1]]].tolist()
        first, last = (begin + (end - begin) * i // parts for i in (part, part + 1))
        counts = np.zeros(self.vocab_size, np.int64)
        for i in range(first, last, CHUNK):
            counts += np.bincount(self.ids[i : min(i + CHUNK, last)], minlength=self.vocab_size)
        return counts

    def pairs(self, documents, max_length, rng):
        """One epoch's pairs: int64 (pairs, 5), each a's begin and end in ids, b's, and whether b is
        from elsewhere (1) or follows a (0), by the toss of a coin.

        Sentences of a document are gathered until a sequence is full (one in ten is cut shorter,
        as in BERT), then cut in two at random. Where b is from elsewhere, what had been gathered
        for it is used again."""
        pairs, room = array.array("q"), max_length - 3
        starts = self.sentences
        for document in rng.permutation(documents):
            sentence, end = self.documents[document], self.documents[document + 1]
            while sentence < end:
                target = int(rng.integers(2, room + 1)) if rng.random() < 0.1 else room
                last = sentence + 1
                while last < end and starts[last] - starts[sentence] < target:
                    last += 1
                cut = sentence + 1
                if last - sentence > 1:
                    cut = int(rng.integers(sentence + 1, last))
                a = [starts[sentence], starts[cut]]
                elsewhere = last - sentence == 1 or rng.random() < 0.5
                if elsewhere:
                    b, sentence = (
                        self._elsewhere(documents, document, target - a[1] + a[0], rng),
                        cut,
                    )
                else:
                    b, sentence = [starts[cut], starts[last]], last
                while (excess := a[1] - a[0] + b[1] - b[0] - target) > 0:
                    longer = a if a[1] - a[0] > b[1] - b[0] else b
                    shorter = b if longer is a else a
                    difference = longer[1] - longer[0] - (shorter[1] - shorter[0])
                    take = min(excess, max(difference, 1))
                    front = int(rng.integers(take + 1))
                    longer[0] += front
                    longer[1] -= take - front
                if a[1] > a[0] and b[1] > b[0]:
                    pairs.extend((*a, *b, int(elsewhere)))
        return np.array(pairs, np.int64).reshape(-1, 5)

    def sequences(self, documents, max_length, rng):
        """One epoch's sequences: int64 (sequences, 2), begin and end in ids. Each token is in one.
        A document that is too long for a sequence is cut, the first time at random."""
        rows, room = array.array("q"), max_length - 2
        for document in rng.permutation(documents):
            first, last = self.sentences[self.documents[document : document + 2]].tolist()
            cut = last
            if last - first > room:
                cut = first + int(rng.integers(1, room + 1))
            for begin, end in itertools.pairwise([first, *range(cut, last, room), last]):
                if end > begin:
                    rows.extend((begin, end))
        return np.array(rows, np.int64).reshape(-1, 2)

    def _elsewhere(self, documents, not_this, room, rng):
        if len(documents) < 2:
            raise ValueError("a next sentence from elsewhere needs two documents at least")
        place = int(rng.integers(len(documents) - 1))
        other = documents[place + (documents[place] >= not_this)]  # they are in order
        first, end = self.documents[other], self.documents[other + 1]
        first = last = int(rng.integers(first, end))
        while last < end and (last == first or self.sentences[last] - self.sentences[first] < room):
            last += 1
        return [self.sentences[first], self.sentences[last]]


def unigram_entropy(counts):
    """In nats a token: the loss of a model that knows how frequent each token is, and no more.
    A masked language model has learned something of context where it is below."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


@dataclass
class Batch:
    """Packed tokens. labels: -100 but at the masked. next_sentence_label: None without pairs."""

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    labels: torch.Tensor
    next_sentence_label: torch.Tensor | None
    cu_seqlens: torch.Tensor
    max_seqlen: int

    @property
    def masked(self):
        return int((self.labels != IGNORED).sum())

    def to(self, device):
        moved = {
            name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


@dataclass
class _Sampler:
    """The batches of each epoch, of at most ``batch_tokens`` tokens.

    share: of tokens to be predicted; of them 80% become [MASK], 10% another word, 10% stay.
    whole_words: all pieces of a word are masked, or none.
    """

    corpus: Corpus
    documents: np.ndarray
    max_length: int
    batch_tokens: int
    seed: int = 0
    share: float = 0.15
    whole_words: bool = False

    def epoch(self, epoch):
        """The epoch's rows (pairs, or sequences) in order, and the batches as slices of them."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = rng.permutation(self.draw(self.documents, self.max_length, rng))
        slices, first, used = [], 0, 0
        for i, length in enumerate(self.lengths(rows)):
            if used + length > self.batch_tokens and i > first:
                slices.append(slice(first, i))
                first, used = i, 0
            used += length
        if len(rows):
            slices.append(slice(first, len(rows)))
        return rows, slices

    def batch(self, rows, some, epoch):
        """The batch of rows ``some`` (a slice) of an epoch, masked."""
        corpus, inputs, labels, types = self.corpus, [], [], []
        for number in range(some.start, some.stop):
            ids, second = self.tokens(rows[number])
            types.append((np.arange(len(ids)) >= second).astype(np.int64))
            rng = np.random.default_rng([self.seed, epoch, number])
            chosen = self._choose(ids, second, rng)
            label = np.full(len(ids), IGNORED)
            label[chosen] = ids[chosen]
            dice = rng.random(len(chosen))
            other = rng.choice(corpus.ordinary, len(chosen))
            ids[chosen] = np.where(
                dice < 0.8, corpus.mask, np.where(dice < 0.9, other, ids[chosen])
            )
            inputs.append(ids)
            labels.append(label)
        lengths = np.array([len(ids) for ids in inputs])
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return Batch(
            *(torch.from_numpy(np.concatenate(part)) for part in (inputs, types, labels)),
            self.following(rows[some]), torch.from_numpy(offsets), int(lengths.max()),
        )  # fmt: skip

    def _choose(self, ids, second, rng):
        """Places to predict: not [CLS], nor the [SEP] at the end and before ``second``."""
        places = np.arange(1, len(ids) - 1)
        places = places[places != second - 1]
        wanted = max(1, round(len(places) * self.share))
        if not self.whole_words:
            return rng.permutation(places)[:wanted]
        starts = np.flatnonzero(
            ~self.corpus.continues[ids[places]] | (np.diff(places, prepend=-1) > 1)
        )
        words = np.split(places, starts[1:]) if len(starts) else [places]
        chosen = []
        for i in rng.permutation(len(words)):
            if len(chosen) + len(words[i]) <= wanted or not chosen:
                chosen.extend(words[i])
        return np.array(chosen)


class PairSampler(_Sampler):
    """[CLS] a [SEP] b [SEP], where b follows a or does not."""

    def draw(self, *args):
        return self.corpus.pairs(*args)

    def lengths(self, pairs):
        return pairs[:, 1] - pairs[:, 0] + pairs[:, 3] - pairs[:, 2] + 3

    def tokens(self, pair):
        """Its ids, and where the second segment begins."""
        (a0, a1, b0, b1, _), corpus = pair, self.corpus
        ids = np.concatenate([
            [corpus.cls], corpus.ids[a0:a1], [corpus.sep], corpus.ids[b0:b1], [corpus.sep]
        ])  # fmt: skip
        return ids.astype(np.int64), a1 - a0 + 2

    def following(self, pairs):
        return torch.from_numpy(pairs[:, 4].copy())


class SequenceSampler(_Sampler):
    """[CLS] text [SEP]: for masked words alone."""

    def draw(self, *args):
        return self.corpus.sequences(*args)

    def lengths(self, sequences):
        return sequences[:, 1] - sequences[:, 0] + 2

    def tokens(self, sequence):
        ids = np.concatenate([
            [self.corpus.cls], self.corpus.ids[slice(*sequence)], [self.corpus.sep]
        ])  # fmt: skip
        return ids.astype(np.int64), len(ids)

    def following(self, sequences):
        return None
