"""Fine-tuning: every task from rows to a directory that Hugging Face loads; rows that are wrong."""

import dataclasses
import importlib.util
import json
import random

import numpy as np
import pytest
import torch
import transformers

import bert_fast
from bert_fast.cli import main
from bert_fast.embeddings.tokenizer import load_tokenizer
from bert_fast.training import corpus, metrics, tasks
from bert_fast.training.finetune import Settings, Tuned, finetune
from bert_fast.training.tasks import figures as figures_of
from bert_fast.training.tasks import question_answering
from bert_fast.training.tasks.tagging import _entities

GOOD = ["fine", "great", "lovely"]
BAD = ["poor", "dull", "awful"]
OTHER = ["the", "film", "was", "a", "plot", "with", "an", "actor", "story", "and", "music"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small BERT, its vocabulary these words and their letters; soon trained, for its weights are
    not small."""
    directory = tmp_path_factory.mktemp("bert")
    words = sorted({*OTHER, *GOOD, *BAD, "who", "played", "anna", "bob"})
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz"))
    tokens = [*corpus.SPECIAL, *words, *(x for x in letters if x not in words)]
    tokens += [f"##{letter}" for letter in letters]
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    load_tokenizer(directory).save(str(directory / "tokenizer.json"))
    torch.manual_seed(0)
    config = bert_fast.BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=48, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.05,
    )  # fmt: skip
    bert_fast.BertModel(config).save_pretrained(directory)
    return directory


def sentence(rng, *words):
    some = rng.choices(OTHER, k=rng.randint(2, 8)) + list(words)
    rng.shuffle(some)
    return some


def reviews(number, rng):
    for _ in range(number):
        good = rng.random() < 0.5
        yield " ".join(sentence(rng, rng.choice(GOOD if good else BAD))), good


def classification(rng):
    return [{"text": t, "label": "fresh" if g else "rotten"} for t, g in reviews(160, rng)]


def pairs(rng):
    found = reviews(160, rng)
    return [{"text": "the film", "text_b": t, "label": int(g)} for t, g in found]


def regression(rng):
    return [{"text": t, "label": 1.0 if g else -1.0} for t, g in reviews(160, rng)]


def multi_label(rng):
    rows = []
    for _ in range(480):
        labels = [name for name in ("good", "bad") if rng.random() < 0.5]
        words = [rng.choice(GOOD if name == "good" else BAD) for name in labels]
        rows.append({"text": " ".join(sentence(rng, *words)), "labels": labels})
    return rows


def tagging(rng):
    rows = []
    for _ in range(160):
        words = sentence(rng, rng.choice(GOOD), rng.choice(BAD))
        tags = ["B-good" if w in GOOD else "B-bad" if w in BAD else "O" for w in words]
        rows.append({"words": words, "tags": tags})
    return rows


def answering(rng):
    """Derived: who played with the film's good word? The name after it. Some have no answer."""
    questions = []
    for i in range(160):
        name, words = rng.choice(["anna", "bob"]), rng.choices(OTHER, k=rng.randint(2, 30))
        place = rng.randrange(len(words))
        if answered := rng.random() < 0.8:
            words.insert(place, name)
        context = " ".join(words)
        begin = len(" ".join(words[:place])) + (place > 0)
        answers = [{"text": name, "answer_start": begin}] if answered else []
        questions.append({"context": context, "qas": [{
            "id": str(i), "question": "who played", "answers": answers,
            "is_impossible": not answered,
        }]})  # fmt: skip
    return {"data": [{"title": "t", "paragraphs": questions}]}


def translation(rng):
    """Into a language whose words are ours from behind."""
    texts = (sentence(rng, rng.choice(GOOD + BAD)) for _ in range(240))
    return [{"text": " ".join(t), "target": " ".join(w[::-1] for w in t)} for t in texts]


CASES = {  # task, rows, Hugging Face's class, the first figure and what it must reach
    "classification": (classification, "SequenceClassification", "accuracy", 0.95),
    "sentiment": (pairs, "SequenceClassification", "accuracy", 0.95),
    "regression": (regression, "SequenceClassification", "pearson", 0.9),
    "multi-label": (multi_label, "SequenceClassification", "f1_micro", 0.9),
    "ner": (tagging, "TokenClassification", "entity_f1", 0.95),
    "qa": (answering, "QuestionAnswering", "f1", 0.9),
    "translation": (translation, "Seq2SeqLM", "bleu", 50),
}


def write(path, rows):
    if isinstance(rows, dict):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def same(a, b):
    """Predictions, whose scores may differ by rounding (prepacked weights)."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return abs(a - b) < 1e-4 if isinstance(a, float) else a == b


@pytest.mark.parametrize("task", CASES)
def test_every_task(task, checkpoint, tmp_path, capsys):
    """Learns, saves, is loaded by Hugging Face with the same scores, and predicts."""
    make, head, figure, bar = CASES[task]
    rows = write(tmp_path / ("rows.json" if task == "qa" else "rows.jsonl"), make(random.Random(1)))
    settings = Settings(
        task=task, model=str(checkpoint), train=rows, out=str(tmp_path / "out"),
        epochs=60 if task == "multi-label" else 40, lr=1e-3, batch_tokens=400, max_length=24,
        device="cpu", decoder_layers=2, target_vocab=400,
        keep="last" if task == "translation" else "best",  # 40 searches would take long
    )  # fmt: skip
    tuned, figures = finetune(settings)
    assert next(iter(figures)) == figure
    assert figures[figure] >= bar, figures
    out = tmp_path / "out"
    assert (out / "test.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "metrics.json").read_text())["settings"]["task"] == task

    theirs = getattr(transformers, f"AutoModelFor{head}").from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("the film was great", "a plot with anna", return_tensors="pt")
    if task == "translation":
        inputs["decoder_input_ids"] = torch.tensor([[2, 300, 280]])
    with torch.no_grad():
        wanted, found = theirs(**inputs), tuned.model.eval()(**inputs)
    name = "start_logits" if task == "qa" else "logits"
    assert (getattr(found, name) - getattr(wanted, name)).abs().max() < 2e-5
    if task not in ("qa", "translation"):
        assert list(theirs.config.id2label.values()) == list(map(str, tuned.task.labels))

    again = Tuned.from_pretrained(out, max_length=24)
    examples = tuned.task.read(rows)
    first = tuned.predict(examples)
    for a, b in zip(first, again.predict(examples), strict=True):
        assert same(a, b)
    arguments = ["predict", "--model", str(out), "--rows", rows, "--max-length", "24"]
    assert main([*arguments, "--out", str(tmp_path / "said.jsonl")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "said.jsonl")]) == 1  # is there already
    said = (tmp_path / "said.jsonl").read_text().splitlines()
    assert len(said) == len(examples)
    assert capsys.readouterr().err.strip().endswith("--overwrite replaces it")
    if task == "translation":  # plain lines, greedily
        (tmp_path / "a.en").write_text("the film\nwas great\n")
        arguments = ["predict", "--model", str(out), "--rows", str(tmp_path / "a.en")]
        assert main([*arguments, "--out", str(tmp_path / "a.jsonl"), "--beams", "1"]) == 0
        said = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [row["text"] for row in said] == ["the film", "was great"]
        assert main([*arguments, "--out", str(tmp_path / "b.jsonl"), "--beams", "0"]) == 1


WRONG = [
    ("classification", "a.csv", "text,label\nfine,\n", r"a\.csv:2: 'label' must be a name"),
    ("classification", "a.csv", "text,label\nfine,x,y\n", r"a\.csv:2: not the header's 2 columns"),
    ("classification", "a.csv", "text,label\n", r"a\.csv has no rows"),
    ("classification", "a.jsonl", '{"text": "a", "label": 1}\n{', r"a\.jsonl:2: not JSON"),
    ("classification", "a.jsonl", '{"text": 3, "label": 1}\n', r"a\.jsonl:1: 'text' must be a"),
    ("classification", "a.txt", "", r"must end in \.csv, \.tsv or \.jsonl"),
    ("regression", "a.tsv", "text\tlabel\nfine\tnan\n", r"a\.tsv:2: 'label' must be a number"),
    ("multi-label", "a.jsonl", '{"text": "a", "labels": 3}\n', r"a\.jsonl:1: 'labels' must be a"),
    ("ner", "a.conll", "one O\ntwo\n", r"a\.conll:2: a word and its tag expected, not 'two'"),
    ("ner", "a.jsonl", '{"words": ["a"], "tags": []}\n', r"a\.jsonl:1: 1 words, but 0 tags"),
    ("qa", "a.json", "{}", r"a\.json is not SQuAD's JSON"),
    ("qa", "a.json", json.dumps({"data": [{"paragraphs": [{"context": "ab", "qas": [
        {"question": "q", "answers": [{"text": "b", "answer_start": 0}]}]}]}]}),
     r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: the context has no 'b' at answer_start 0"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "content", "message"), WRONG)
def test_wrong_rows_are_named(tmp_path, task, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(tasks.DataError, match=message):
        tasks.TASKS[task]().read(tmp_path / name)


def test_wrong_translations_are_named(tmp_path, monkeypatch):
    task = tasks.Translation()
    a, b = tmp_path / "a.en", tmp_path / "b.de"
    a.write_text("one\u2028line\ntwo\n")  # a line ends at a newline and nowhere else
    b.write_text("eins\nzwei\n")
    assert [e.label for e in task.read_aligned(a, b)] == ["eins", "zwei"]
    b.write_text("eins\n\n")
    with pytest.raises(tasks.DataError, match=r"b\.de:2: there is no text"):
        task.read_aligned(a, b)
    b.write_text("eins\n")
    with pytest.raises(
        tasks.DataError, match=r"a\.en has 2 lines, .*b\.de 1: they must be aligned"
    ):
        task.read_aligned(a, b)
    b.write_bytes(b"\xff\n")
    with pytest.raises(tasks.DataError, match=r"b\.de is not UTF-8"):
        task.read_aligned(a, b)
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(tasks.DataError, match=r"c\.jsonl:1: 'target' must be a text"):
        task.read(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="train_targets and test_targets are for the task transl"):
        Settings("ner", "", str(a), "", train_targets=str(b))
    with pytest.raises(ValueError, match="test_targets needs test"):
        Settings("translation", "", str(a), "", train_targets=str(b), test_targets=str(b))
    with pytest.raises(ValueError, match="beams must be at least 1, not 0"):
        Settings("translation", "", str(a), "", beams=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sacrebleu .*pip install .bert_fast\[translate\]"):
        finetune(Settings("translation", "", str(a), str(tmp_path / "out"), train_targets=str(b)))


def test_a_label_that_training_lacks(checkpoint, tmp_path):
    train = write(tmp_path / "a.jsonl", [{"text": "fine", "label": "x"}] * 3)
    test = write(tmp_path / "b.jsonl", [{"text": "fine", "label": "y"}])
    settings = Settings("classification", str(checkpoint), train, str(tmp_path / "out"), test)
    with pytest.raises(tasks.DataError, match="'y' is not one of the training rows': x"):
        finetune(settings)
    with pytest.raises(ValueError, match="max_length is 64; the model has 48 positions"):
        finetune(Settings("classification", str(checkpoint), train, str(tmp_path / "out"),
                          max_length=64))  # fmt: skip
    with pytest.raises(ValueError, match="task must be one of classification"):
        Settings("poetry", "", "", "")


def test_figures():
    """Against hand-made and numpy's."""
    task = tasks.Regression()
    truth, guess = np.array([1.0, 2.0, 2.0, 5.0]), [2.0, 1.0, 4.0, 4.0]
    figures = task.judge([tasks.Example("", None, t) for t in truth], guess)
    assert np.isclose(figures["pearson"], np.corrcoef(truth, guess)[0, 1])
    assert np.isclose(figures["spearman"], np.corrcoef([1, 2.5, 2.5, 4], [2, 1, 3.5, 3.5])[0, 1])
    assert _entities(["B-a", "I-a", "I-b", "O", "B-a", "B-a"]) == {
        (0, 2, "a"), (2, 3, "b"), (4, 5, "a"), (5, 6, "a"),
    }  # fmt: skip
    assert question_answering._normal("The  Cat's, a dog!") == "cats dog"
    assert np.isclose(question_answering._overlap(["a", "b", "c"], ["b", "c", "d", "e"]), 4 / 7)
    assert figures_of.accuracy_and_f1(["x", "x", "y"], ["x", "y", "y"]) == {
        "accuracy": 2 / 3, "f1_macro": 2 / 3,
    }  # fmt: skip


def test_conll_and_long_words(tmp_path, checkpoint):
    """A word of many tokens carries its tag on the first; every word has one."""
    path = tmp_path / "a.conll"
    path.write_text("the DT O\nzzzqqq NN B-x\n\nfilm NN O\n")
    task = tasks.Tagging()
    examples = task.read(path)
    assert examples[0] == tasks.Example(["the", "zzzqqq"], None, ["O", "B-x"])
    task.fit(examples)
    tokenizer = load_tokenizer(checkpoint)
    features = task.features(tokenizer, examples, 48)
    for example, feature in zip(examples, features, strict=True):
        placed = [label for label in feature.label if label != -100]
        assert [task.labels[i] for i in placed] == example.label
    exact = [(torch.tensor([max(i, 0) for i in f.label]),) for f in features]
    assert task.predictions(examples, features, exact) == [e.label for e in examples]
    cut = task.features(tokenizer, [tasks.Example(["film"] * 9, None, ["O"] * 9)], 5)
    long = task.predictions(
        [tasks.Example(["film"] * 9)], cut, [(torch.ones(5).long(),)] * len(cut)
    )
    assert len(long[0]) == 9


def test_windows_cover_the_context(checkpoint):
    """Every token of a long context is in a window, and the answer in the window that has it."""
    task, words = tasks.QuestionAnswering(), ["film"] * 60
    words[41] = "anna"
    context = " ".join(words)
    begin = context.index("anna")
    example = tasks.Example("who played", context, [("anna", begin)])
    features = task.features(load_tokenizer(checkpoint), [example], 24)
    covered = set()
    for feature in features:
        sides = feature.encoding.sequence_ids
        places = [feature.encoding.offsets[i] for i, side in enumerate(sides) if side == 1]
        covered |= {a for a, _ in places}
        start, end = feature.label
        if (begin, begin + 4) in places:
            assert feature.encoding.offsets[start][0] == begin
            assert feature.encoding.offsets[end][1] == begin + 4
        else:
            assert (start, end) == (0, 0)
    assert len(covered) == 60
    assert len(features) > 3


def test_tags_of_long_texts_come_from_windows(checkpoint):
    """Every word's tag comes back, as from one encoding of the whole."""
    task, tokenizer = tasks.Tagging(), load_tokenizer(checkpoint)
    words = random.choices([*OTHER, "zzzqqq", "filmplot"], k=60)
    tags = random.choices(["O", "B-x", "I-x"], k=60)
    examples = [tasks.Example(["film"], None, ["O"]), tasks.Example(words, None, tags)]
    task.fit([*examples, tasks.Example([], None, ["O", "B-x", "I-x"])])
    for length in (8, 12, 25):
        features = task.features(tokenizer, examples, length)
        assert max(len(f.ids) for f in features) <= length
        exact = [(torch.tensor([max(i, 0) for i in f.label]),) for f in features]
        assert task.predictions(examples, features, exact) == [["O"], tags]
        tokenizer.no_truncation()
        whole = tokenizer.encode(words, is_pretokenized=True)
        first = {word: whole.ids[whole.word_ids.index(word)] for word in range(60)}
        for feature in features[1:]:
            for place, label in enumerate(feature.label):
                if label != -100:  # a word's first token alone carries its tag
                    assert feature.ids[place] == first[feature.encoding.word_ids[place]]
                    assert task.labels[label] == tags[feature.encoding.word_ids[place]]


def test_a_question_longer_than_its_window_is_said(checkpoint):
    task, tokenizer = tasks.QuestionAnswering(), load_tokenizer(checkpoint)
    for words in range(1, 30):
        example = tasks.Example(" ".join(["film"] * words), "the plot " * 30, [])
        if words < 24 - 8 - 3:
            assert task.features(tokenizer, [example], 24)
        else:
            with pytest.raises(tasks.DataError, match=rf"question 'film.*' has {words} tokens; wi"):
                task.features(tokenizer, [example], 24)


@pytest.mark.parametrize("patience", [None, 1, 2])
def test_the_best_epoch_is_kept(checkpoint, tmp_path, monkeypatch, patience):
    """Of drawn figures: transformers' callback says when to stop; what is saved are the weights of
    the first of the best epochs."""
    epochs, seen = 6, []
    drawn = [random.choice([0.1, 0.2, 0.3, 0.4]) for _ in range(epochs)]
    saved = tasks.Classification.judge

    def judge(self, examples, predictions):
        seen.append(predictions)
        place = min(len(seen), epochs) - 1
        return {"drawn": drawn[place], **saved(self, examples, predictions)}

    monkeypatch.setattr(tasks.Classification, "judge", judge)
    rows = write(tmp_path / "rows.jsonl", classification(random.Random(2))[:30])
    settings = Settings(
        "classification", str(checkpoint), rows, str(tmp_path / "out"), epochs=epochs, lr=1e-3,
        patience=patience, batch_tokens=100, device="cpu",
    )  # fmt: skip
    tuned, figures = finetune(settings)

    stop = transformers.EarlyStoppingCallback(patience or epochs + 1)
    args = transformers.TrainingArguments(
        str(tmp_path / "theirs"), load_best_model_at_end=True, metric_for_best_model="drawn",
        greater_is_better=True, eval_strategy="epoch", save_strategy="epoch", use_cpu=True,
    )  # fmt: skip
    state, control = transformers.TrainerState(), transformers.TrainerControl()
    for ran, value in enumerate(drawn, 1):
        stop.on_evaluate(args, state, control, {"eval_drawn": value})
        if state.best_metric is None or value > state.best_metric:  # as Trainer does afterwards
            state.best_metric, state.best_global_step = value, ran
        if control.should_training_stop:
            break
    assert figures["epoch"] == state.best_global_step
    metrics_of = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [record["drawn"] for record in metrics_of["epochs"]] == drawn[:ran]
    assert seen[-1] == seen[figures["epoch"] - 1]  # the scores, to the bit
    again = Tuned.from_pretrained(tmp_path / "out").model.state_dict()
    for name, weight in tuned.model.state_dict().items():
        assert torch.equal(again[name], weight)


def test_the_last_epoch_can_be_kept(checkpoint, tmp_path):
    rows = write(tmp_path / "rows.jsonl", classification(random.Random(2))[:20])
    settings = Settings(
        "classification", str(checkpoint), rows, str(tmp_path / "out"), epochs=2, keep="last"
    )
    assert finetune(settings)[1]["epoch"] == 2
    records = json.loads((tmp_path / "out" / "metrics.json").read_text())["epochs"]
    assert [list(record) for record in records] == [["epoch", "step", "loss"]] * 2
    with pytest.raises(ValueError, match="patience needs keep best"):
        dataclasses.replace(settings, patience=1)
    with pytest.raises(ValueError, match="keep must be best or last, not 'worst'"):
        dataclasses.replace(settings, keep="worst")


def test_a_model_is_not_overwritten_unasked(tmp_path):
    out = tmp_path / "out"
    settings = Settings("classification", "no-model", str(tmp_path / "no.csv"), str(out))
    out.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):  # an empty directory is no reason
        finetune(settings)
    (out / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="out exists and is not empty; --overwrite replaces"):
        finetune(settings)
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):
        finetune(dataclasses.replace(settings, overwrite=True))
    assert (out / "config.json").read_text() == "{}"


def test_predict_takes_a_device(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: nothing to refuse")
    arguments = ["predict", "--model", str(tmp_path), "--rows", "r.csv", "--out",
                 str(tmp_path / "p.jsonl"), "--device", "cuda"]  # fmt: skip
    assert main(arguments) == 1
    assert "device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_without_matplotlib_a_run_says_so_and_goes_on(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.warns(UserWarning, match=r"curves\.png is not drawn: .*bert_fast\[plot\]"):
        metrics.plot([], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
