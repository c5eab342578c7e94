"""Translation: an encoder that is there already, a decoder and its vocabulary that are new."""

import dataclasses
from pathlib import Path

import torch

from bert_fast.embeddings.tokenizer import load_tokenizer
from bert_fast.extras import require
from bert_fast.files import atomic_path
from bert_fast.models import encoder_decoder
from bert_fast.models.config import BertConfig
from bert_fast.ops.cross_entropy import IGNORED
from bert_fast.text import DataError, read_lines, text_of
from bert_fast.training.corpus import SPECIAL
from bert_fast.training.tasks.task import Example, Feature, Task


class Translation(Task):
    """A text for a text: two aligned files, one text per line, or columns ``text`` and ``target``.
    The encoder is a checkpoint's; the decoder and its byte-level BPE vocabulary are new."""

    model = encoder_decoder.EncoderDecoderModel
    epochs, lr = 10, 5e-4  # a decoder that starts from nothing; chosen on LibreOffice's help
    decoder_layers, target_vocab, beams = 3, 8192, 4

    def configure(self, settings):
        for name in ("decoder_layers", "target_vocab", "beams"):
            setattr(self, name, getattr(settings, name))
        require("sacrebleu", "translation's BLEU")  # said before any time is spent

    def label(self, path, number, row):
        return text_of(path, number, row, "target")

    def read_aligned(self, path, targets):
        """Examples of two files, one text per line.

        Raises:
            DataError: naming the file and the line that has no text, or files that do not match.
        """
        sides = []
        for side in map(Path, (path, targets)):
            sides.append(read_lines(side))
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

    def fitted(self):
        return {"target_tokenizer": self.target_tokenizer.to_str()}

    def take(self, fitted):
        from tokenizers import Tokenizer

        self.target_tokenizer = Tokenizer.from_str(fitted["target_tokenizer"])

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

    def weight(self, feature):
        return float(len(feature.label))

    def features(self, tokenizer, examples, max_length, side="right"):
        """``side``: of the text; of its translation it is the end that is cut."""
        tokenizer.enable_truncation(max_length, direction=side)
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
