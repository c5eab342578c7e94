"""What BERT is trained with: AdamW or LAMB, weight decay where it belongs, warm-up and decay."""

import torch


def parameter_groups(model, weight_decay):
    """Matrices decay; biases and layer-norm's vectors do not (Devlin et al.'s own code)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_then_linear_decay(optimizer, warmup, steps):
    """The learning rate rises for ``warmup`` steps, then falls to 0 at ``steps``."""

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (steps - step) / max(1, steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class LAMB(torch.optim.Optimizer):
    """You et al. 2020, algorithm 2: Adam's update, scaled by ‖weight‖ / ‖update‖ a tensor, for very
    large batches. Biases and layer-norm's vectors are not scaled, as in the authors' code."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()
                mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
                update = (mean / (1 - beta1**t)).div_(root).add_(p, alpha=group["weight_decay"])
                if p.ndim > 1:
                    weight, length = p.norm(), update.norm()
                    ratio = torch.where((weight > 0) & (length > 0), weight / length, 1.0)
                    update.mul_(ratio)
                p.add_(update, alpha=-group["lr"])
        return loss


OPTIMIZERS = {"adamw": torch.optim.AdamW, "lamb": LAMB}
