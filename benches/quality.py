"""`make quality`: which way of training learns better; docs/quality.md says what is compared and how to read it.

    python3 benches/quality.py BBT [DOCUMENT]

BBT is the program. Trains every variant on every corpus with every seed, as many at a time as there are cores, one
thread each, and prints a page in Markdown, which it puts into DOCUMENT between its marks. What is trained is kept in
`runs/quality`: interrupted, the next call goes on; a changed variant is trained anew. The environment chooses:

    ONLY='full precision; ternary'  these variants
    CORPORA=code                    these corpora
    SEEDS=1                         so many seeds
    STEPS=100                       so many optimizer steps
    WORK=runs/quality               where runs are kept

Takes about an hour on two cores.
"""

import concurrent.futures
import datetime
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What configs/ does: ternary weights, int8 activations, both with the identity as estimator. And what the rows below
# change of it.
BASE = {
    "model.n_layer": 4,
    "model.d_model": 160,
    "model.n_head": 5,
    "model.d_ff": 432,
    "quant.start_frac": 0.4,
    "data.seq_len": 256,
    "optim.lr": 1.5e-3,
    "optim.weight_decay": 0.0,
    "optim.schedule": "wsd",
    "train.batch_size": 4,
    "train.steps": 900,
    "train.precision": "bf16",
    "train.checkpointing": False,
    "train.device": "cpu",
    "train.log_every": 50,
    "train.internals_every": 0,
    "train.save_every": 0,
}
FULL = {"quant.weight": "none", "quant.act": "none"}
ORIGINAL = {"quant.ste": "clipped", "quant.act_ste": "none"}
DECAY = {"optim.weight_decay": 0.1}

# By name: what it changes.
VARIANTS = {
    "full precision, lr 1e-3": {**FULL, "optim.lr": 1e-3},
    "full precision": FULL,
    "ternary": {},
    "three times the learning rate": {"optim.lr": 4.5e-3},
    "ten times the learning rate": {"optim.lr": 1.5e-2},
    "activations in full precision": {"quant.act": "none"},
    "clipped estimator of the weights": {"quant.ste": "clipped"},
    "the original's rule, from the start": {**ORIGINAL, "quant.start_frac": 0.0},
    "quantized from the start": {"quant.start_frac": 0.0},
    "decay of everything": {**DECAY, "optim.decay": "all"},
    "decay of matrices only": {**DECAY, "optim.decay": "matrices"},
    "AdamW of 8 bits": {"optim.name": "adamw8bit"},
    "cosine": {"optim.schedule": "cosine"},
    "constant": {"optim.schedule": "constant"},
    "two stages, with decay": {**DECAY, "optim.schedule": "two_stage"},
}
# The rows that the others stand beside: the best of them, for it would be no feat to come near one badly trained.
REFERENCES = [name for name, changes in VARIANTS.items() if changes.get("quant.weight") == "none"]


