"""AdamW with two parameter groups over given gradients, learning rates and weight decays. A step with gradients that are
not finite is skipped, as GradScaler does."""
import json, sys, torch
from safetensors.torch import load_file, save_file
given, rates, decays = load_file(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
names = sorted(name for name in given if name.startswith("p"))
params = [torch.nn.Parameter(given[name].clone()) for name in names]
optimizer = torch.optim.AdamW(
    [{"params": [p for p in params if p.ndim >= 2]}, {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}],
    betas=(0.9, 0.95), eps=1e-8)
for step, (lr, decay) in enumerate(zip(rates, decays)):
    for name, p in zip(names, params):
        p.grad = given[f"g{step}{name}"].clone()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = decay
    if all(p.grad.isfinite().all() for p in params):
        optimizer.step()
save_file({name: p.detach() for name, p in zip(names, params)}, sys.argv[4])
