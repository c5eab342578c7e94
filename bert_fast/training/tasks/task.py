"""What BERT is fine-tuned for: how each task reads its rows, labels tokens or texts, and is judged.

Rows are CSV or TSV (with a header), JSONL, CoNLL (tagging: a word and its tag a line, blank lines
between sentences), SQuAD's JSON (question answering) or two aligned texts (translation). A row that
cannot be used is named by file and line.
"""

import collections
import csv
import dataclasses
import importlib.util
import json
import re
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bert_fast.embeddings.tokenizer import load_tokenizer
from bert_fast.files import atomic_path
from bert_fast.models import encoder_decoder, heads
from bert_fast.models.bert import BertConfig
from bert_fast.ops.cross_entropy import IGNORED
from bert_fast.training.corpus import SPECIAL

ROW_FORMATS = (".csv", ".tsv", ".jsonl")
SINGLE = "single_label_classification"


class DataError(ValueError):
    """A row that cannot be used; the message names the file and the line."""


class Example(NamedTuple):
    """text: a text, a list of words (tagging), or a question. pair: the second text, or the
    context. label: as the file has it; None where there is none."""

    text: object
    pair: str | None = None
    label: object = None


class Feature(NamedTuple):
    """Tokens of an example, or of a window of it. label: numbers. encoding: the tokenizer's."""

    ids: list
    types: list
    label: object
    example: int
    encoding: object


def read_rows(path):
    """(line number, {column: value}) for each row of a .csv, .tsv or .jsonl file.

    Raises:
        DataError: naming file and line.
    """
    path = Path(path)
    if path.suffix not in ROW_FORMATS:
        raise DataError(f"{path}: the name must end in .csv, .tsv or .jsonl")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from (_jsonl if path.suffix == ".jsonl" else _csv)(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from error


def _jsonl(path, file):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: must be a JSON object")
        yield number, row


def _csv(path, file):
    reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.line_num}: not the header's {len(reader.fieldnames)} columns"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error


def _lines(path):
    """Of a text file; a line ends at a newline and nowhere else."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from error


def _text(path, number, row, name="text", needed=True):
    value = row.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}:{number}: {name!r} must be a text, not {value!r}")
    return value


class Task:
    """``labels``: the names in the order of their numbers, once :meth:`fit` has seen the training
    rows, or None where the task has none."""

    model = heads.BertForSequenceClassification
    problem_type = None
    labels = None
    epochs, lr = 3, 5e-5  # Devlin et al. 2019, appendix A.3

    def configure(self, settings):
        """Takes what a run's settings say of this task alone."""

    def read(self, path, labelled=True):
        """The examples of a file.

        Raises:
            DataError: naming file and line.
        """
        examples = [
            Example(
                _text(path, number, row), _text(path, number, row, "text_b", needed=False),
                self.label(path, number, row) if labelled else None,
            )
            for number, row in read_rows(path)
        ]  # fmt: skip
        if not examples:
            raise DataError(f"{path} has no rows")
        return examples

    def fit(self, examples):
        self.labels = sorted({example.label for example in examples})

    def number(self, label):
        """Of a label's name."""
        if label not in self.labels:
            known = ", ".join(map(str, self.labels[:8]))
            raise DataError(f"the label {label!r} is not one of the training rows': {known}")
        return self.labels.index(label)

    def check(self, examples):
        """Raises a DataError where rows to judge by have labels that training lacks."""
        for example in examples:
            self.target(example)

    def new_model(self, directory):
        """The model to be trained: a checkpoint's encoder, a new head."""
        changes = {"problem_type": self.problem_type}
        if self.labels is not None:
            changes["id2label"] = dict(enumerate(map(str, self.labels)))
        return self.model.from_pretrained(directory, torch.float32, **changes)

    def save(self, directory):
        """What belongs to a fine-tuned model beside its weights and its tokenizer."""

    def load(self, directory, config):
        """Takes that back, and the model's config."""
        if config.id2label is not None:
            self.labels = list(config.id2label.values())

    def tokens(self, feature):
        """How many a feature adds to a batch."""
        return len(feature.ids)

    def features(self, tokenizer, examples, max_length):
        tokenizer.enable_truncation(max_length)
        pairs = [e.text if e.pair is None else (e.text, e.pair) for e in examples]
        return [
            Feature(encoding.ids, encoding.type_ids, self.target(examples[i]), i, encoding)
            for i, encoding in enumerate(tokenizer.encode_batch(pairs))
        ]

    def target(self, example):
        return None if example.label is None else self.number(example.label)

    def label_tensors(self, features, seqlen):
        """The model's labels for a batch."""
        return {"labels": torch.tensor([feature.label for feature in features])}

    def predictions(self, examples, features, outputs):
        """A prediction an example: (label, {label: score})."""
        found = []
        for (logits,) in outputs:
            scores = torch.softmax(logits, -1).tolist()
            best = int(np.argmax(scores))
            found.append((self.labels[best], dict(zip(self.labels, scores, strict=True))))
        return found

    def run(self, model, inputs, lengths):
        """A batch's results, one a feature of so many tokens."""
        return self.outputs(model(**inputs), lengths)

    def outputs(self, out, lengths):
        """A batch's result, cut up by feature."""
        return [(logits,) for logits in out.logits.float().cpu()]

    def judge(self, examples, predictions):
        """Figures of predictions against the examples' labels, the most important first."""
        truth, guess = [e.label for e in examples], [p[0] for p in predictions]
        return _accuracy_and_f1(truth, guess)

    def row(self, prediction):
        """A prediction as a JSON object."""
        label, scores = prediction
        return {"label": label, "scores": scores}

    def draw(self, axes, examples, predictions):
        _confusion(axes, self.labels, [e.label for e in examples], [p[0] for p in predictions])


