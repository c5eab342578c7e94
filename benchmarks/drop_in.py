"""What a user of Hugging Face gains: SentenceTransformer.encode on real reviews, and pre-training
on the Brown corpus.

python -m benchmarks.drop_in [--json FILE]
"""

import argparse
import copy
import statistics
import tempfile
import time

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import bert_fast
from bert_fast.bench import data, report
from bert_fast.training import corpus, optim

ROUNDS = 5


def in_turn(contestants, amount):
    """{name: amount a second}, medians of rounds in which all take turns."""
    times = {name: [] for name in contestants}
    for turn in range(ROUNDS + 1):
        for name, call in contestants.items():
            began = time.perf_counter()
            call()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - began)
    return {name: amount / statistics.median(t) for name, t in times.items()}


def encode():
    """Texts a second; the bar is 1.3 times."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(data.minilm()), device="cpu")
    ours = bert_fast.accelerate(copy.deepcopy(theirs), prepack=True)
    texts = [review for film in data.films() for review in film.reviews][:512]
    found, wanted = (m.encode(texts, convert_to_tensor=True) for m in (ours, theirs))
    assert (found - wanted).abs().max() < 2e-5
    rates = in_turn(
        {"hugging_face": lambda: theirs.encode(texts), "ours": lambda: ours.encode(texts)},
        len(texts),
    )
    return {"work": "SentenceTransformer.encode, MiniLM-L6, 512 film reviews", "bar": 1.3,
            "unit": "texts/s"} | rates  # fmt: skip


def pretrain():
    """Tokens a second of the same batches; the bar is 1.4 times Hugging Face's eager model."""
    with tempfile.TemporaryDirectory() as scratch:
        data.brown_text(f"{scratch}/brown.txt")
        documents = corpus.read_documents([f"{scratch}/brown.txt"])
    text = corpus.Corpus(documents, corpus.train_tokenizer(documents, 8192))
    sampler = corpus.PairSampler(text, text.split(0)[0], 128, 4096)
    pairs, slices = sampler.epoch(0)
    batches = [sampler.batch(pairs, some, 0) for some in slices[:4]]
    sizes = {
        "vocab_size": text.vocab_size, "hidden_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 128,
    }  # fmt: skip
    ours = bert_fast.BertForPreTraining(bert_fast.BertConfig(**sizes))
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(**sizes, attn_implementation="eager")
    )

    def packed(batch):
        return ours(
            batch.input_ids, token_type_ids=batch.token_type_ids, cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen, labels=batch.labels,
            next_sentence_label=batch.next_sentence_label,
        )  # fmt: skip

    def padded(batch):
        lengths = batch.cu_seqlens.diff().tolist()

        def pad(values, fill):
            return pad_sequence(values.split(lengths), batch_first=True, padding_value=fill)

        ids = pad(batch.input_ids, text.pad)
        return theirs(
            input_ids=ids, attention_mask=pad(torch.ones_like(batch.input_ids), 0),
            token_type_ids=pad(batch.token_type_ids, 0), labels=pad(batch.labels, -100),
            next_sentence_label=batch.next_sentence_label,
        )  # fmt: skip

    def steps(model, forward):
        optimizer = torch.optim.AdamW(optim.parameter_groups(model, 0.01), lr=1e-4)

        def run():
            for batch in batches:
                optimizer.zero_grad()
                forward(batch).loss.backward()
                optimizer.step()

        return run

    tokens = sum(len(batch.input_ids) for batch in batches)
    contestants = {"hugging_face": steps(theirs, padded), "ours": steps(ours, packed)}
    return {"work": "pre-training step, 4 layers of 256, 4,096 tokens", "bar": 1.4,
            "unit": "tokens/s"} | in_turn(contestants, tokens)  # fmt: skip


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", help="also write the result here")
    args = options.parse_args()
    result = {"environment": report.environment(), "rows": [encode(), pretrain()]}
    for row in result["rows"]:
        ratio = row["ours"] / row["hugging_face"]
        print(f"{row['work']}: {ratio:.2f}x ({row['ours']:,.0f} {row['unit']}), bar {row['bar']}")
    if args.json:
        report.write(args.json, result)


if __name__ == "__main__":
    main()
