"""Makes the golden data of tests/fixtures/bitbyte_tiny and bitbyte_tiny_no_act_quant.

    python3 tests/python/make_golden.py OUT TEXT [GIVEN]

writes OUT/bitbyte_tiny and OUT/bitbyte_tiny_no_act_quant for the training bytes TEXT. The committed folders were written
by the original program, which is not part of this repository. This script computes the same numbers with the independent
model in bitbytelm.py, from the same seeds; tests/it/make_golden.rs shows that they agree. On another CPU torch.randn may
differ in the last bit, and so may a rounding to int8: with GIVEN, a directory that holds such folders already, the
initial weights and the inputs of the building blocks are read from there instead of drawn. The script then fails where
the drawn ones differ by more than fp32 rounding.
"""

import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitbytelm import Block, BitLinear, BitByteLM, RMSNorm, act_quant, learning_rate, model_metadata, rope, ternary

SEED, OPS_SEED = 1234, 5
STES = ("clipped", "identity")
EVAL_SEQ_LEN, PROMPT, NEW_TOKENS = 48, "The quick ", 48
# The arguments of the original's training script; its trainer has no other configuration.
ARGS = {
    "n_layer": 2, "d_model": 64, "n_head": 4, "n_kv_head": None, "d_ff": 160, "data": "shards", "out": "ckpt.pt",
    "steps": 20, "lr": 0.003, "wd": 0.1, "warmup_frac": 0.1, "warmup_steps": None, "lr_schedule": "cosine",
    "lr_min_factor": 0.1, "grad_clip": 1.0, "batch_size": 2, "grad_accum": 1, "seq_len": 64, "seq_len_cap": None,
    "resume": None, "no_opt_state": False, "ddp": False, "use_sdpa": True, "no_ckpt": True, "no_act_quant": False,
    "log_every": 1, "save_every": 10, "allow_overwrite": False, "model_family": "bitbyte",
}
# Written into final_*.pt so that a reader meets a GradScaler's state; the run itself is in fp32.
SCALER = {"scale": 32768.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 17}


def new_model(args):
    torch.manual_seed(SEED)
    return BitByteLM(
        args["n_layer"], args["d_model"], args["n_head"], args["d_ff"], args["n_kv_head"], not args["no_act_quant"]
    )