class Classification(Task):
    """A label a text: columns ``text``, ``label``, and ``text_b`` for pairs."""

    problem_type = SINGLE

    def label(self, path, number, row):
        value = row.get("label")
        if value is None or value == "" or isinstance(value, (list, dict)):
            raise DataError(f"{path}:{number}: 'label' must be a name or a number, not {value!r}")
        return str(value)


class Sentiment(Classification):
    """A classification of short texts, by whole reviews' usual settings."""

    epochs, lr = 2, 3e-5


class MultiLabel(Task):
    """Any number of labels a text: column ``labels``, a list (JSONL) or names parted by ``|``."""

    problem_type = "multi_label_classification"

    def label(self, path, number, row):
        value = row.get("labels")
        if isinstance(value, str):
            value = [name for name in value.split("|") if name]
        if not isinstance(value, list):
            raise DataError(f"{path}:{number}: 'labels' must be a list, not {value!r}")
        return [str(name) for name in value]

    def fit(self, examples):
        self.labels = sorted({name for example in examples for name in example.label})

    def target(self, example):
        if example.label is None:
            return None
        target = [0.0] * len(self.labels)
        for name in example.label:
            target[self.number(name)] = 1.0
        return target

    def predictions(self, examples, features, outputs):
        found = []
        for (logits,) in outputs:
            scores = dict(zip(self.labels, torch.sigmoid(logits).tolist(), strict=True))
            found.append(([name for name, score in scores.items() if score > 0.5], scores))
        return found

    def judge(self, examples, predictions):
        truth = np.array([[n in e.label for n in self.labels] for e in examples])
        guess = np.array([[n in p[0] for n in self.labels] for p in predictions])
        right, wrong = (truth & guess).sum(0), (truth ^ guess).sum(0)
        f1 = 2 * right / np.maximum(2 * right + wrong, 1)
        micro = 2 * right.sum() / max(2 * right.sum() + wrong.sum(), 1)
        return {"f1_micro": float(micro), "f1_macro": float(f1.mean()),
                "exact": float((truth == guess).all(1).mean())}  # fmt: skip

    def row(self, prediction):
        return {"labels": prediction[0], "scores": prediction[1]}

    def draw(self, axes, examples, predictions):
        truth = np.array([[n in e.label for n in self.labels] for e in examples])
        guess = np.array([[n in p[0] for n in self.labels] for p in predictions])
        right, wrong = (truth & guess).sum(0), (truth ^ guess).sum(0)
        axes.barh(self.labels, 2 * right / np.maximum(2 * right + wrong, 1))
        axes.set(xlabel="F1", xlim=(0, 1))


