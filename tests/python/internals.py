"""What BitByteLM's layers are like inside, as a user of PyTorch would find out: by hooks, and by the gradients."""

import json
import sys
from collections import defaultdict

import torch
import torch.nn.functional as F
from bitbytelm import BitLinear, learning_rate, model_of
from torch import nn


def codes_of(w):
    gamma = w.detach().abs().mean().clamp(min=1e-8)
    return (w.detach() / gamma).clamp(-1, 1).round(), gamma.item()


def look_inside(source, text, steps, accumulate):
    """Trains from the weights of `source` on the windows of `text` in file order, prints each step's layers as JSON."""
    checkpoint = torch.load(source)
    args = checkpoint["args"]
    model = model_of(args)
    model.load_state_dict(checkpoint["model"], strict=True)
    rows, last = defaultdict(list), {}

    def hook(name):
        return lambda module, inputs: rows[name].append(inputs[0].detach().abs().amax(-1).flatten())

    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            module.register_forward_pre_hook(hook(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args["lr"], betas=(0.9, 0.95), weight_decay=args["wd"])
    data = torch.tensor(list(open(text, "rb").read()))
    t, b = args["seq_len"], args["batch_size"]
    for step in range(steps):
        rows.clear()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.zero_grad()
        for micro in range(step * accumulate, (step + 1) * accumulate):
            tokens = torch.stack([data[t * w : t * w + t + 1] for w in range(micro * b, micro * b + b)])
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            (loss / accumulate).backward()
        layers = []
        for name, parameter in model.named_parameters():
            layer = {"name": name.removesuffix(".weight"), "grad_norm": parameter.grad.norm().item()}
            if layer["name"] in rows:
                codes, layer["gamma"] = codes_of(parameter)
                absmax = torch.cat(rows[layer["name"]])
                fraction = lambda where: where.double().mean().item()
                layer |= {"zero": fraction(codes == 0), "plus": fraction(codes == 1), "minus": fraction(codes == -1)}
                layer |= {"input_absmax": absmax.max().item(), "input_absmax_mean": absmax.mean().item()}
                if name in last:
                    layer["flips"] = fraction(codes != last[name])
                last[name] = codes
            layers.append(layer)
        print(json.dumps({"step": step, "layers": layers}))
        nn.utils.clip_grad_norm_(model.parameters(), args["grad_clip"])
        optimizer.step()


if __name__ == "__main__":
    source, text, steps, accumulate = sys.argv[1:]
    look_inside(source, text, int(steps), int(accumulate))