def command(*words, **options):
    """What a command prints; its words on standard error where it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


# --- corpora ---------------------------------------------------------------------------------------

# The King James Version of the Bible, in the public domain, as Debian packages it; a book is a document.
PROSE_PACKAGES = ["bible-kjv", "bible-kjv-text"]
PROSE_SHA256 = "82fa5f3788c6a9a010fb128a0f0bf588984b5888a82058520620eded59b033ea"

# Handwritten Rust among what Cargo.lock pins, all under MIT or Apache-2.0; a file is a document.
CODE_CRATES = ["clap_builder", "ndarray", "nix", "regex-automata", "time", "tracing-subscriber", "zip"]


def prose(folder):
    """Writes a file for each book into `folder`."""
    with tempfile.TemporaryDirectory() as work:
        command("apt-get", "download", *PROSE_PACKAGES, cwd=work)
        for package in pathlib.Path(work).glob("*.deb"):
            command("dpkg-deb", "-x", package, work)
        usr = pathlib.Path(work, "usr")
        text = command(usr / "bin/bible", "-p", usr / "lib", "-l79", "gen1:1-rev22:21")
    if (found := hashlib.sha256(text.encode()).hexdigest()) != PROSE_SHA256:
        raise RuntimeError(f"bible-kjv-text is not the one that the table was made with: SHA-256 {found}")
    # Each chapter begins with a line of its own: the book's name and a number.
    for number, book in enumerate(re.split(r"^(?=(?:\d )?[A-Z][A-Za-z ]+ 1$)", text.lstrip(), flags=re.MULTILINE)):
        (folder / f"{number:02}.txt").write_text(book)


def code(folder):
    """Copies the sources of the crates into `folder`."""
    # Of one platform, as the Makefile's: of another it would download crates that nothing here needs.
    target = "--filter-platform=x86_64-unknown-linux-gnu"
    metadata = json.loads(command("cargo", "metadata", "--locked", "--format-version=1", target, cwd=ROOT))
    where = {package["name"]: pathlib.Path(package["manifest_path"]).parent for package in metadata["packages"]}
    for crate in CODE_CRATES:
        for source in where[crate].glob("src/**/*.rs"):
            target = folder / crate / source.relative_to(where[crate])
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


CORPORA = {"code": code, "prose": prose}


def corpus(name, bbt, work):
    """The folder of the packed corpus: made once, one byte in twenty held out."""
    packed = work / "corpora" / name
    if not packed.exists():
        with tempfile.TemporaryDirectory() as folder:
            CORPORA[name](pathlib.Path(folder))
            command(bbt, "pack", "--out", packed, "--val-frac", "0.05", folder)
    return packed


def sizes(packed):
    """Bytes to train on, and held out."""
    return [sum(shard.stat().st_size for shard in (packed / side).glob("*.bin")) for side in ("train", "val")]


# --- runs ------------------------------------------------------------------------------------------


def held_out(bbt, config, data, work):
    """Bits per byte over the held-out bytes after a run, which is kept."""
    key = hashlib.sha256(json.dumps([config, str(data)], sort_keys=True).encode()).hexdigest()[:16]
    run, result = work / key, work / f"{key}.json"
    if not result.exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        settings = [f"--set={name}={json.dumps(value)}" for name, value in config.items()]
        places = [f"--set=data.train={data / 'train'}", "--set=data.val=null", "--out", run, "--allow-overwrite"]
        command(bbt, "train", *settings, *places, env=environment)
        # Interrupted, it saves and exits as one that is done: what it has learnt by then is no result.
        rows = (run / "metrics.jsonl").read_text().splitlines()
        if not rows or json.loads(rows[-1])["step"] != config["train.steps"] - 1:
            raise RuntimeError(f"{run}: interrupted before its last step; the next call trains it anew")
        how = ["--seq-len", config["data.seq_len"], "--device", "cpu", "--precision", "bf16", "--json"]
        evaluation = ["--data", data / "val", *how]
        evaluation = command(bbt, "eval", "--ckpt", run / "ckpt.pt", *evaluation, env=environment)
        whole = result.with_suffix(".tmp")
        whole.write_text(json.dumps({"config": config, "held_out": json.loads(evaluation)}))
        whole.rename(result)
        # Of the run its log is of interest, not its weights.
        for checkpoint in run.glob("*.pt"):
            checkpoint.unlink()
    return json.loads(result.read_text())["held_out"]["bits_per_byte"]


# --- the page --------------------------------------------------------------------------------------


def cell(values, references):
    """Mean ± standard deviation, and the mean beside the least of the references' means."""
    mean = statistics.mean(values)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    best = min(map(statistics.mean, references), default=None)
    beside = f"{100 * (mean / best - 1):+.1f} %" if best else "–"
    return f"{mean:.3f}{spread} | {beside}"


def page(found, names, corpora, seeds, steps, work):
    named = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    chosen = [f"{key}={shlex.quote(os.environ[key])}" for key in ("ONLY", "CORPORA", "SEEDS", "STEPS") if os.environ.get(key)]
    seen = steps * BASE["train.batch_size"] * BASE["data.seq_len"]
    read = "; ".join("{}: {:,} bytes to train on, {:,} held out".format(name, *sizes(work / "corpora" / name)) for name in corpora)
    yield f"{named[1] if named else 'unknown CPU'}; {datetime.date.today()}; `{' '.join([*chosen, 'make quality'])}`."
    yield f"Seeds: {seeds}; bytes seen by each run: {seen:,}; {read}."
    yield ""
    yield "| variant | " + " | ".join(f"{name}, bits per byte | beside full precision" for name in corpora) + " |"
    yield "| --- " * (1 + 2 * len(corpora)) + "|"
    references = {c: [found[name, c] for name in REFERENCES if name in names] for c in corpora}
    for name in names:
        yield f"| {name} | " + " | ".join(cell(found[name, c], references[c]) for c in corpora) + " |"


def chosen(variable, known):
    """What the environment names of `known`; all of it unless it says."""
    names = [name.strip() for name in os.environ.get(variable, "").split(";") if name.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{variable}: {unknown[0]!r} is none of {'; '.join(known)}")
    return names


def main():
    bbt, documents = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2:]
    names, corpora = chosen("ONLY", VARIANTS), chosen("CORPORA", CORPORA)
    seeds, steps = int(os.environ.get("SEEDS") or 3), int(os.environ.get("STEPS") or BASE["train.steps"])
    work = pathlib.Path(os.environ.get("WORK") or ROOT / "runs" / "quality").resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = {name: corpus(name, bbt, work) for name in corpora}

    # Seeds outermost: interrupted, every row has as many.
    runs = [(seed, c, name) for seed in range(seeds) for c in corpora for name in names]

    def run(seed, c, name):
        config = {**BASE, "train.steps": steps, **VARIANTS[name], "train.seed": seed, "data.seed": seed}
        return held_out(bbt, config, data[c], work)

    found = {}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = pool.map(lambda what: run(*what), runs)
        try:
            for done, ((seed, c, name), result) in enumerate(zip(runs, results), 1):
                found.setdefault((name, c), []).append(result)
                print(f"{done} of {len(runs)}: {name}, {c}, seed {seed}: {result:.4f}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

    text = "\n".join(page(found, names, corpora, seeds, steps, work)) + "\n"
    print(text, end="")
    begin, end = "<!-- written by make quality -->\n", "<!-- end -->\n"
    for document in map(pathlib.Path, documents):
        before, rest = document.read_text().split(begin)
        document.write_text(before + begin + text + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
