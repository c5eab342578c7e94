"""What a sentence-transformers directory says is obeyed, or refused by name."""

import json
import pickle
import warnings

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from checkpoints import SIZES, TEXTS, VOCABULARY, bert, sentence_transformer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling

import bert_fast
from bert_fast.embeddings import settings
from bert_fast.embeddings.pooling import MODES
from bert_fast.files import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*texts were cut to:UserWarning")


def same(directory, theirs, texts=TEXTS, **options):
    ours = bert_fast.SentenceEncoder(directory)
    found, wanted = ours.encode(texts, **options), theirs.encode(texts, **options)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
    return ours


@pytest.mark.parametrize("mode", MODES)
def test_each_pooling(tmp_path, mode):
    theirs, directory = sentence_transformer(tmp_path, Pooling(32, mode))
    same(directory, theirs)


def test_modules_in_their_order(tmp_path):
    dense = Dense(96, 24, activation_function=torch.nn.GELU())
    for module in (dense,):
        torch.nn.init.normal_(module.linear.bias)
    norm = LayerNorm(24)
    torch.nn.init.normal_(norm.norm.weight)
    modules = Pooling(32, ("mean", "max", "cls")), dense, norm, Dense(24, 24, use_residual=True)
    theirs, directory = sentence_transformer(
        tmp_path, *modules, Dense(24, 9, bias=False, activation_function=None), Normalize(),
        Dense(9, 5, use_residual=True),
    )  # fmt: skip
    ours = same(directory, theirs)
    assert ours.embedding_dimension == ours.get_sentence_embedding_dimension() == 5


def test_booleans_of_before_5_4(tmp_path):
    theirs, directory = sentence_transformer(tmp_path, Pooling(32, ("cls", "max")))
    path = directory / "1_Pooling" / "config.json"
    path.write_text(json.dumps({
        "word_embedding_dimension": 32, "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }))  # fmt: skip
    same(directory, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_is_not_pooled(tmp_path, mode):
    theirs, directory = sentence_transformer(tmp_path, Pooling(32, mode, include_prompt=False))
    same(directory, theirs, prompt="the plot: ")
    same(directory, theirs)


def test_prompts_and_the_default_one(tmp_path):
    prompts = {"query": "the plot: ", "passage": "film ", "other": "a "}
    theirs, directory = sentence_transformer(
        tmp_path, Pooling(32), prompts=prompts, default_prompt_name="other"
    )
    ours = same(directory, theirs)
    same(directory, theirs, prompt_name="passage")
    same(directory, theirs, prompt="")
    for method in ("encode_query", "encode_document"):
        found, wanted = getattr(ours, method)(TEXTS), getattr(theirs, method)(TEXTS)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)
    with pytest.raises(
        ValueError, match=r"prompt_name 'no' is not one of the model's \['document'"
    ):
        ours.encode("a", prompt_name="no")


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(tmp_path, name):
    theirs, directory = sentence_transformer(tmp_path, Pooling(32), similarity_fn_name=name)
    ours, vectors = bert_fast.SentenceEncoder(directory), np.random.randn(5, 32).astype("f4")
    assert ours.similarity_fn_name == name
    for a, b in ((vectors, vectors[:2]), (vectors[0], vectors), (list(vectors), vectors)):
        torch.testing.assert_close(ours.similarity(a, b), theirs.similarity(a, b))
    torch.testing.assert_close(
        ours.similarity_pairwise(vectors, vectors[::-1].copy()),
        theirs.similarity_pairwise(vectors, vectors[::-1].copy()),
    )


TOKENIZERS = [
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"strip_accents": False},
    {"tokenize_chinese_chars": False},
    {"model_max_length": 6},
    {"model_max_length": 6, "truncation_side": "left"},
    {"model_input_names": ["input_ids", "attention_mask"]},
]


@pytest.mark.parametrize("options", TOKENIZERS, ids=str)
@pytest.mark.parametrize("without", [None, "tokenizer.json", "transformers"])
def test_what_the_tokenizers_files_say(tmp_path, monkeypatch, options, without):
    theirs, directory = sentence_transformer(tmp_path, Pooling(32), tokenizer=options)
    if without == "transformers":
        monkeypatch.setattr(
            "bert_fast.embeddings.tokenizer.missing", lambda name: f"{name} is not installed"
        )
    elif without:
        (directory / without).unlink()
        (directory / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
        theirs = SentenceTransformer(str(directory), device="cpu")
    ours = same(directory, theirs)
    assert ours.max_seq_length == options.get("model_max_length", 40)


def test_types_that_the_tokenizer_does_not_list(tmp_path):
    """A cross-encoder's second text then has the first's type."""
    from checkpoints import cross_encoder
    from sentence_transformers import CrossEncoder

    _, directory = cross_encoder(tmp_path)
    for change in (
        {"model_input_names": ["input_ids", "attention_mask"]},
        {"truncation_side": "left"},
    ):
        edit(directory / "tokenizer_config.json", **change)
        theirs = CrossEncoder(str(directory), device="cpu")
        pairs = [(a, b) for a in TEXTS for b in TEXTS[:3]]
        found = bert_fast.CrossEncoder(directory).predict(pairs)
        np.testing.assert_allclose(found, theirs.predict(pairs), rtol=0, atol=1e-5)


def test_a_tokenizer_that_config_json_names(tmp_path):
    """It is transformers' that is made, or refused; never WordPiece over its vocabulary."""
    theirs, directory = sentence_transformer(tmp_path, Pooling(32))
    (directory / "tokenizer_config.json").unlink()
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8")
    for name in ("BertTokenizer", "BertTokenizerFast"):
        edit(directory / "config.json", tokenizer_class=name)
        same(directory, theirs)
    edit(directory / "config.json", tokenizer_class="BertJapaneseTokenizer")
    with pytest.raises(CheckpointError, match="tokenizer"):
        bert_fast.SentenceEncoder(directory)


def test_what_is_set_on_the_tokenizer_by_hand(tmp_path):
    from checkpoints import cross_encoder

    theirs, directory = sentence_transformer(tmp_path / "encoder", Pooling(32))
    scorer, scorers = cross_encoder(tmp_path / "scorer")
    pairs = [(a, b) for a in TEXTS for b in TEXTS[:3]]
    ours, our_scorer = bert_fast.SentenceEncoder(directory), bert_fast.CrossEncoder(scorers)
    ours, our_scorer = pickle.loads(pickle.dumps([ours, our_scorer]))
    for length, side in ((6, "right"), (6, "left"), (9, "left")):
        for model in (theirs, scorer, ours, our_scorer):
            model.tokenizer.model_max_length = length
            model.tokenizer.truncation_side = side
        assert ours.max_seq_length == ours.max_seqlen == our_scorer.max_length == length
        np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), rtol=0, atol=2e-5)
        np.testing.assert_allclose(
            our_scorer.predict(pairs), scorer.predict(pairs), rtol=0, atol=2e-5
        )
    lower = tokenizers.normalizers.Lowercase()
    theirs.tokenizer.backend_tokenizer.normalizer = ours.tokenizer.normalizer = lower
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), rtol=0, atol=2e-5)
    for name, value, kind, message in (
        ("padding_side", "left", ValueError, "a text's positions would depend on its batch"),
        ("truncation_side", "both", ValueError, "truncation_side must be 'left' or 'right'"),
        ("model_max_length", 41, ValueError, "max_seq_length must be 1 to 40, not 41"),
        ("do_lower_case", True, AttributeError, "a tokenizer has no do_lower_case"),
        ("model_input_names", [], AttributeError, "a tokenizer has no model_input_names"),
    ):
        with pytest.raises(kind, match=message):
            setattr(ours.tokenizer, name, value)


