"""Plain PyTorch as a contender of `make bench`: trains the model of tests/python/bitbytelm.py.

Speaks as step.rs does: a configuration in JSON as the first argument, then on standard input how many steps to
train, answered by milliseconds, losses and peak memory. The second argument is `eager` or `compile`. The line
`profile N` is answered by the shares of N steps' time that went into matrix products and into attention, by
torch.profiler.
"""

import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "python"))
from bitbytelm import BitByteLM, BitLinear

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def drawn_as_bbt_does(model, seed):
    """Gives `model` the weights that bbt draws from `seed`: the same distributions, in the order of parameters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.tok_emb.weight.normal_(std=model.tok_emb.embedding_dim**-0.5)
        for module in model.modules():
            if isinstance(module, BitLinear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound)
    return model


def batches(path, rows, length, device):
    """Inputs and targets of the windows of a file in their order, pass after pass, on the device beforehand."""
    data = torch.frombuffer(bytearray(open(path, "rb").read()), dtype=torch.uint8).long()
    windows = data.unfold(0, length + 1, length)
    order = torch.arange(len(windows) * rows).view(-1, rows) % len(windows)
    ready = [windows[rows_of_step].to(device) for rows_of_step in order]
    while True:
        for tokens in ready:
            yield tokens[:, :-1], tokens[:, 1:]


def recomputing(block):
    """Lets `block` keep its input only, and compute the rest again in backward."""
    forward = block.forward
    block.forward = lambda x: checkpoint(forward, x, use_reentrant=False)


class Contender:
    def __init__(self, config, how):
        shape, optim, train, data = config["model"], config["optim"], config["train"], config["data"]
        self.device = torch.device(train["device"])
        self.dtype, self.grad_clip = AUTOCAST[train["precision"]], optim["grad_clip"]
        model = BitByteLM(shape["n_layer"], shape["d_model"], shape["n_head"], shape["d_ff"])
        self.model = drawn_as_bbt_does(model, train["seed"]).to(self.device)
        if train["checkpointing"]:
            for block in self.model.blocks:
                recomputing(block)
        self.loss = torch.compile(self.eager_loss) if how == "compile" else self.eager_loss
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), optim["lr"], optim["betas"], optim["eps"], optim["weight_decay"], fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.batches = batches(data["train"], train["batch_size"], data["seq_len"], self.device)

    def eager_loss(self, tokens, targets):
        return F.cross_entropy(self.model(tokens).flatten(0, 1).float(), targets.flatten())

    def step(self):
        tokens, targets = next(self.batches)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.loss(tokens, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()  # waits for the device, as bbt does at the end of a step

    def train(self, steps):
        ms, losses = [], []
        for _ in range(steps):
            began = time.perf_counter()
            losses.append(self.step())
            ms.append((time.perf_counter() - began) * 1e3)
        return {"ms": ms, "losses": losses, "peak_bytes": self.peak_bytes()}

    def peak_bytes(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))

    def profile(self, steps):
        with torch.profiler.profile() as profiler:
            seconds = sum(self.train(steps)["ms"]) / 1e3
        cuda = self.device.type == "cuda"
        spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profiler.key_averages()}
        share = lambda chosen: sum(us for key, us in spent.items() if chosen(key)) / 1e6 / seconds
        return {
            "products": share(PRODUCTS.__contains__),
            "attention": share(lambda key: key.startswith("aten::") and "attention" in key),
        }


def main():
    contender = Contender(json.loads(sys.argv[1]), sys.argv[2])
    for line in sys.stdin:
        *profile, steps = line.split()
        answer = contender.profile(int(steps)) if profile else contender.train(int(steps))
        print(json.dumps(answer), flush=True)


main()
