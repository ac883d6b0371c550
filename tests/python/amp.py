"""What PyTorch's mixed precision does: `torch.amp.GradScaler`, and `torch.autocast` on the CPU."""

import json
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


def scale(cases):
    """Drives a GradScaler and AdamW through the steps of each case; prints what they are after each, as JSON."""
    for case in json.load(open(cases)):
        scaler = torch.amp.GradScaler("cpu")
        scaler.load_state_dict(case["state"])
        p = torch.nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        steps = []
        for gradient in case["gradients"]:
            optimizer.zero_grad()
            factor = torch.tensor([float(g) for g in gradient])
            scaler.scale((p * factor).sum()).backward()
            scaler.unscale_(optimizer)
            unscaled = p.grad.tolist()
            scaler.step(optimizer)
            scaler.update()
            taken = optimizer.state[p]["step"].item() if p in optimizer.state else 0.0
            state = scaler.state_dict()
            steps.append({"scale": state["scale"], "tracker": state["_growth_tracker"], "taken": taken,
                          "unscaled": [repr(g) for g in unscaled], "parameter": [repr(x) for x in p.tolist()]})
        print(json.dumps({"steps": steps, "state": scaler.state_dict()}))


def state_of(checkpoint):
    """The state of a GradScaler that goes on from a checkpoint, as JSON."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.load_state_dict(torch.load(checkpoint)["scaler"])
    print(json.dumps(scaler.state_dict()))


def operations(x, y, w, b):
    """The same, by the same names, as in amp.rs."""
    product = x.matmul(w)
    return {
        "matmul": product,
        "chained": product.matmul(w),
        "linear": F.linear(x, w, b),
        "bmm": torch.bmm(x.expand(2, -1, -1), y.expand(2, -1, -1).transpose(1, 2)),
        "sdpa": F.scaled_dot_product_attention(x[None, None], y[None, None], x[None, None]),
        "promoted": product + x,
        "cat": torch.cat([product, x], -1),
        "softmax": product.softmax(-1),
        "softmax of fp32": x.softmax(-1),
        "norm": product.norm(),
        "sum": product.sum(),
        "mse": F.mse_loss(product, y),
        "rms norm": F.rms_norm(x, [x.shape[-1]], b),
        "unlisted": x * y,
    }


def autocast(inputs, dtype, outputs):
    """Runs the operations and a backward through them under `torch.autocast`, as training does: backward outside."""
    tensors = load_file(inputs)
    # Copies: autocast keeps no cast of a view, which is what safetensors gives.
    x, y, w, b = (tensors[name].clone().requires_grad_() for name in "xywb")
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        found = operations(x, y, w, b)
    for name in ("chained", "linear", "mse"):
        grads = torch.autograd.grad(found[name].float().sum(), [x, w], retain_graph=True)
        found |= {f"{name}, gradient of {of}": grad for of, grad in zip("xw", grads)}
    found["after"] = x.matmul(w)
    save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, outputs)


if __name__ == "__main__":
    {"scale": scale, "state": state_of, "autocast": autocast}[sys.argv[1]](*sys.argv[2:])
