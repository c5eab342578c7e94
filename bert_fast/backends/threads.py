"""How many threads the ``cpu`` backend's kernels have, and torch's ops beside them."""

import ctypes
import os
import threading

import torch

from bert_fast import _C

_local = threading.local()


def num_threads():
    """Of our kernels: torch's, also where torch's own ops have but one."""
    return getattr(_local, "num_threads", 0) or torch.get_num_threads()


def _of_torch(name):
    """Where a C function is that torch's own ops call, or are linked with; 0: nowhere."""
    try:
        function = getattr(ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD), name)
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_set_openmp_threads = _of_torch("omp_set_num_threads")  # of the calling thread
_set_mkl_threads = _of_torch("MKL_Set_Num_Threads_Local")  # of it, too; returns what was


class WithoutOpenMP:
    """Meanwhile torch's ops in this thread run in it alone, and our kernels on its team. For the
    small steps around a model's layers in one call: each parallel loop of OpenMP would start
    threads that the layers have to end, and beside busy processes wait a time slice for them."""

    def __enter__(self):
        self.inside_another = getattr(_local, "num_threads", 0) > 0
        if not self.inside_another:
            _local.num_threads = torch.get_num_threads()
            self.mkl_threads = _C.put_on_team(True, _set_openmp_threads, 1, _set_mkl_threads, 1)

    def __exit__(self, *_):
        if not self.inside_another:
            openmp = _set_openmp_threads, _local.num_threads
            _C.put_on_team(False, *openmp, _set_mkl_threads, self.mkl_threads)
            _local.num_threads = 0