def test_padding_on_the_left_is_refused(tmp_path):
    _, directory = sentence_transformer(tmp_path, Pooling(32))
    edit(directory / "tokenizer_config.json", padding_side="left")
    with pytest.raises(CheckpointError, match="padding_side is 'left'"):
        bert_fast.SentenceEncoder(directory)


@pytest.mark.parametrize("name", settings.TRANSFORMER_FILES)
def test_older_names_of_the_transformers_file(tmp_path, name):
    _, directory = sentence_transformer(tmp_path, Pooling(32))
    (directory / "sentence_bert_config.json").unlink()
    (directory / name).write_text(json.dumps({"max_seq_length": 5, "do_lower_case": False}))
    theirs = SentenceTransformer(str(directory), device="cpu")
    assert same(directory, theirs).max_seq_length == 5


def test_added_tokens(tmp_path):
    _, directory = sentence_transformer(tmp_path, Pooling(32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["goodbad"])
    tokenizer.save_pretrained(directory)
    words = VOCABULARY.index("film")
    config = json.loads((directory / "config.json").read_text())
    model = transformers.BertModel.from_pretrained(directory)
    model.resize_token_embeddings(config["vocab_size"] + 1)
    model.save_pretrained(directory)
    ours = same(directory, SentenceTransformer(str(directory), device="cpu"), ["a goodbad film"])
    assert ours.tokenize(["goodbad film"])[0].tolist()[1:3] == [len(VOCABULARY), words]


def test_lower_case_of_sentence_transformers(tmp_path):
    theirs, directory = sentence_transformer(
        tmp_path, Pooling(32), tokenizer={"do_lower_case": False}
    )
    path = directory / "sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": 9, "do_lower_case": True}))
    theirs = SentenceTransformer(str(directory), device="cpu")
    assert same(directory, theirs).max_seq_length == 9


