"""Prints the learning rates of each step by PyTorch's own schedulers: a line each for cosine, constant, wsd, two_stage."""
import sys, torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

total, warmup, decay, second = map(int, sys.argv[1:5])
lr, low, peak = map(float, sys.argv[5:8])
left = total - warmup

def rates(after):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    rise = LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    schedulers, milestones = after(optimizer)
    schedule = SequentialLR(optimizer, [rise, *schedulers], [warmup, *milestones])
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found

def fall(n):
    return low + (1 - low) * (1 - (n / decay) ** 0.5)

print(*rates(lambda o: ([CosineAnnealingLR(o, left, lr * low)], [])))
print(*rates(lambda o: ([ConstantLR(o, 1.0)], [])))
print(*rates(lambda o: ([ConstantLR(o, 1.0), LambdaLR(o, fall)], [total - decay])))
first, last = (rates(lambda o: ([LinearLR(o, factor, low, left)], [])) for factor in (1.0, peak))
print(*first[:second], *last[second:])
