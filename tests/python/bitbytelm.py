"""BitByteLM in plain PyTorch: the independent account that bbt is tested against.

Parameter names, shapes and arithmetic are those of the original; quantizers are straight-through by
detach arithmetic. Run as a script it continues a training checkpoint, see `continue_training`.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import nn


def fp32(x):
    """x in fp32, whatever autocast made of it; fp64 stays, for tests that want exact numbers."""
    return x if x.dtype == torch.float64 else x.float()


# Where these are lists, each rounding appends how far the nearest element of each row is from turning.
margins = {"weights": None, "activations": None}


def rounded(x, what):
    if margins[what] is not None:
        margins[what].append((x - x.floor() - 0.5).abs().amin(-1))
    return x.round()


def ternary(w, clipped):
    gamma = w.detach().abs().mean().clamp(min=1e-8)
    wq = rounded((w.detach() / gamma).clamp(-1, 1), "weights") * gamma
    if clipped:
        w = torch.where(w.detach().abs() <= gamma, w, w.detach())
    return w + (wq - w).detach()


def act_quant(x):
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    xq = rounded(x.detach() / scale, "activations").clamp(-127, 127) * scale
    return x + (xq - x).detach()


class BitLinear(nn.Linear):
    def __init__(self, n_in, n_out, quantize_activations, clipped=False):
        super().__init__(n_in, n_out, bias=False)
        self.quantize_activations, self.quantize_weights, self.clipped = quantize_activations, True, clipped

    def forward(self, x):
        x = act_quant(fp32(x)) if self.quantize_activations else x
        w = fp32(self.weight)
        return F.linear(x, ternary(w, self.clipped) if self.quantize_weights else w)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        x = fp32(x)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


def rope(x, base=10000.0, start=0):
    half = x.shape[-1] // 2
    dtype = fp32(x).dtype
    inverse = 1 / base ** (torch.arange(half, device=x.device, dtype=dtype) / half)
    angles = torch.outer(torch.arange(start, start + x.shape[-2], device=x.device, dtype=dtype), inverse)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, d, n_head, n_kv_head, act):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, d // n_head
        self.q_proj = BitLinear(d, d, act)
        self.k_proj = BitLinear(d, n_kv_head * self.head_dim, act)
        self.v_proj = BitLinear(d, n_kv_head * self.head_dim, act)
        self.o_proj = BitLinear(d, d, act)

    def forward(self, x):
        b, t, d = x.shape
        heads = lambda y, n: y.view(b, t, n, self.head_dim).transpose(1, 2)
        q = rope(heads(self.q_proj(x), self.n_head))
        k = rope(heads(self.k_proj(x), self.n_kv_head))
        v = heads(self.v_proj(x), self.n_kv_head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    def __init__(self, d, d_ff, act):
        super().__init__()
        self.gate_up, self.down = BitLinear(d, 2 * d_ff, act), BitLinear(d_ff, d, act)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, d, n_head, n_kv_head, d_ff, act):
        super().__init__()
        self.n1, self.attn = RMSNorm(d), Attention(d, n_head, n_kv_head, act)
        self.n2, self.mlp = RMSNorm(d), MLP(d, d_ff, act)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.mlp(self.n2(x))


class BitByteLM(nn.Module):
    def __init__(self, n_layer, d_model, n_head, d_ff, n_kv_head=None, act_quant=True):
        super().__init__()
        self.tok_emb = nn.Embedding(256, d_model)
        nn.init.normal_(self.tok_emb.weight, std=1 / math.sqrt(d_model))
        heads = (n_head, n_kv_head or n_head)
        self.blocks = nn.ModuleList(Block(d_model, *heads, d_ff, act_quant) for _ in range(n_layer))
        self.norm_f = RMSNorm(d_model)
        self.lm_head = nn.Linear(d_model, 256, bias=False)
        self.lm_head.weight = self.tok_emb.weight

    def forward(self, tokens):
        x = self.tok_emb(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm_f(x))


def model_of(args):
    return BitByteLM(
        args["n_layer"], args["d_model"], args["n_head"], args["d_ff"], args["n_kv_head"], not args["no_act_quant"]
    )


def learning_rate(step, args):
    warmup = args["warmup_steps"] if args["warmup_steps"] is not None else int(args["warmup_frac"] * args["steps"])
    if step < warmup:
        return args["lr"] * (step + 1) / warmup
    progress = (step - warmup) / max(1, args["steps"] - warmup)
    low = args["lr_min_factor"]
    return args["lr"] * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer_class(name):
    if name == "adamw":
        return torch.optim.AdamW
    import bitsandbytes

    return {"adamw8bit": bitsandbytes.optim.AdamW8bit}[name]


def continue_training(source, text, stop, target, name, is_quantized):
    """Resumes `source` as a PyTorch trainer does (plain torch.load, strict state_dict, state of the optimizer `name`),
    trains on the windows of `text` in file order up to step `stop`, prints each loss, saves to `target`. Without
    `is_quantized`, weights and activations are left in full precision."""
    torch.manual_seed(0)
    checkpoint = torch.load(source)  # weights_only=True is the default
    args = checkpoint["args"]
    assert checkpoint["model_family"] == "bitbyte" and checkpoint["variant"] == "ar"
    model = model_of(args)
    model.load_state_dict(checkpoint["model"], strict=True)
    for module in model.modules():
        if isinstance(module, BitLinear) and not is_quantized:
            module.quantize_activations = module.quantize_weights = False
    shared = checkpoint["model"]["lm_head.weight"].data_ptr() == checkpoint["model"]["tok_emb.weight"].data_ptr()
    assert shared, "the tied head has a storage of its own"
    if "bbt" in checkpoint:  # and not of this script
        assert checkpoint["model"]._metadata == model_metadata(model), checkpoint["model"]._metadata
    optimizer = optimizer_class(name)(
        model.parameters(), lr=args["lr"], betas=(0.9, 0.95), weight_decay=args["wd"]
    )
    expected = set(optimizer.param_groups[0])
    assert set(checkpoint["opt"]["param_groups"][0]) == expected, (checkpoint["opt"]["param_groups"], expected)
    optimizer.load_state_dict(checkpoint["opt"])
    step = checkpoint["step"] + 1 if checkpoint["opt"]["state"] else 0
    data = torch.tensor(list(open(text, "rb").read()))
    t, b = args["seq_len"], args["batch_size"]
    while step < stop:
        rows = [data[t * w : t * w + t + 1] for w in range(step * b, step * b + b)]
        tokens = torch.stack(rows)
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args["grad_clip"])
        optimizer.step()
        print(loss.item())
        step += 1
    torch.save(
        {**{k: checkpoint[k] for k in ("variant", "model_family", "scaler", "args")}, "step": step - 1,
         "model": model.state_dict(), "opt": optimizer.state_dict()},
        target,
    )


def model_metadata(model):
    """The original's state_dict metadata: this model's, with the two modules that hold no parameter."""
    metadata = {}
    for name, version in model.state_dict()._metadata.items():
        metadata[name] = version
        if name.endswith("attn.o_proj"):
            metadata[name.replace("o_proj", "rope")] = version
        if name.endswith("mlp.down"):
            metadata[name.replace("down", "act")] = version
    return metadata


if __name__ == "__main__":
    source, text, stop, target, name, quantization = sys.argv[1:]
    continue_training(source, text, int(stop), target, name, quantization == "quantized")
