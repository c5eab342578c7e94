"""What is kept of a layer's launches from one forward to the next: nothing that belongs to either,
and only for forwards in which the same would be launched."""

import copy
import gc

import pytest
import torch
from repeating import (  # noqa: F401
    NO_TRITON,
    batch,
    drawn,
    on_device,
    one_by_one,
    repeated_layers,
    warm,
)

from bert_fast import ops
from bert_fast.models import bert, repeat

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


@torch.no_grad()
def test_no_layer_keeps_anothers_tensors(on, repeated, monkeypatch):
    """A launch that is kept holds no tensor, so that the second layer's are gone when the third has
    run, and a forward's when it has ended."""
    model, inputs, alive = drawn(on), batch(on), []
    warm(model, inputs)
    call = ops.Repeat.__call__

    def watched(self, *args):
        out = call(self, *args)
        launches = self.attention, self.norm, self.gelu, self.last_norm
        alive.extend(arg for launch in launches for arg in launch.args[: len(launch.places)])
        return out

    monkeypatch.setattr(ops.Repeat, "__call__", watched)
    model(*inputs)
    assert len(alive) == 3 * (6 + 6 + 3 + 6)
    assert all(arg is None for arg in alive)


@torch.no_grad()
def test_what_is_written_is_read(on, repeated, monkeypatch):
    """Of the parameters nothing is kept from one call to the next."""
    model, inputs = drawn(on), batch(on)
    warm(model, inputs)
    for parameter in model.layers.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    repeated.clear()
    found = model(*inputs)[0]
    assert len(repeated) == 3
    assert torch.equal(found, one_by_one(model, inputs, monkeypatch)[0])


def of_lengths(device, *lengths, columns=7):
    mask = torch.arange(columns) < torch.tensor(lengths)[:, None]
    return torch.randint(40, mask.shape).to(device), mask.long().to(device)


@torch.no_grad()
def test_other_sequences_of_the_same_numbers(on, repeated, monkeypatch):
    """So many sequences, tokens, and tokens in the longest: nothing else of them is kept."""
    model = drawn(on)
    warm(model, of_lengths(on, 7, 3, 4))
    for lengths in ((3, 7, 4), (0, 7, 7), (6, 7, 1)):
        inputs = of_lengths(on, *lengths)
        repeated.clear()
        found = model(*inputs)[0]
        assert len(repeated) == 3
        assert torch.equal(found, one_by_one(model, inputs, monkeypatch)[0])


@torch.no_grad()
def test_shapes_are_kept_apart(on, repeated, monkeypatch):
    model = drawn(on)
    shapes = (7, 3, 4), (7, 7), (6, 4, 4), (7, 3, 4, 0), (7, 4, 4), (7,)
    batches = [of_lengths(on, *lengths) for lengths in shapes]
    batches += [(batches[1][0],), of_lengths(on, 7, 3, 4, columns=9)]  # no mask; more columns
    for inputs in batches:
        model(*inputs)
    for inputs in batches:  # on a GPU the kernels are compiled now
        model(*inputs)
    for inputs in batches:
        repeated.clear()
        found = model(*inputs)[0]
        assert len(repeated) == 3
        assert torch.equal(found, one_by_one(model, inputs, monkeypatch)[0])


@torch.no_grad()
def test_a_bounded_number_is_kept(on, repeated, monkeypatch):
    monkeypatch.setattr(repeat, "MOST_KEPT", 2)
    model = drawn(on)
    batches = [of_lengths(on, length) for length in (3, 5, 6)]
    for inputs in batches:
        warm(model, inputs)
    numbers = []
    for inputs in reversed(batches):
        repeated.clear()
        model(*inputs)
        numbers.append(len(repeated))
    assert numbers == [3, 3, 2]
    assert len(repeat._kept[model.layers]) == 2


@torch.no_grad()
def test_copies_start_anew(on, repeated, monkeypatch):
    model, inputs = drawn(on), batch(on)
    warm(model, inputs)
    other = copy.deepcopy(model)
    assert other.layers not in repeat._kept
    warm(other, inputs)
    del model
    gc.collect()
    repeated.clear()
    assert torch.equal(other(*inputs)[0], one_by_one(other, inputs, monkeypatch)[0])
    assert len(repeated) == 3


@torch.no_grad()
def test_projections_that_lie_otherwise_are_recorded_anew(on, repeated, monkeypatch):
    """As with accelerate(prepack=True) after accelerate: one product, then read by strides."""
    model, inputs = drawn(on), batch(on)

    def copied(plain):
        apart = plain._replace(project=lambda x: [t.contiguous() for t in plain.project(x)])
        return apart

    known = bert.BertModel._describe
    warm(model, inputs)
    split = staticmethod(lambda *args: copied(known(*args)))
    monkeypatch.setattr(bert.BertModel, "_describe", split)
    repeated.clear()
    found = model(*inputs)[0]
    assert not repeated
    assert torch.equal(found, one_by_one(model, inputs, monkeypatch)[0])
    assert not repeat._kept[model.layers]


@pytest.mark.parametrize("change", ["precision", "search", "hook"])
@torch.no_grad()
def test_what_launches_depend_on(on, change, repeated, monkeypatch):
    """Where it is another than it was, the first layer runs as it stands."""
    from bert_fast.kernels import common, gelu, launch, tuning

    model, inputs = drawn(on), batch(on)
    warm(model, inputs)
    with monkeypatch.context() as patch:
        if change == "precision":
            patch.setattr(common, "precision", lambda: "tf32")
        elif change == "search":
            patch.setattr(tuning, "is_asked", lambda: True)
            patch.setattr(tuning, "run", lambda kernel, settings, search, launch: launch(settings))
        else:
            assert not launch.is_watched(gelu._forward)
            patch.setattr(gelu._forward, "pre_run_hooks", [lambda *args, **options: None])
        repeated.clear()
        model(*inputs)
        assert len(repeated) == (0 if change == "hook" and on != "cpu" else 2)
    repeated.clear()
    model(*inputs)
    assert len(repeated) == 3
