"""Answers as spans of a context, as in SQuAD (Rajpurkar et al. 2016, 2018)."""

import collections
import re
import string

import numpy as np
import torch

from bert_fast.models import heads
from bert_fast.text import DataError, read_json_file
from bert_fast.training.tasks.task import Example, Feature, Task


class QuestionAnswering(Task):
    """SQuAD's JSON, with questions that have no answer (version 2) or without. Long contexts are
    read in windows that overlap by a third."""

    model = heads.BertForQuestionAnswering
    longest = 30  # tokens of an answer

    def read(self, path, labelled=True):
        try:
            articles = read_json_file(path)["data"]
        except (DataError, KeyError, TypeError) as error:
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

    def features(self, tokenizer, examples, max_length, side="right"):
        """Long contexts go by windows that overlap by a third: none is cut, on no side."""
        stride = max_length // 3
        room = max_length - stride - tokenizer.num_special_tokens_to_add(True)
        tokenizer.no_truncation()
        questions = tokenizer.encode_batch([e.text for e in examples], add_special_tokens=False)
        for example, question in zip(examples, questions, strict=True):
            if len(question.ids) >= room:
                raise DataError(
                    f"the question {example.text[:60]!r} has {len(question.ids)} tokens; with "
                    f"max_length {max_length}, {room - 1} leave room for a window of its context"
                )
        tokenizer.enable_truncation(max_length, stride=stride, strategy="only_second")
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
