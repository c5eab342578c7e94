"""A driver for Triton that launches nothing: its whole path on the host, on CPU tensors and for a
chip that need not be there."""

import torch


def stand_in(chip=90, launched=None):
    """Makes it Triton's, in this process. ``launched`` is called with what a launcher is given.

    Returns a dict of the current "device" and "stream", numbers."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    current = {"device": 0, "stream": 0}

    class Launcher:
        def __init__(self, src, metadata):
            pass

        def __call__(self, *given):
            if launched is not None:
                launched(given)

    class Utils:
        def get_device_properties(self, device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        def load_binary(self, name, kernel, shared, device):
            return 1, 2, 100, 0, 1024  # module, function, registers, spills, most threads

        def unload_module(self, module):
            pass

    class Driver:
        utils, launcher_cls = Utils(), Launcher

        def get_current_device(self):
            return current["device"]

        def get_current_stream(self, device):
            return current["stream"]

        def get_current_target(self):
            return GPUTarget("cuda", chip, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def map_python_to_cpp_type(self, kind):
            return kind

    driver.set_active(Driver())
    return current