class Regression(Task):
    """A number a text: columns ``text``, ``label``, and ``text_b`` for pairs."""

    problem_type = "regression"

    def label(self, path, number, row):
        try:
            value = float(row.get("label"))
        except (TypeError, ValueError):
            value = np.nan
        if not np.isfinite(value):
            raise DataError(f"{path}:{number}: 'label' must be a number, not {row.get('label')!r}")
        return value

    def fit(self, examples):
        self.labels = ["score"]

    def target(self, example):
        return example.label

    def predictions(self, examples, features, outputs):
        return [logits.item() for (logits,) in outputs]

    def judge(self, examples, predictions):
        truth, guess = np.array([e.label for e in examples]), np.array(predictions)
        return {
            "pearson": _correlation(truth, guess),
            "spearman": _correlation(_ranks(truth), _ranks(guess)),
            "mean_squared_error": float(np.square(truth - guess).mean()),
        }

    def row(self, prediction):
        return {"score": prediction}

    def draw(self, axes, examples, predictions):
        axes.plot([e.label for e in examples], predictions, ".", ms=3)
        axes.set(xlabel="label", ylabel="prediction")


class Tagging(Task):
    """A tag a word: CoNLL's form, or JSONL with ``words`` and ``tags``. A word's first token
    carries its tag. Tags B-x and I-x are judged as entities, others a word at a time."""

    model = heads.BertForTokenClassification

    def read(self, path, labelled=True):
        path = Path(path)
        examples = (self._jsonl if path.suffix == ".jsonl" else self._conll)(path, labelled)
        if not examples:
            raise DataError(f"{path} has no rows")
        return examples

    def _jsonl(self, path, labelled):
        examples = []
        for number, row in read_rows(path):
            words, tags = row.get("words"), row.get("tags") if labelled else None
            for name, value in (("words", words), ("tags", tags)):
                if name == "tags" and not labelled:
                    continue
                if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                    raise DataError(f"{path}:{number}: {name!r} must be a list of texts")
            if labelled and len(words) != len(tags):
                raise DataError(f"{path}:{number}: {len(words)} words, but {len(tags)} tags")
            if words:
                examples.append(Example(words, None, tags))
        return examples

    def _conll(self, path, labelled):
        examples, words, tags = [], [], []
        for number, line in enumerate([*_lines(path), ""], 1):
            columns = line.split()
            if columns and labelled and len(columns) < 2:
                raise DataError(f"{path}:{number}: a word and its tag expected, not {line!r}")
            if columns:
                words.append(columns[0])
                tags.append(columns[-1])
            elif words:
                examples.append(Example(words, None, tags if labelled else None))
                words, tags = [], []
        return examples

    def fit(self, examples):
        self.labels = sorted({tag for example in examples for tag in example.label})

    def features(self, tokenizer, examples, max_length):
        tokenizer.enable_truncation(max_length)
        encodings = tokenizer.encode_batch([e.text for e in examples], is_pretokenized=True)
        return [
            Feature(e.ids, e.type_ids, self._target(examples[i], e), i, e)
            for i, e in enumerate(encodings)
        ]

    def check(self, examples):
        """A tag that training never saw cannot be right, but is no reason to stop."""

    def _target(self, example, encoding):
        if example.label is None:
            return None
        target = [IGNORED] * len(encoding.ids)
        for place, word in _first_tokens(encoding):
            tag = example.label[word]
            target[place] = self.labels.index(tag) if tag in self.labels else IGNORED
        return target

    def label_tensors(self, features, seqlen):
        rows = [f.label + [IGNORED] * (seqlen - len(f.label)) for f in features]
        return {"labels": torch.tensor(rows)}

    def outputs(self, out, lengths):
        best = out.logits.argmax(-1).cpu()
        return [(row[:length],) for row, length in zip(best, lengths, strict=True)]

    def predictions(self, examples, features, outputs):
        """A tag a word: O, or the first of all tags, for words that were cut off."""
        found = []
        for feature, (best,) in zip(features, outputs, strict=True):
            words = examples[feature.example].text
            tags = ["O" if "O" in self.labels else self.labels[0]] * len(words)
            for place, word in _first_tokens(feature.encoding):
                tags[word] = self.labels[best[place]]
            found.append(tags)
        return found

    def judge(self, examples, predictions):
        truth = [tag for example in examples for tag in example.label]
        guess = [tag for tags in predictions for tag in tags]
        figures = {"accuracy": float(np.mean([a == b for a, b in zip(truth, guess, strict=True)]))}
        if any(tag.startswith("B-") for tag in self.labels):
            wanted = [_entities(example.label) for example in examples]
            found = [_entities(tags) for tags in predictions]
            right = sum(len(a & b) for a, b in zip(wanted, found, strict=True))
            total = sum(map(len, wanted)) + sum(map(len, found))
            figures = {"entity_f1": 2 * right / max(total, 1), **figures}
        return figures

    def row(self, prediction):
        return {"tags": prediction}

    def draw(self, axes, examples, predictions):
        pairs = [(e.label, tags) for e, tags in zip(examples, predictions, strict=True)]
        truth, guess = ([tag for pair in pairs for tag in pair[i]] for i in (0, 1))
        common = [tag for tag, _ in collections.Counter(truth).most_common(20)]
        _confusion(axes, common, truth, guess)


