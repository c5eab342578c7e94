"""Hugging Face's own models, made faster where they stand: ``accelerate``, ``restore``, and
``attn_implementation="bert_fast"``, which importing this registers. bert_fast's own models are
elsewhere."""

from bert_fast.hugging_face import attention
from bert_fast.hugging_face.accelerated import accelerate, restore
from bert_fast.hugging_face.families import FAMILIES

__all__ = ["FAMILIES", "accelerate", "attention", "restore"]
