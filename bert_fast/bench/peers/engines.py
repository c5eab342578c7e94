"""Inference engines for a CPU, each of which takes a whole model."""

import tempfile
from pathlib import Path

import torch

from bert_fast.bench.contestant import Run
from bert_fast.bench.peers.hugging_face import HuggingFace
from bert_fast.bench.peers.layouts import on_device
from bert_fast.bench.peers.peer import Peer
from bert_fast.extras import missing


class Engine(Peer):
    """An inference engine on the CPU, from Hugging Face's checkpoint: in float32, and in the
    cheaper formats that it has."""

    devices, inference = ("cpu",), True
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    slow_to_make = True
    own_precision = True

    @staticmethod
    def exportable(work):
        """Hugging Face's model in float32 with tensors alone going in and out."""
        model = HuggingFace("eager").load(work.in_dtype(torch.float32))

        class Exportable(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return self.model(input_ids, attention_mask).last_hidden_state

        return Exportable().eval()

    def model(self, work, inputs):
        _, packed = on_device(inputs, "cpu")
        engine = self.engine(work, inputs, dynamic=len(inputs) > 1)
        return Run(lambda: [engine(batch) for batch in inputs], packed)

    def engine(self, work, inputs, dynamic):
        """A function from a batch (input_ids, attention_mask) to hidden states. ``inputs``: batches
        to trace by; ``dynamic``: whether others of other shapes will come."""
        raise NotImplementedError


class OnnxRuntime(Engine):
    """The default export with the transformer optimizer's fusions on top; the plain export where
    ONNX Runtime cannot load its own fused graph (MiniLM's). int8: dynamic quantisation, weights per
    channel, as sentence-transformers' ``export_dynamic_quantized_onnx_model``."""

    name, package = "ONNX Runtime", "onnxruntime"
    dtypes = (torch.float32, torch.int8)

    def engine(self, work, inputs, dynamic):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        providers = ["CPUExecutionProvider"]
        with tempfile.TemporaryDirectory() as scratch:
            plain, fused = self._graphs(work, inputs, dynamic, Path(scratch))
            try:
                session = onnxruntime.InferenceSession(fused(), options, providers=providers)
            except Exception:  # onnxruntime's exceptions have no common name
                session = onnxruntime.InferenceSession(plain(), options, providers=providers)
        wanted = {given.name for given in session.get_inputs()}

        def run(batch):
            arrays = {name: t.numpy() for name, t in batch.items() if name in wanted}
            return torch.from_numpy(session.run(None, arrays)[0])

        return run

    def _graphs(self, work, inputs, dynamic, scratch):
        """Functions that write the plain and the fused graph and say where."""
        from onnxruntime.transformers import optimizer

        path = scratch / "model.onnx"
        names = list(inputs[0])
        axes = {name: {0: "batch", 1: "seqlen"} for name in names}
        torch.onnx.export(
            self.exportable(work), tuple(inputs[0].values()), path, input_names=names,
            **(dict(dynamic_axes=axes, dynamo=False) if dynamic else {}),
        )  # fmt: skip

        def fused():
            config = work.config
            best = optimizer.optimize_model(
                str(path), "bert", num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size,
            )  # fmt: skip
            target = path.with_suffix(".fused.onnx")
            best.save_model_to_file(str(target), use_external_data_format=True)
            return target

        if work.dtype != torch.int8:
            return (lambda: path), fused
        return (lambda: _int8(path)), lambda: _int8(fused())


def _int8(path):
    """The graph with weights and activations in 8 bits, where its products are."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    quantize_dynamic(
        path, target, per_channel=True, weight_type=QuantType.QInt8,
        # Without VNNI sums of two products are cut at 16 bits: there weights take 7.
        reduce_range=not torch.cpu._is_vnni_supported(), use_external_data_format=True,
    )  # fmt: skip
    return target


class OpenVINO(Engine):
    """bfloat16: its hint of an inference precision. int8: nncf's quantisation of weights and
    activations after training, calibrated as sentence-transformers'
    ``export_static_quantized_openvino_model`` does; what is left is in OpenVINO's own choice."""

    name, package = "OpenVINO", "openvino"
    dtypes = (torch.float32, torch.bfloat16, torch.int8)

    def why_absent(self, work):
        reason = super().why_absent(work)
        return missing("nncf") if reason is None and work.dtype == torch.int8 else reason

    def engine(self, work, inputs, dynamic):
        import openvino

        model = openvino.convert_model(self.exportable(work), example_input=dict(inputs[0]))
        options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
        if work.dtype in hints:
            options["INFERENCE_PRECISION_HINT"] = hints[work.dtype]
        else:
            model = self._quantized(model, work)
        if not dynamic:
            shape = list(inputs[0]["input_ids"].shape)
            model.reshape({given.any_name: shape for given in model.inputs})
        engine = openvino.compile_model(model, "CPU", options)

        def run(batch):
            answer = engine({name: tensor.numpy() for name, tensor in batch.items()})[0]
            return torch.from_numpy(answer.copy())  # the engine writes over it next time

        return run

    @staticmethod
    def _quantized(model, work):
        import nncf

        batches = [
            {name: tensor.numpy() for name, tensor in batch.items()} for batch in work.calibration
        ]
        return nncf.quantize(
            model, nncf.Dataset(batches), subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER,
        )  # fmt: skip


class CTranslate2(Engine):
    """Unpads by itself, as we do. bfloat16 where its own library has it."""

    name, package = "CTranslate2", "ctranslate2"
    dtypes = (torch.float32, torch.bfloat16, torch.int8)

    def why_absent(self, work):
        reason = super().why_absent(work)
        if reason is None:
            import ctranslate2

            name = str(work.dtype).removeprefix("torch.")
            if name not in ctranslate2.get_supported_compute_types("cpu"):
                reason = f"has no {name} on this processor"
        return reason

    def engine(self, work, inputs, dynamic):
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
                converted, compute_type=str(work.dtype).removeprefix("torch."),
                intra_threads=torch.get_num_threads(),
            )  # fmt: skip

        def unpadded(batch):
            rows = zip(batch["input_ids"], batch["attention_mask"].sum(1).tolist(), strict=True)
            return [ids[:length].tolist() for ids, length in rows]

        known = {id(batch): (batch, unpadded(batch)) for batch in inputs}  # its batch lives as long

        def run(batch):
            _, rows = known.get(id(batch)) or (batch, unpadded(batch))
            output = encoder.forward_batch(rows)
            return torch.from_numpy(np.array(output.last_hidden_state)).float()

        return run
