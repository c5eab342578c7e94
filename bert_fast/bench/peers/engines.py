"""Inference engines for a CPU, each of which takes a whole model."""

import tempfile
from pathlib import Path

import torch

from bert_fast.bench.contestant import Run
from bert_fast.bench.peers.hugging_face import HuggingFace
from bert_fast.bench.peers.layouts import on_device
from bert_fast.bench.peers.peer import Peer


class Engine(Peer):
    """An inference engine on the CPU in float32, from Hugging Face's checkpoint."""

    devices, dtypes, inference = ("cpu",), (torch.float32,), True
    slow_to_make = True

    @staticmethod
    def exportable(work):
        """Hugging Face's model with tensors alone going in and out."""
        model = HuggingFace("eager").load(work)

        class Exportable(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return self.model(input_ids, attention_mask).last_hidden_state

        return Exportable().eval()

    def model(self, work, inputs):
        _, packed = on_device(inputs, "cpu")
        engine = self.engine(work, inputs)
        return Run(lambda: [engine(batch) for batch in inputs], packed)


class OnnxRuntime(Engine):
    """The default export with the transformer optimizer's fusions on top; the plain export where
    ONNX Runtime cannot load its own fused graph (MiniLM's)."""

    name, package = "ONNX Runtime", "onnxruntime"

    def engine(self, work, inputs):
        import onnxruntime
        from onnxruntime.transformers import optimizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        providers = ["CPUExecutionProvider"]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            names = list(inputs[0])
            axes = {name: {0: "batch", 1: "seqlen"} for name in names} if len(inputs) > 1 else None
            torch.onnx.export(
                self.exportable(work), tuple(inputs[0].values()), path, input_names=names,
                **(dict(dynamic_axes=axes, dynamo=False) if axes else {}),
            )  # fmt: skip
            config = work.config
            fused = optimizer.optimize_model(
                str(path), "bert", num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
            )  # fmt: skip
            best = path.with_suffix(".fused.onnx")
            fused.save_model_to_file(str(best), use_external_data_format=True)
            try:
                session = onnxruntime.InferenceSession(best, options, providers=providers)
            except Exception:  # onnxruntime's exceptions have no common name
                session = onnxruntime.InferenceSession(path, options, providers=providers)
        wanted = {given.name for given in session.get_inputs()}

        def run(batch):
            arrays = {name: t.numpy() for name, t in batch.items() if name in wanted}
            return torch.from_numpy(session.run(None, arrays)[0])

        return run


class OpenVINO(Engine):
    name, package = "OpenVINO", "openvino"

    def engine(self, work, inputs):
        import openvino

        model = openvino.convert_model(self.exportable(work), example_input=dict(inputs[0]))
        threads = torch.get_num_threads()
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        engine = openvino.compile_model(model, "CPU", options)

        def run(batch):
            answer = engine({name: tensor.numpy() for name, tensor in batch.items()})[0]
            return torch.from_numpy(answer.copy())  # the engine writes over it next time

        return run


class CTranslate2(Engine):
    """Unpads by itself, as we do."""

    name, package = "CTranslate2", "ctranslate2"

    def engine(self, work, inputs):
        import json
        import shutil

        import ctranslate2
        import numpy as np

        with tempfile.TemporaryDirectory() as scratch:
            # Its converter still reads a key that transformers 5 no longer writes.
            source = shutil.copytree(work.checkpoint, Path(scratch) / "checkpoint")
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            config["position_embedding_type"] = "absolute"
            (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
            converter = ctranslate2.converters.TransformersConverter(str(source))
            converted = converter.convert(str(Path(scratch) / "converted"))
            encoder = ctranslate2.Encoder(
                converted, compute_type="float32", intra_threads=torch.get_num_threads()
            )
        unpadded = {}
        for batch in inputs:
            rows = zip(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True)
            unpadded[id(batch)] = [ids[:length].tolist() for ids, length in rows]

        def run(batch):
            output = encoder.forward_batch(unpadded[id(batch)])
            return torch.from_numpy(np.array(output.last_hidden_state))

        return run