def new_optimizer(model, args):
    return torch.optim.AdamW(model.parameters(), lr=args["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=args["wd"])


def save_checkpoint(path, step, model, optimizer, scaler, args):
    state = model.state_dict()
    state._metadata.clear()
    state._metadata.update(model_metadata(model))
    torch.save(
        {"step": step, "variant": "ar", "model_family": "bitbyte", "model": state, "opt": optimizer.state_dict(),
         "scaler": scaler, "args": args},
        path,
    )


def train(initial, ste, args, batches, path):
    """Trains from `initial`; returns the tensors and the numbers that are golden."""
    model = new_model(args)
    model.load_state_dict(initial)
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.clipped = ste == "clipped"
    optimizer = new_optimizer(model, args)
    tensors, trajectory = {}, []
    for step, batch in enumerate(batches):
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            tensors["logits0"] = logits.detach().clone()
            tensors |= {f"grad0.{ste}.{name}": p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args["grad_clip"])
        optimizer.step()
        trajectory.append({"step": step, "lr": lr, "loss": loss.item(), "grad_norm": norm.item()})
    tensors[f"final_logits.{ste}"] = model(batches[0][:, :-1]).detach()
    save_checkpoint(path, len(batches) - 1, model, optimizer, SCALER, args)
    return model, tensors, trajectory


@torch.no_grad()
def evaluate(model, data):
    """Mean loss over every byte after the first, in chunks that start without context."""
    total = 0.0
    for start in range(0, len(data) - 1, EVAL_SEQ_LEN):
        chunk = data[start : start + EVAL_SEQ_LEN + 1]
        total += F.cross_entropy(model(chunk[None, :-1])[0], chunk[1:], reduction="sum").item()
    loss = total / (len(data) - 1)
    return {"file": "text.bin", "seq_len": EVAL_SEQ_LEN, "bytes": len(data) - 1, "loss": loss,
            "bits_per_byte": loss / math.log(2)}


@torch.no_grad()
def greedy(model):
    tokens = torch.tensor([list(PROMPT.encode())])
    for _ in range(NEW_TOKENS):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return {"prompt": PROMPT, "max_new_tokens": NEW_TOKENS, "temperature": 0, "bytes": tokens[0].tolist()}


@torch.no_grad()
def building_blocks(given):
    """Inputs and outputs of each building block."""
    torch.manual_seed(OPS_SEED)
    drawn = {"op.x": 3 * torch.randn(2, 7, 64), "op.weight": 0.02 * torch.randn(24, 64)}
    drawn["op.rmsnorm.weight"] = 0.5 + torch.rand(64)
    drawn["op.rope.x"] = torch.randn(2, 4, 9, 16)
    # The original made two linear layers here, which drew their own weights.
    torch.nn.Linear(64, 24, bias=False), torch.nn.Linear(64, 24, bias=False)
    block = Block(ARGS["d_model"], ARGS["n_head"], ARGS["n_head"], ARGS["d_ff"], True)
    drawn |= {f"op.block.{name}": value for name, value in block.state_dict().items()}
    ops = inputs(drawn, given)
    block.load_state_dict({name: ops[f"op.block.{name}"] for name in block.state_dict()})

    x, weight, bias = ops["op.x"], ops["op.weight"], torch.linspace(-1, 1, 24)
    norm = RMSNorm(64)
    norm.weight.copy_(ops["op.rmsnorm.weight"])
    ops |= {
        "op.ternary.out": ternary(weight, False),
        "op.act_quant.out": act_quant(x),
        "op.bitlinear.bias": bias,
        "op.bitlinear.out": F.linear(act_quant(x), ternary(weight, False), bias),
        "op.bitlinear_noact.out": F.linear(x, ternary(weight, False)),
        "op.rmsnorm.out": norm(x),
        "op.rope.out": rope(ops["op.rope.x"]),
        "op.rope.out_from5": rope(ops["op.rope.x"], start=5),
        "op.block.out": block(x),
    }
    with sdpa_kernel(SDPBackend.MATH):
        ops["op.block.out_math_attention"] = block(x)
    return ops


def inputs(drawn, given):
    """`drawn`, or what `given` has in its place, which must be the same but for the last bits."""
    if given is None:
        return drawn
    for name, value in drawn.items():
        difference = ((value - given[name]).abs().max() / value.abs().max()).item()
        assert difference < 1e-6, f"{name}: drawn from the seed, it differs by {difference}"
    return {name: given[name].clone() for name in drawn}


def schedules():
    """Tables of the original's schedules, by their formulas."""

    def lr(step, warmup, total):
        args = {"warmup_steps": warmup, "steps": total, "lr": 2e-4, "lr_min_factor": 0.1}
        return {"step": step, "warmup_steps": warmup, "total_steps": total, "base_lr": 2e-4,
                "lr": learning_rate(step, args)}

    def seq_len(step, total, cap):
        progress = step / max(1, total)
        length = 2048 if progress < 0.2 else 4096 if progress < 0.5 else 8192
        return {"step": step, "total_steps": total, "cap": cap, "seq_len": min(length, cap or length)}

    return {
        "lr_for_step": [
            *(lr(step, 10, 100) for step in (0, 9, 10, 55, 99)), lr(0, 0, 50),
            *(lr(step, 6000, 200000) for step in (5999, 6000, 123456)),
        ],
        "seq_len_for_step": [
            *(seq_len(step, 100, None) for step in (0, 19, 20, 49, 50, 99)),
            seq_len(60, 100, 1024), seq_len(30, 100, 3000), seq_len(0, 0, None),
        ],
    }


def write_folder(folder, text, with_activations, given):
    os.makedirs(folder)
    args = ARGS | {"no_act_quant": not with_activations}
    given_tensors = given and load_file(f"{given}/golden.safetensors")
    model = new_model(args)
    initial = inputs(model.state_dict(), given and torch.load(f"{given}/init.pt")["model"])
    model.load_state_dict(initial)
    save_checkpoint(f"{folder}/init.pt", 0, model, new_optimizer(model, args), {}, args)
    with open(f"{folder}/text.bin", "wb") as file:
        file.write(text)

    data = torch.tensor(list(text))
    t, b = args["seq_len"], args["batch_size"]
    windows = [data[t * w : t * w + t + 1] for w in range(args["steps"] * b)]
    batches = torch.stack(windows).view(args["steps"], b, t + 1)
    tensors = {"batches": batches} | (building_blocks(given_tensors) if with_activations else {})
    meta = {
        "config": {key: args[key] for key in ("n_layer", "d_model", "n_head", "n_kv_head", "d_ff")}
        | {"act_quant": with_activations},
        "steps": args["steps"], "lr": args["lr"], "wd": args["wd"], "warmup_frac": args["warmup_frac"],
        "betas": [0.9, 0.95], "eps": 1e-8, "grad_clip": args["grad_clip"], "batch": b, "seq_len": t,
        "torch": torch.__version__, "dtype": "float32", "device": "cpu",
    }
    for ste in STES:
        model, found, trajectory = train(initial, ste, args, batches, f"{folder}/final_{ste}.pt")
        tensors |= found
        meta["loss0"] = trajectory[0]["loss"]
        meta |= {f"trajectory_{ste}": trajectory, f"eval_{ste}": evaluate(model, data), f"greedy_{ste}": greedy(model)}
    if with_activations:
        meta |= schedules()
    save_file({name: value.contiguous() for name, value in tensors.items()}, f"{folder}/golden.safetensors")
    with open(f"{folder}/meta.json", "w") as file:
        json.dump(meta, file, indent=1)


if __name__ == "__main__":
    out, text, *given = sys.argv[1:]
    torch.set_num_threads(1)
    with open(text, "rb") as file:
        text = file.read()
    for name, with_activations in (("bitbyte_tiny", True), ("bitbyte_tiny_no_act_quant", False)):
        write_folder(f"{out}/{name}", text, with_activations, given[0] + f"/{name}" if given else None)
