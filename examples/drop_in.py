"""A Hugging Face model on real film reviews, before and after bert_fast.accelerate.

python examples/drop_in.py
"""

import time

import torch
import transformers

import bert_fast
from bert_fast.bench import data


def main(limit=64):
    directory = data.minilm()
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [text for _, text, _ in data.reviews()[:limit]]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")

    def timed():
        with torch.inference_mode():
            model(**inputs)
            began = time.perf_counter()
            hidden = model(**inputs).last_hidden_state
            return hidden[inputs["attention_mask"].bool()], time.perf_counter() - began

    before, slow = timed()
    bert_fast.accelerate(model, prepack=True)
    after, fast = timed()
    difference = (after - before).abs().max().item()
    print(f"{slow * 1e3:.0f} ms, then {fast * 1e3:.0f} ms; largest difference {difference:.0e}")
    return difference


if __name__ == "__main__":
    main()
