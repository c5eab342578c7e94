"""The reader of texts and rows: every line and row that was written comes back, or is refused."""

import csv
import json
import random
import warnings

import pytest

from bert_fast.text import DataError, iter_lines, read_json_file, read_lines, read_rows, read_texts
from bert_fast.training.corpus import read_documents
from bert_fast.training.tasks import Tagging
from bert_fast.training.tasks.conll import read_conll

# What str.splitlines() ends a line at, and a text file does not.
NO_ENDS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def drawn_texts(count=20):
    pieces = ["film", "é", "東京", " ", ",", '"', "'", "|", "\u00a0", *NO_ENDS]
    return [
        "x" + "".join(random.choices(pieces, k=random.randint(1, 12))) + "y" for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_end_at_line_ends_alone(tmp_path, end, mark, last):
    texts, path = drawn_texts(), tmp_path / "a.txt"
    path.write_bytes((mark + end.join(texts) + end * last).encode())
    assert read_texts(path) == read_lines(path) == texts
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes((mark + end.join(rows) + end * last).encode())
    assert read_texts(path) == texts
    assert [(n, row["text"]) for n, row in read_rows(path)] == list(enumerate(texts, 1))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_as_python_writes_it(tmp_path, end, mark):
    """Line breaks and doubled quotes inside a field, and a field longer than csv's own limit."""
    texts = [t + random.choice(["", "\n", "\r\n", "\r", '"']) + "z" for t in drawn_texts()]
    texts.insert(random.randrange(10), "long " * 40_000)
    path, limit = tmp_path / "a.csv", csv.field_size_limit()
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(mark)
        writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerows([["text", "label"], *([text, i] for i, text in enumerate(texts))])
    assert [(row["text"], int(row["label"])) for _, row in read_rows(path)] == [
        (text, i) for i, text in enumerate(texts)
    ]
    assert read_texts(path) == texts
    assert csv.field_size_limit() == limit


def test_tsv_has_lone_quotes(tmp_path):
    """As GLUE: the rows that csv would merge into one."""
    texts = [random.choice(['"', ""]) + t + random.choice(['"', "", ' "a']) for t in drawn_texts()]
    texts[3] = '"' + texts[3]
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{t}\t{i}\n" for i, t in enumerate(texts)), "utf-8")
    assert [row["text"] for _, row in read_rows(path)] == texts
    assert [number for number, _ in read_rows(path)] == list(range(2, len(texts) + 2))


def test_blank_lines_keep_their_place_or_are_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n two \n \n")
    assert read_texts(path, keep_blank=True) == ["one", "", " two ", " "]
    assert read_lines(path) == ["one", "", " two ", " "]
    with pytest.warns(UserWarning, match=r"a\.txt: 2 blank lines are left out, the first in"):
        assert read_texts(path) == ["one", " two "]
    for name, content in {
        "a.jsonl": '{"text": "one"}\n\n{"text": ""}\n', "a.csv": "text,id\none,1\n\n,2\n",
        "a.tsv": "text\tid\none\t1\n\n\t2\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
        with pytest.warns(UserWarning, match=rf"{name}: 1 blank line is left out, the first in"):
            assert read_texts(tmp_path / name) == ["one", ""]
    (tmp_path / "b.csv").write_text('text\none\n""\ntwo\n')
    assert read_texts(tmp_path / "b.csv") == ["one", "", "two"]


REFUSED = {
    "not UTF-8": ("a.txt", b"fine\r\nfine\rn\xf6\n", r"a\.txt is not UTF-8: byte 12, in line 3"),
    "UTF-16": ("a.txt", "fine\n".encode("utf-16"), r"a\.txt is not UTF-8: byte 0, in line 1"),
    "UTF-16 without its mark": ("a.txt", "a\nb".encode("utf-16-le"), r"a\.txt:1: a NUL .* UTF-16"),
    "far down": ("a.txt", b"fine\n" * 9000 + b"\xff", r"byte 45000, in line 9001"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', r"a\.jsonl:3: not JSON"),
    "a list": ("a.jsonl", b'["a"]\n', r"a\.jsonl:1: must be a JSON object"),
    "a key twice": ("a.jsonl", b'{"text": "a", "text": "b"}', r"a\.jsonl:1: the key 'text' is the"),
    "half a character": ("a.jsonl", b'{"text": "\\ud83d"}', r"a\.jsonl:1: half of a surrogate"),
    "a column twice": ("a.csv", b"text,text\na,b\n", r"a\.csv:1: the column 'text' is there twice"),
    "no column": ("a.csv", b"words\na\n", r"a\.csv:2: expected a column \"text\""),
    "too few": ("a.csv", b'text,label\n"a\nb",1\nc\n', r"a\.csv:4: not the header's 2 columns"),
    "an open quote": ("a.csv", b'text,label\na,1\n"b,1\nc,2\n', r"a\.csv:3: unexpected end of"),
    "a quote in a quote": ("a.csv", b'text,label\n"b"c,1\n', r"a\.csv:2: .*expected after '\"'"),
    "too many": ("a.tsv", b"text\tlabel\na\t1\t2\n", r"a\.tsv:2: not the header's 2 columns"),
    "nothing": ("a.txt", b"", r"a\.txt holds no text"),
    "no rows": ("a.csv", b"text\n", r"a\.csv holds no text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, case):
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=message):
            read_texts(tmp_path / name, keep_blank=True)


def test_mixed_line_ends_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\nthree\rfour\nfive\rsix")
    with pytest.warns(UserWarning, match=r"a\.txt:3: a lone carriage return ends") as said:
        assert read_texts(path) == ["one", "two", "three", "four", "five", "six"]
    assert len(said) == 1
    path.write_bytes(b"one\r\ntwo\nthree")  # which Windows and git leave; no two readers differ
    assert list(iter_lines(path)) == ["one", "two", "three"]


def test_json_and_documents(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('\ufeff{\r\n"a": "x\u2028"}\r\n'.encode())
    assert read_json_file(path) == {"a": "x\u2028"}
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\u2028still\x0cone\r\n\r\ntwo\r\n\r\n\r\nthree".encode())
    assert read_documents([path]) == [["one\u2028still\x0cone"], ["two"], ["three"]]


CONLL = [(["EU", "rejects"], ["B-ORG", "O"]), (["#", "New\u00a0York"], ["O", "B-LOC"])]
FORMS = {
    "two columns": "EU B-ORG\nrejects O\n\n# O\nNew\u00a0York B-LOC\n",
    "tabs, spaces in words": "EU\tB-ORG\nrejects\tO\n\n\n#\tO\nNew\u00a0York\tB-LOC",
    "four, documents": "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n"
    "-DOCSTART- -X- O O\n# SYM B-NP O\nNew\u00a0York NNP I-NP B-LOC\n",
    "comments": "# id = 1 2 3\n# text = EU rejects\nEU\tB-ORG\nrejects\tO\n\n# newdoc\n#\tO\n"
    "New\u00a0York\tB-LOC\n",
}  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("form", FORMS)
def test_conll(tmp_path, form, end):
    path = tmp_path / "a.conll"
    path.write_bytes(("\ufeff" + FORMS[form].replace("\n", end)).encode())
    assert read_conll(path) == CONLL
    assert read_conll(path, labelled=False) == [(words, None) for words, _ in CONLL]


WRONG_CONLL = {
    "a B-x\n\nb NN O\n": r"a\.conll:3: 3 columns, not 2",
    "a\tB-x\nb\t\n": r"a\.conll:2: a word and its tag expected",
    "a\tO\n# note\nb\tO\n": r"a\.conll:2: a word and its tag expected, not '# note'",
    "a O\n\n# newdoc\nb O\n": r"a\.conll:3: a comment, or the word '#' with the tag 'newdoc'\?",
    "1\ta\tO\n2\tb\tO\n\n1\tc\tO\n": r"a\.conll: the first column numbers the words, as in CoNLL-U",
}


@pytest.mark.parametrize("content", WRONG_CONLL)
def test_odd_conll_is_refused(tmp_path, content):
    path = tmp_path / "a.conll"
    path.write_text(content)
    with pytest.raises(DataError, match=WRONG_CONLL[content]):
        read_conll(path)


def test_rows_without_words_keep_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": ["a"]}\n{"words": []}\n{"words": ["b"]}\n')
    assert [e.text for e in Tagging().read(path, labelled=False)] == [["a"], [], ["b"]]
