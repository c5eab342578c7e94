"""What every peer has in common."""

import torch

from bert_fast.extras import missing


class Absent(Exception):
    """Why a peer does not do a work."""


class Peer:
    name = ""
    package: str | None = None  # what must be installed
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    inference = False  # whether it has no backward
    same_masks = False  # whether its dropout drops what the definition's does
    slow_to_make = False  # then it is made once, and not anew for each block of rounds
    own_precision = False  # whether it chooses the format of each step: its error is its own
    ceiling = False  # a bound of the machine's, not a contestant: nothing to check

    def why_absent(self, work):
        """None, or the reason why it cannot do the work here."""
        if self.package and (reason := missing(self.package)) is not None:
            return reason
        if work.device not in self.devices:
            return f"runs on {' and '.join(self.devices)} alone"
        if work.dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"is set up for {known} alone"
        if work.backward and self.inference:
            return "has no backward"
        if getattr(work, "dropout_p", 0) and not (self.same_masks or self.ceiling):
            return "draws other dropout masks: its result cannot be checked"
        return None
