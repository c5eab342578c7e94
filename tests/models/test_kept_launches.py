"""What is kept of a layer's launches from one forward to the next: nothing that belongs to either,
and only for forwards in which the same would be launched."""

import copy
import gc

import pytest
import torch
from repeating import (  # noqa: F401
    NO_TRITON,
    batch,
    check_repeated,
    drawn,
    on_device,
    repeated_layers,
    warm,
)

from bert_fast import backends, ops
from bert_fast.models import bert, repeat

pytestmark = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


@torch.no_grad()
def test_no_layer_keeps_anothers_tensors(on, repeated, monkeypatch):
    """A launch that is kept holds no tensor, so that the second layer's are gone when the third has
    run, and a forward's when it has ended."""
    model, inputs, held = drawn(on), batch(on), []
    warm(model, inputs)
    call = ops.Repeat.__call__

    def watched(self, *args):
        out = call(self, *args)
        launches = self.attention, self.norm, self.gelu, self.last_norm
        held.extend(isinstance(arg, torch.Tensor) for launch in launches for arg in launch.args)
        return out

    monkeypatch.setattr(ops.Repeat, "__call__", watched)
    model(*inputs)
    assert len(held) > 100
    assert not any(held)


@torch.no_grad()
def test_what_is_written_is_read(on, repeated, monkeypatch):
    """Of the parameters nothing is kept from one call to the next."""
    model, inputs = drawn(on), batch(on)
    warm(model, inputs)
    for parameter in model.layers.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    check_repeated(model, inputs, repeated, monkeypatch)


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
        check_repeated(model, inputs, repeated, monkeypatch)


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
        check_repeated(model, inputs, repeated, monkeypatch)


@torch.no_grad()
def test_the_longest_is_part_of_the_shape(on, repeated, monkeypatch):
    """As many tokens and sequences, but more keys than one block has."""
    model = drawn(on, max_position_embeddings=100)
    for lengths in ((30, 30), (50, 10), (30, 30)):
        inputs = of_lengths(on, *lengths, columns=50)
        warm(model, inputs)
        check_repeated(model, inputs, repeated, monkeypatch)


@torch.no_grad()
def test_a_buffer_of_fixed_size(on, repeated, monkeypatch):
    """Rows past the last token, in the same number of rows as without them."""
    model = drawn(on)
    inputs, others = of_lengths(on, 7, 3), of_lengths(on, 7, 1)
    warm(model, inputs)
    for given, options in ((others, {"capacity": 10}), (inputs, {}), (others, {"capacity": 10})):
        warm(model, inputs)
        model(*given, **options)
        check_repeated(model, given, repeated, monkeypatch, **options)


@torch.no_grad()
def test_threads_may_share_what_is_kept(on, repeated):
    """Nothing is written to it. (The interpreter has one thread.)"""

    def state(part):
        lists = ((k, [*v]) for k, v in vars(part).items() if isinstance(v, list | tuple))
        return vars(part) | dict(lists)

    def parts():
        for _, kept in repeat._kept[model.layers].values():
            yield from (kept, kept.attention, kept.norm, kept.gelu, kept.last_norm)

    model, inputs = drawn(on), batch(on)
    warm(model, inputs)
    before = [state(part) for part in parts()]
    repeated.clear()
    model(*inputs)
    assert len(repeated) == 3
    assert len(before) == 5
    for part, was in zip(parts(), before, strict=True):
        assert state(part) == was


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
    check_repeated(other, inputs, repeated, monkeypatch)


@torch.no_grad()
def test_projections_that_lie_otherwise_are_recorded_anew(on, repeated, monkeypatch):
    """As with accelerate(prepack=True) after accelerate: one product, then read by strides."""
    model, inputs = drawn(on), batch(on)

    def copied(plain):
        return plain._replace(project=lambda x: [t.contiguous() for t in plain.project(x)])

    known = bert.BertModel._describe
    warm(model, inputs)
    split = staticmethod(lambda *args: copied(known(*args)))
    monkeypatch.setattr(bert.BertModel, "_describe", split)
    check_repeated(model, inputs, repeated, monkeypatch, 0)
    assert not repeat._kept[model.layers]


@pytest.mark.parametrize("change", ["precision", "search", "hook", "table"])
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
        elif change == "table":
            patch.setitem(backends.ONLY_WHERE_MEASURED, "gelu", {})  # another backend's now
        else:
            assert not launch.is_watched(gelu._forward)
            patch.setattr(gelu._forward, "pre_run_hooks", [lambda *args, **options: None])
        repeated.clear()
        model(*inputs)
        alone = change == "table" or (change == "hook" and on != "cpu")
        assert len(repeated) == (0 if alone else 2)
    warm(model, inputs)
    repeated.clear()
    model(*inputs)
    assert len(repeated) == 3