def _first_tokens(encoding):
    """(place, word) of the first token of each word."""
    previous = None
    for place, word in enumerate(encoding.word_ids):
        if word is not None and word != previous:
            yield place, word
        previous = word


def _entities(tags):
    """{(begin, end, kind)} of tags B-x, I-x, O; an I-x without its B-x begins one, as in CoNLL's
    own evaluation."""
    found, begin, kind = set(), None, None
    for i, tag in enumerate([*tags, "O"]):
        head, _, name = tag.partition("-")
        if begin is not None and (head != "I" or name != kind):
            found.add((begin, i, kind))
            begin = None
        if head in ("B", "I") and begin is None:
            begin, kind = i, name
    return found


class QuestionAnswering(Task):
    """SQuAD's JSON, with questions that have no answer (version 2) or without. Long contexts are
    read in windows that overlap by a third."""

    model = heads.BertForQuestionAnswering
    longest = 30  # tokens of an answer

    def read(self, path, labelled=True):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            articles = content["data"]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not SQuAD's JSON: {error!r}") from error
        examples = []
        for a, article in enumerate(articles):
            for p, paragraph in enumerate(article.get("paragraphs", ())):
                where = f"{path}: data[{a}].paragraphs[{p}]"
                context = paragraph.get("context")
                if not isinstance(context, str) or not context.strip():
                    raise DataError(f"{where}: 'context' must be a text")
                for q, question in enumerate(paragraph.get("qas", ())):
                    examples.append(_question(f"{where}.qas[{q}]", question, context, labelled))
        if not examples:
            raise DataError(f"{path} has no questions")
        return examples

    def fit(self, examples):
        """There are no labels to learn."""

    def check(self, examples):
        """And none to lack."""

    def features(self, tokenizer, examples, max_length):
        tokenizer.enable_truncation(max_length, stride=max_length // 3, strategy="only_second")
        features = []
        for i, whole in enumerate(tokenizer.encode_batch([(e.text, e.pair) for e in examples])):
            for window in (whole, *whole.overflowing):
                label = _span(window, examples[i].label)
                features.append(Feature(window.ids, window.type_ids, label, i, window))
        return features

    def label_tensors(self, features, seqlen):
        starts, ends = zip(*(feature.label for feature in features), strict=True)
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}

    def outputs(self, out, lengths):
        start, end = out.start_logits.float().cpu(), out.end_logits.float().cpu()
        return [(s[:n], e[:n]) for s, e, n in zip(start, end, lengths, strict=True)]

    def predictions(self, examples, features, outputs):
        """(answer, its score above that of no answer); the answer is "" where none is better."""
        best = [(-np.inf, "") for _ in examples]
        nothing = [np.inf] * len(examples)
        for feature, (start, end) in zip(features, outputs, strict=True):
            i, encoding = feature.example, feature.encoding
            nothing[i] = min(nothing[i], float(start[0] + end[0]))
            inside = [place for place, s in enumerate(encoding.sequence_ids) if s == 1]
            if not inside:
                continue
            first, last = inside[0], inside[-1] + 1
            scores = start[first:last, None] + end[None, first:last]
            allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(self.longest - 1)
            score, place = scores.masked_fill(~allowed, -torch.inf).view(-1).max(0)
            if score > best[i][0]:
                a, b = divmod(int(place), last - first)
                begin, finish = encoding.offsets[first + a][0], encoding.offsets[first + b][1]
                best[i] = (float(score), examples[i].pair[begin:finish])
        return [
            (answer if score > none else "", score - none)
            for (score, answer), none in zip(best, nothing, strict=True)
        ]

    def judge(self, examples, predictions):
        """SQuAD's own: the best over a question's right answers."""
        exact, f1 = [], []
        for example, (found, _) in zip(examples, predictions, strict=True):
            answers = [text for text, _ in example.label] or [""]
            exact.append(max(_normal(found) == _normal(a) for a in answers))
            f1.append(max(_overlap(_normal(found).split(), _normal(a).split()) for a in answers))
        return {"f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}

    def row(self, prediction):
        return {"answer": prediction[0], "score": prediction[1]}

    def draw(self, axes, examples, predictions):
        scores = [self.judge([e], [p])["f1"] for e, p in zip(examples, predictions, strict=True)]
        axes.hist(scores, bins=20, range=(0, 1))
        axes.set(xlabel="F1 of a question", ylabel="questions")


def _question(where, question, context, labelled):
    if not isinstance(question.get("question"), str) or not question["question"].strip():
        raise DataError(f"{where}: 'question' must be a text")
    if not labelled:
        return Example(question["question"], context)
    answers = []
    for answer in [] if question.get("is_impossible") else question.get("answers", []):
        text, begin = answer.get("text"), answer.get("answer_start")
        if not text or not isinstance(begin, int) or context[begin : begin + len(text)] != text:
            raise DataError(f"{where}: the context has no {text!r} at answer_start {begin!r}")
        answers.append((text, begin))
    return Example(question["question"], context, answers)


def _span(window, answers):
    """First and last token of the first answer, or [CLS] twice where this window has none."""
    if not answers:
        return 0, 0
    text, begin = answers[0]
    finish = begin + len(text)
    inside = [
        place
        for place, (a, b) in enumerate(window.offsets)
        if window.sequence_ids[place] == 1 and a < finish and b > begin
    ]
    whole = inside and window.offsets[inside[0]][0] <= begin
    if not whole or window.offsets[inside[-1]][1] < finish:
        return 0, 0
    return inside[0], inside[-1]


def _normal(text):
    """As SQuAD's evaluation compares answers: no case, punctuation, articles or extra spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _overlap(found, wanted):
    if not found or not wanted:
        return float(found == wanted)
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


class Translation(Task):
    """A text for a text: two aligned files, a text a line, or columns ``text`` and ``target``. The
    encoder is a checkpoint's; the decoder and its byte-level BPE vocabulary are new."""

    model = encoder_decoder.EncoderDecoderModel
    epochs, lr = 10, 5e-4  # a decoder that starts from nothing; chosen on LibreOffice's help
    decoder_layers, target_vocab, beams = 3, 8192, 4

    def configure(self, settings):
        for name in ("decoder_layers", "target_vocab", "beams"):
            setattr(self, name, getattr(settings, name))
        if importlib.util.find_spec("sacrebleu") is None:  # before any time is spent
            raise ImportError("translation is judged by sacrebleu: pip install sacrebleu")

    def label(self, path, number, row):
        return _text(path, number, row, "target")

    def read_aligned(self, path, targets):
        """Examples of two files, a text a line.

        Raises:
            DataError: naming the file and the line that has no text, or files that do not match.
        """
        sides = []
        for side in map(Path, (path, targets)):
            sides.append(_lines(side))
            for number, line in enumerate(sides[-1], 1):
                if not line.strip():
                    raise DataError(f"{side}:{number}: there is no text")
        if len(sides[0]) != len(sides[1]) or not sides[0]:
            raise DataError(
                f"{path} has {len(sides[0])} lines, {targets} {len(sides[1])}: they must be aligned"
            )
        return [Example(text, None, target) for text, target in zip(*sides, strict=True)]

    def fit(self, examples):
        from tokenizers import ByteLevelBPETokenizer
        from tokenizers.processors import TemplateProcessing

        bpe = ByteLevelBPETokenizer(add_prefix_space=True)
        bpe.train_from_iterator(
            (example.label for example in examples), vocab_size=self.target_vocab,
            special_tokens=SPECIAL, show_progress=False,
        )  # fmt: skip
        end = bpe.token_to_id("[SEP]")
        bpe.post_processor = TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", end)])
        self.target_tokenizer = bpe._tokenizer

    def check(self, examples):
        """Any text can be written."""

    def new_model(self, directory):
        directory, word = Path(directory), self.target_tokenizer.token_to_id
        sizes = BertConfig.from_json(directory / "config.json")
        changes = {
            "vocab_size": self.target_tokenizer.get_vocab_size(),
            "num_hidden_layers": self.decoder_layers, "pad_token_id": word("[PAD]"),
        }  # fmt: skip
        return self.model.from_encoder_pretrained(
            directory, dataclasses.replace(sizes, **changes), torch.float32,
            decoder_start_token_id=word("[CLS]"), eos_token_id=word("[SEP]"),
            pad_token_id=word("[PAD]"),
        )  # fmt: skip

    def save(self, directory):
        directory = Path(directory) / "target"
        directory.mkdir(exist_ok=True)
        self.target_tokenizer.no_truncation()
        with atomic_path(directory / "tokenizer.json") as path:
            self.target_tokenizer.save(str(path))

    def load(self, directory, config):
        self.target_tokenizer = load_tokenizer(Path(directory) / "target")

    def features(self, tokenizer, examples, max_length):
        tokenizer.enable_truncation(max_length)
        self.target_tokenizer.enable_truncation(max_length)
        labels = [None] * len(examples)
        if examples and examples[0].label is not None:
            labels = self.target_tokenizer.encode_batch([e.label for e in examples])
            labels = [encoding.ids for encoding in labels]
        return [
            Feature(encoding.ids, encoding.type_ids, labels[i], i, encoding)
            for i, encoding in enumerate(tokenizer.encode_batch([e.text for e in examples]))
        ]

    def tokens(self, feature):
        return len(feature.ids) + len(feature.label)

    def label_tensors(self, features, seqlen):
        lengths = torch.tensor([len(feature.label) for feature in features])
        rows = [torch.tensor(feature.label) for feature in features]
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        mask = torch.arange(labels.shape[1]) < lengths[:, None]
        return {"labels": labels, "decoder_attention_mask": mask}

    def run(self, model, inputs, lengths):
        room = min(model.config.decoder.max_position_embeddings, 2 * max(lengths) + 16)
        found = model.generate(**inputs, num_beams=self.beams, max_new_tokens=room)
        return found[:, 1:].tolist()

    def predictions(self, examples, features, outputs):
        return [text.strip() for text in self.target_tokenizer.decode_batch(outputs)]

    def judge(self, examples, predictions):
        """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of the whole; and the BLEU of giving
        the source back, which says what names and numbers alone are worth."""
        import sacrebleu

        targets = [[example.label for example in examples]]
        texts = [example.text for example in examples]
        return {
            "bleu": sacrebleu.corpus_bleu(predictions, targets).score,
            "chrf": sacrebleu.corpus_chrf(predictions, targets).score,
            "bleu_of_the_source": sacrebleu.corpus_bleu(texts, targets).score,
        }

    def row(self, prediction):
        return {"translation": prediction}

    def draw(self, axes, examples, predictions):
        import sacrebleu

        scores = [
            sacrebleu.sentence_chrf(p, [e.label]).score
            for e, p in zip(examples, predictions, strict=True)
        ]
        axes.hist(scores, bins=20, range=(0, 100))
        axes.set(xlabel="chrF of a text", ylabel="texts")


def _accuracy_and_f1(truth, guess):
    names = sorted(set(truth) | set(guess))
    f1 = []
    for name in names:
        right = sum(a == b == name for a, b in zip(truth, guess, strict=True))
        f1.append(2 * right / max(truth.count(name) + guess.count(name), 1))
    accuracy = np.mean([a == b for a, b in zip(truth, guess, strict=True)])
    return {"accuracy": float(accuracy), "f1_macro": float(np.mean(f1))}


def _correlation(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-30))


def _ranks(values):
    """Ties get the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _confusion(axes, labels, truth, guess):
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)))
    for a, b in zip(truth, guess, strict=True):
        if a in place and b in place:
            counts[place[a], place[b]] += 1
    axes.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="predicted", ylabel="true", xticks=range(len(labels)), yticks=range(len(labels))
    )
    axes.set_xticklabels(labels, rotation=60, ha="right")
    axes.set_yticklabels(labels)
    if len(labels) <= 12:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, int(count), ha="center", va="center")


TASKS = {
    "classification": Classification,
    "sentiment": Sentiment,
    "multi-label": MultiLabel,
    "regression": Regression,
    "ner": Tagging,
    "qa": QuestionAnswering,
    "translation": Translation,
}
