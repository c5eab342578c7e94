"""Optimizers, groups of parameters, the learning rate's schedule."""

import torch

from bert_fast.training import optim


def test_lamb_is_its_paper():
    """One step by hand, and a problem it solves."""
    weight, bias = torch.randn(3, 4), torch.randn(4)
    parameters = [torch.nn.Parameter(t.clone()) for t in (weight, bias)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optim.LAMB(parameters, lr=0.1, weight_decay=0.01).step()
    for p, was in zip(parameters, (weight, bias), strict=True):
        update = p.grad / (p.grad.abs() + 1e-6) + 0.01 * was
        ratio = was.norm() / update.norm() if was.ndim > 1 else 1
        torch.testing.assert_close(p.detach(), was - 0.1 * ratio * update, rtol=1e-4, atol=1e-5)
    x = torch.nn.Parameter(torch.randn(5, 5))
    optimizer = optim.LAMB([x], lr=0.05, weight_decay=0.0)
    target = torch.randn(5, 5)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (x - target).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_schedule_and_groups():
    model = torch.nn.Linear(3, 4)
    matrices, vectors = optim.parameter_groups(model, 0.1)
    assert matrices["params"] == [model.weight]
    assert vectors == {"params": [model.bias], "weight_decay": 0.0}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = optim.warmup_then_linear_decay(optimizer, 2, 6)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
