"""`make bench`: bbt beside plain PyTorch, in turns; docs/bench.md says how to read what comes out.

    PYTHONPATH=.libtorch python3 benches/compare.py STEP [DOCUMENT]

STEP is the built bench `step` (benches/step.rs); PyTorch's side is benches/torch_step.py. Prints a page in Markdown,
and puts it into DOCUMENT between the marks of its device. Contenders are processes that wait for a line on standard
input while another trains. The environment chooses:

    QUICK=1                     the main size only, fewer rounds
    DEVICE=cuda                 cpu unless given
    SIZES='2x128x2x384@8x256'   these sizes: layers x width x heads x d_ff @ windows x bytes, `+ckpt` for checkpointing
    ONLY='bbt bf16,eager bf16'  these contenders
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# By name: the program, and what it sets in the configuration.
CPU_CONTENDERS = {
    "bbt bf16": ("bbt", {"train.precision": "bf16"}),
    "bbt bf16, quant.kernel reference": ("bbt", {"train.precision": "bf16", "quant.kernel": "reference"}),
    "bbt fp32": ("bbt", {"train.precision": "fp32"}),
    "eager fp32": ("eager", {"train.precision": "fp32"}),
    "eager bf16": ("eager", {"train.precision": "bf16"}),
    "compile fp32": ("compile", {"train.precision": "fp32"}),
    "compile bf16": ("compile", {"train.precision": "bf16"}),
}
CUDA_CONTENDERS = {
    "bbt bf16": ("bbt", {"train.precision": "bf16"}),
    "bbt fp16": ("bbt", {"train.precision": "fp16"}),
    "eager bf16": ("eager", {"train.precision": "bf16"}),
    "eager fp16": ("eager", {"train.precision": "fp16"}),
    "compile bf16": ("compile", {"train.precision": "bf16"}),
}

DEVICES = {
    "cpu": {
        "contenders": CPU_CONTENDERS,
        "against": ["compile bf16", "eager fp32"],
        # The first is the main one.
        "sizes": ["6x384x6x1024@4x512", "2x128x2x384@8x256", "6x384x6x1024@2x1024"],
        "growth": {
            "layers": ["3x384x6x1024@4x512", "6x384x6x1024@4x512", "12x384x6x1024@4x512"],
            "width": ["6x256x4x768@4x512", "6x384x6x1024@4x512", "6x512x8x1408@4x512"],
            "length": ["6x384x6x1024@8x256", "6x384x6x1024@4x512", "6x384x6x1024@2x1024", "6x384x6x1024@1x2048"],
        },
        # Between its turns a contender keeps its process.
        "resident": True,
    },
    "cuda": {
        "contenders": CUDA_CONTENDERS,
        "against": ["compile bf16", "eager bf16"],
        "sizes": ["24x1536x16x4096@8x2048", "24x1536x16x4096@8x2048+ckpt"],
        "growth": {
            "layers": ["6x1536x16x4096@8x2048", "12x1536x16x4096@8x2048", "24x1536x16x4096@8x2048"],
            "length": ["24x1536x16x4096@16x1024", "24x1536x16x4096@8x2048", "24x1536x16x4096@4x4096"],
        },
        # One fills the device's memory: each turn begins anew.
        "resident": False,
    },
}

# Steps that compile, fill caches and give memory its shape; not counted.
WARM_UP = 3
STEPS = 5
ROUNDS, QUICK_ROUNDS = 5, 4
PROFILED = 3

# Largest loss of the last turn over the smallest: they train the same thing.
LOSSES_AGREE = 1.05


def configuration(size, device, settings):
    """bbt's configuration, which PyTorch's side reads, too. Without the paths."""
    shape = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)@(\d+)x(\d+)(\+ckpt)?", size)
    if not shape:
        sys.exit(f"SIZES: {size!r} is not LAYERSxWIDTHxHEADSxD_FF@WINDOWSxBYTES, with or without +ckpt")
    n_layer, d_model, n_head, d_ff, batch_size, seq_len = map(int, shape.groups()[:6])
    config = {
        "model": {"n_layer": n_layer, "d_model": d_model, "n_head": n_head, "d_ff": d_ff},
        "quant": {},
        "data": {"order": "sequential", "seq_len": seq_len},
        "optim": {
            "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0,
            "schedule": "constant", "warmup_steps": 0,
        },
        "train": {"batch_size": batch_size, "checkpointing": bool(shape[7]), "device": device, "seed": 0},
    }
    for key, value in settings.items():
        section, key = key.split(".")
        config[section][key] = value
    return config


class Contender:
    """One program at one size."""

    def __init__(self, name, size, device, step, work):
        self.name, self.size = name, size
        program, settings = DEVICES[device]["contenders"][name]
        config = configuration(size, device, settings)
        directory = pathlib.Path(tempfile.mkdtemp(dir=work))
        config["data"]["train"], config["train"]["out"] = str(work / "text"), str(directory / "run")
        python = [sys.executable, str(ROOT / "benches/torch_step.py")]
        self.command = [step, json.dumps(config)] if program == "bbt" else [*python, json.dumps(config), program]
        self.profiles = program != "bbt"
        self.bytes_per_step = config["train"]["batch_size"] * config["data"]["seq_len"]
        self.said = directory / "stderr"
        self.process, self.failure = None, None
        self.ms, self.losses, self.peak_bytes, self.shares = [], [], 0, {}

    def ask(self, line):
        """The answer to a line. None, with the reason in `failure`, from one that has failed."""
        if self.failure:
            return None
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said.open("w"), text=True
            )
            if not self.ask(str(WARM_UP)):
                return None
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        status = self.process.wait()
        said = self.said.read_text()
        print(f"{self.name}, {self.size}: status {status}\n{said}", file=sys.stderr)
        # An exception's last line, or anyhow's first.
        telling = re.findall(r"^\S*Error: .*", said, re.MULTILINE) or said.splitlines()[:1] or [f"status {status}"]
        self.failure = telling[-1]
        return None

    def turn(self, steps):
        answer = self.ask(str(steps))
        if answer:
            self.ms += answer["ms"]
            self.losses = answer["losses"]
            self.peak_bytes = answer["peak_bytes"]

    def profile(self):
        if self.profiles:
            self.shares = self.ask(f"profile {PROFILED}") or {}

    def end(self):
        """Lets the process go; a further question starts it anew."""
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def race(contenders, rounds, resident):
    """All train in turn, each round beginning with another."""
    try:
        for number in range(rounds):
            first = number % len(contenders)
            for contender in contenders[first:] + contenders[:first]:
                contender.turn(STEPS)
                if not resident:
                    contender.end()
            print(f"{contenders[0].size}: {number + 1} of {rounds} rounds", file=sys.stderr)
        for contender in contenders:
            contender.profile()
            if not resident:
                contender.end()
    finally:
        for contender in contenders:
            contender.end()


def rows(cells):
    return [f"| {' | '.join(map(str, row))} |" for row in cells]


def table(head, cells):
    return rows([head, ["---"] * len(head), *cells])


def comparison(contenders, against):
    """The table of one size."""
    medians = {c.name: statistics.median(c.ms) for c in contenders if not c.failure}

    def cells(c):
        if c.failure:
            return [c.name, "failed: " + c.failure.replace("|", "\\|")] + [""] * (len(head) - 2)
        ms = medians[c.name]
        low, _, high = statistics.quantiles(c.ms)
        times = [f"{medians[other] / ms:.2f}" if other in medians else "–" for other in against]
        shares = [f"{100 * c.shares[key]:.0f} %" if key in c.shares else "–" for key in ("products", "attention")]
        return [
            c.name, f"{ms:,.1f}", f"{low:,.1f} … {high:,.1f}", f"{c.bytes_per_step / ms * 1e3:,.0f}", *times,
            f"{c.peak_bytes / 2**20:,.0f}", *shares, f"{statistics.mean(c.losses):.3f}",
        ]

    head = ["", "ms per step", "quartiles", "bytes per second", *(f"speed ÷ {other}" for other in against)]
    head += ["peak memory, MiB", "products", "attention", "loss"]
    return table(head, map(cells, contenders))


def growth(contenders):
    """Sizes down, contenders across."""
    names = list(dict.fromkeys(c.name for c in contenders))
    ms = {(c.size, c.name): "failed" if c.failure else f"{statistics.median(c.ms):,.1f}" for c in contenders}
    sizes = dict.fromkeys(c.size for c in contenders)
    head = ["size", *(f"{name}, ms per step" for name in names)]
    return table(head, [[size, *(ms[size, name] for name in names)] for size in sizes])


def disagreement(contenders):
    """What is wrong with the losses at one size."""
    losses = {c.name: statistics.mean(c.losses) for c in contenders if not c.failure}
    # NaN is neither more nor less than anything, and so not within.
    if not all(loss <= LOSSES_AGREE * min(losses.values()) for loss in losses.values()):
        return [f"{contenders[0].size}: losses differ, these do not train the same: {losses}"]
    return []


def machine(device):
    """Where and when."""
    named = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    what = f"{named[1] if named else 'unknown CPU'}, threads: {os.environ['OMP_NUM_THREADS']}"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        what += ", " + subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    torch, day = importlib.metadata.version("torch"), datetime.date.today()
    chosen = [f"{key}={shlex.quote(os.environ[key])}" for key in ("QUICK", "DEVICE", "SIZES", "ONLY") if os.environ.get(key)]
    command = " ".join([*chosen, "make bench"])
    return f"{what}; torch {torch}; {day}; load average before {os.getloadavg()[0]:.1f}; `{command}`."


def put(document, device, page):
    """Replaces what stands between the marks of the device."""
    begin, end = f"<!-- {device}: written by make bench -->\n", f"<!-- {device}: end -->\n"
    before, rest = document.read_text().split(begin)
    document.write_text(before + begin + page + end + rest.split(end)[1])


def main():
    step, document = sys.argv[1], sys.argv[2:]
    device, quick = os.environ.get("DEVICE") or "cpu", bool(os.environ.get("QUICK"))
    if device not in DEVICES:
        sys.exit(f"DEVICE: {device!r} is none of {', '.join(DEVICES)}")
    plan = DEVICES[device]
    chosen = os.environ.get("SIZES", "").split()
    sizes = chosen or plan["sizes"][: 1 if quick else None]
    names = [name.strip() for name in os.environ.get("ONLY", "").split(",") if name.strip()] or list(plan["contenders"])
    if unknown := [name for name in names if name not in plan["contenders"]]:
        sys.exit(f"ONLY: {unknown[0]!r} is none of {', '.join(plan['contenders'])}")
    rounds = QUICK_ROUNDS if quick else ROUNDS
    # The same for all, and said.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

    page, wrong = [machine(device), ""], []
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        sources = sorted((ROOT / "src").rglob("*.rs"))
        (work / "text").write_bytes(b"\0".join(source.read_bytes() for source in sources))

        def raced(sizes, names):
            found = [Contender(name, size, device, step, work) for size, name in itertools.product(sizes, names)]
            race(found, rounds, plan["resident"])
            wrong.extend(f"{c.name}, {c.size}: {c.failure}" for c in found if c.failure)
            return found

        for size in sizes:
            found = raced([size], names)
            wrong += disagreement(found)
            page += [f"### {size}", "", *comparison(found, plan["against"]), ""]
        # The first: bbt as it comes.
        ours = [name for name in names if plan["contenders"][name][0] == "bbt"][:1]
        for what, sizes in {} if quick or chosen or not ours else plan["growth"].items():
            page += [f"### bbt by {what}", "", *growth(raced(sizes, ours)), ""]

    page = "\n".join(page) + "\n"
    print(page, end="")
    for path in document:
        put(pathlib.Path(path), device, page)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
