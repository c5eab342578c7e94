"""Contestants of bert-fast bench that are not there, or fail: all are named, with the reason."""

import pytest
import torch

from bert_fast.bench import report, run, works
from bert_fast.bench.contestant import Run
from bert_fast.bench.peers import Peer, Torch


def measured(work, who):
    return run.measure(work, who, rounds=2, blocks=2)


def test_absences_and_failures_are_listed_with_their_reasons():
    class Missing(Torch):
        name, package = "missing", "no_such_package"

    class Breaking(Peer):
        name = "breaking"

        def gelu(self, work, inputs):
            raise RuntimeError("no kernel image\nfor this device")

    work = works.Gelu(torch.float32, rows=8, width=16)
    rows = [measured(work, [Torch(), Missing(), Breaking()])]
    assert report.absences(rows) == {
        "missing": "the package no_such_package is not installed",
        "breaking": "RuntimeError: no kernel image",
    }
    assert list(rows[0]["results"]) == ["torch.nn.functional"]


@pytest.mark.parametrize("calls", [0, 5])
def test_who_fails_after_being_right_is_named(calls):
    """When it is made anew, or in a call."""

    class Failing(Torch):
        name, made, called = "failing", 0, 0

        def fail(self):
            raise RuntimeError("unspecified launch failure\nfor debugging consider")

        def gelu(self, work, inputs):
            self.made += 1
            if self.made > 1 and not calls:
                self.fail()
            right = super().gelu(work, inputs)

            def forward():
                self.called += 1
                return self.fail() if calls and self.called > calls else right.forward()

            return Run(forward, leaves=right.leaves, dout=right.dout)

    work = works.Gelu(torch.float32, rows=8, width=16)
    with pytest.raises(
        RuntimeError, match=r"^failing failed on .*: RuntimeError: unspec\w+ la.*re$"
    ):
        measured(work, [Torch(), Failing()])
