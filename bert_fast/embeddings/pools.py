"""Encoding by several processes, as sentence-transformers' pools do it."""

from __future__ import annotations

import math
import os
import traceback
from typing import Any

import torch


class Pools:
    """The methods of a model that has ``_encode(texts, **options)``."""

    def start_multi_process_pool(self, target_devices: list[str] | None = None) -> dict[str, Any]:
        """Starts a process for each device (default: every GPU, else four on the CPU, which share
        its cores), each with a copy of the model. For ``encode(..., pool=)``.

        Spawned, not forked: a script that calls this needs ``if __name__ == "__main__":``.
        """
        if target_devices is None:
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            target_devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"] * 4
        context = torch.multiprocessing.get_context("spawn")
        inputs, outputs = context.Queue(), context.Queue()
        on_cpu = sum(str(device) == "cpu" for device in target_devices)
        threads = max(1, (os.cpu_count() or 1) // max(on_cpu, 1))
        model, home = self, self.device  # type: ignore[attr-defined]
        self.to("cpu")  # type: ignore[attr-defined]
        processes = [
            context.Process(
                target=_work, args=(str(device), model, threads, inputs, outputs), daemon=True
            )
            for device in target_devices
        ]
        for process in processes:
            process.start()
        self.to(home)  # type: ignore[attr-defined]
        return {"input": inputs, "output": outputs, "processes": processes}

    @staticmethod
    def stop_multi_process_pool(pool: dict[str, Any]) -> None:
        """Ends the processes."""
        for process in pool["processes"]:
            process.terminate()
        for process in pool["processes"]:
            process.join()
            process.close()
        pool["input"].close()
        pool["output"].close()


def encode_in_pool(model, texts, pool, device, chunk_size, options):
    """The results of ``model._encode``, in the texts' order, by the processes of a pool, or of one
    that is started for ``device``, a list, and ended after."""
    if pool is not None:
        return _encode_in_pool(texts, pool, chunk_size, options)
    pool = model.start_multi_process_pool(list(device))
    try:
        return _encode_in_pool(texts, pool, chunk_size, options)
    finally:
        model.stop_multi_process_pool(pool)


def _encode_in_pool(texts, pool, chunk_size, options):
    count = len(pool["processes"])
    size = chunk_size or min(max(1, math.ceil(len(texts) / count / 10)), 5000)
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {size}")
    starts = range(0, len(texts), size)
    for number, start in enumerate(starts):
        pool["input"].put((number, texts[start : start + size], options))
    found = {}
    while len(found) < len(starts):
        number, results, error = _answer(pool)
        if error is not None:
            raise RuntimeError(f"a process of the pool failed:\n{error}")
        found[number] = results
    return [torch.from_numpy(result) for number in sorted(found) for result in found[number]]


def _answer(pool):
    import queue

    while True:
        try:
            return pool["output"].get(timeout=5)
        except queue.Empty:
            if not any(process.is_alive() for process in pool["processes"]):
                raise RuntimeError("the processes of the pool have ended") from None


def _work(device, model, threads, inputs, outputs):
    if device == "cpu":
        torch.set_num_threads(threads)
    model.to(device)
    while True:
        number, texts, options = inputs.get()
        try:
            found = [result.cpu().numpy() for result in model._encode(texts, **options)]
            outputs.put((number, found, None))
        except Exception:
            outputs.put((number, None, traceback.format_exc()))
