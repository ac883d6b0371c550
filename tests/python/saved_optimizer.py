"""Loads a checkpoint's optimizer into torch.optim.AdamW and compares the learning rate and weight decay of its group."""
import sys, torch
checkpoint = torch.load(sys.argv[1])
params = [torch.nn.Parameter(v) for k, v in checkpoint["model"].items() if k != "lm_head.weight"]
optimizer = torch.optim.AdamW(params)
optimizer.load_state_dict(checkpoint["opt"])
group, = optimizer.param_groups
assert (group["lr"], group["weight_decay"]) == (float(sys.argv[2]), float(sys.argv[3])), group
assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in params)