FAMILIES = {
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "XLMRoberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "Camembert": {"pad_token_id": 1, "type_vocab_size": 1},
    "Electra": {"embedding_size": 32},
    "DistilBert": {},
    "MPNet": {"pad_token_id": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(tmp_path, family):
    base = bert(tmp_path / "base")
    sizes = dict(SIZES)
    if family == "DistilBert":
        names = ("hidden_size", "dim"), ("num_hidden_layers", "n_layers"), (
            "num_attention_heads", "n_heads"), ("intermediate_size", "hidden_dim")  # fmt: skip
        for theirs, its in names:
            sizes[its] = sizes.pop(theirs)
    config = getattr(transformers, f"{family}Config")(**{**sizes, **FAMILIES[family]})
    getattr(transformers, f"{family}Model")(config).save_pretrained(base)
    from sentence_transformers.base.modules import Transformer

    theirs = SentenceTransformer(
        modules=[Transformer(str(base), processor_kwargs={"model_max_length": 30}), Pooling(32)],
        device="cpu",
    )
    theirs.save_pretrained(str(tmp_path / "saved"))
    same(tmp_path / "saved", theirs)


def test_a_float16_checkpoint_on_a_cpu(tmp_path):
    theirs, directory = sentence_transformer(tmp_path, Pooling(32))
    theirs.half().save_pretrained(str(directory))
    theirs.float()
    ours = same(directory, theirs)
    assert ours.model.embeddings.word.weight.dtype == torch.float32
    assert bert_fast.BertModel.from_pretrained(directory, "auto").pooler.weight.dtype == torch.half
    low = bert_fast.BertModel.from_pretrained(directory, torch_dtype="bfloat16")
    assert low.pooler.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of float64"):
        bert_fast.BertModel.from_pretrained(directory, "int8")


def test_a_directory_of_transformers_alone(tmp_path):
    base = bert(tmp_path / "base")
    same(base, SentenceTransformer(str(base), device="cpu"))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD = {
    "1_Pooling/config.json": [
        ({"pooling_mode": "median"}, r"pooling_mode \['median'\]"),
        ({"embedding_dimension": 31}, "pools vectors of 31, but is given 32"),
        ({"temperature": 2}, "the key 'temperature' is not known"),
    ],
    "2_Dense/config.json": [
        ({"activation_function": "mine.Tanh"}, "'mine.Tanh' is no module of torch.nn"),
        ({"activation_function": "torch.nn.Softshrunk"}, "Softshrunk' is no module"),
        ({"module_input_name": "token_embeddings"}, "only 'sentence_embedding' is supported"),
        ({"in_features": 7}, "in_features is 7, but vectors have 32"),
        ({"gate": True}, "the key 'gate'"),
    ],
    "sentence_bert_config.json": [
        ({"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ({"query_length": 3}, "query_length is 3"),
        ({"modality_config": {"image": {}}}, "modality_config"),
        ({"tokenizer_args": {"a": 1}}, "tokenizer_args"),
        ({"new": 1}, "the key 'new'"),
    ],
    "config_sentence_transformers.json": [
        ({"model_type": "SparseEncoder"}, "holds a SparseEncoder"),
        ({"similarity_fn_name": "maxsim"}, "maxsim"),
        ({"default_prompt_name": "no"}, "default_prompt_name is 'no'"),
        ({"new": 1}, "the key 'new'"),
    ],
    "config.json": [
        ({"position_embedding_type": "alibi"}, "'alibi' is not supported"),
        ({"auto_map": {"AutoModel": "x"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [(f, c, m) for f, cases in BAD.items() for c, m in cases],
    ids=str,
)
def test_what_is_refused(tmp_path, file, change, message):
    _, directory = sentence_transformer(tmp_path, Pooling(32), Dense(32, 8))
    bert_fast.SentenceEncoder(directory)
    edit(directory / file, **change)
    with pytest.raises(CheckpointError, match=message):
        bert_fast.SentenceEncoder(directory)


@pytest.mark.parametrize("kind", ["sentence_transformers.models.CNN", "mine.Pooling", "Router"])
def test_an_unknown_module(tmp_path, kind):
    _, directory = sentence_transformer(tmp_path, Pooling(32))
    path = directory / "modules.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps([*listed, {"idx": 2, "name": "2", "path": "2_X", "type": kind}]))
    with pytest.raises(CheckpointError, match=f"the module {kind} is not supported"):
        bert_fast.SentenceEncoder(directory)
    path.write_text(json.dumps(listed[::-1]))
    with pytest.raises(CheckpointError, match="the first module, and no other"):
        bert_fast.SentenceEncoder(directory)


def test_every_key_that_the_library_writes_has_a_rule(tmp_path):
    """What this version of sentence-transformers writes; and what its modules can be told to."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Dropout

    modules = Pooling(32), Dense(32, 32), LayerNorm(32), Normalize(), Dropout()
    _, directory = sentence_transformer(tmp_path, *modules)
    bert_fast.SentenceEncoder(directory)
    for rules, kind in [
        (settings.TRANSFORMER, Transformer), (settings.POOLING, Pooling), (settings.DENSE, Dense),
        (settings.LAYER_NORM, LayerNorm), (settings.NORMALIZE, Normalize),
        (settings.DROPOUT, Dropout),
    ]:  # fmt: skip
        assert set(kind.config_keys) <= set(rules)


def test_every_key_of_a_bert_has_a_rule(tmp_path):
    """No key of transformers' own config is warned about as unknown; one that is not theirs is."""
    everything = transformers.BertConfig(**SIZES).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bert_fast.BertConfig.from_dict(everything, "config.json")
    with pytest.warns(UserWarning, match="not known, not used: gate, sharpness"):
        bert_fast.BertConfig.from_dict({**everything, "sharpness": 3, "gate": 1}, "config.json")
