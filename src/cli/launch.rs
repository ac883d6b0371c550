//! `bbt launch`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::value_parser;

use super::UsageError;
use crate::launch::{Slurm, Supervisor, World, resolve};
use crate::libtorch::Store;

/// How long this machine may take to reach itself.
const STORE_TIMEOUT: Duration = Duration::from_secs(30);

/// The port of the store where nothing says otherwise: torchrun's.
const DEFAULT_PORT: u16 = 29500;

/// Start a distributed run: a process per GPU, on one machine or several
///
/// Examples:
///   bbt launch --nproc-per-node gpu -- train --config configs/base.yaml --ddp
///   bbt launch --nproc-per-node 2 --log-dir logs -- train --config configs/tiny.yaml --ddp
///   bbt launch --nnodes 2 --node-rank 0 --master-addr node0 --nproc-per-node 8 -- train …    on node0
///   bbt launch --nnodes 2 --node-rank 1 --master-addr node0 --nproc-per-node 8 -- train …    on node1
///   srun --ntasks-per-node=1 bbt launch --nproc-per-node 8 -- train …      Slurm says the rest
///
/// Each process gets torchrun's environment variables. What they say comes in whole lines, each after
/// its rank. When one fails the others are ended at once, and its last lines and exit status are the
/// launcher's own. Ctrl-C and SIGTERM go to every process, which saves and ends; the third one kills.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Processes on this machine: a number, `gpu` (one for each), `cpu` (one for each core), or `auto` (`gpu` where
    /// there are any, else `cpu`)
    #[arg(long, value_name = "N|gpu|cpu|auto", default_value = "1", value_parser = processes)]
    nproc_per_node: Processes,
    /// Number of machines; each runs this command [default: Slurm's, else 1]
    #[arg(long, value_name = "M", value_parser = value_parser!(u32).range(1..))]
    nnodes: Option<u32>,
    /// Which of the machines this one is, from 0 [default: Slurm's]
    #[arg(long, value_name = "K")]
    node_rank: Option<u32>,
    /// Host name or address of machine 0 [default: Slurm's; 127.0.0.1 for one machine]
    #[arg(long, value_name = "HOST")]
    master_addr: Option<String>,
    /// Port of machine 0 at which the processes meet [default: 29500; a free one for one machine]
    #[arg(long, value_name = "PORT")]
    master_port: Option<u16>,
    /// Write what each process says to DIR/rank-R.log, which is appended to, and show only rank 0
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,
    /// Run this instead of bbt: for tests
    #[arg(long, value_name = "PATH", hide = true)]
    program: Option<PathBuf>,
    /// What each process does: `train` and its flags
    #[arg(last = true, value_name = "COMMAND")]
    words: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Processes {
    Number(u32),
    PerGpu,
    PerCore,
    PerGpuOrCore,
}

fn processes(text: &str) -> Result<Processes, String> {
    match text {
        "gpu" => Ok(Processes::PerGpu),
        "cpu" => Ok(Processes::PerCore),
        "auto" => Ok(Processes::PerGpuOrCore),
        number => match number.parse() {
            Ok(number @ 1..) => Ok(Processes::Number(number)),
            _ => Err("expected a number of at least 1, `gpu`, `cpu` or `auto`".into()),
        },
    }
}

impl Processes {
    fn count(self) -> Result<u32, UsageError> {
        let gpus = || u32::try_from(tch::Cuda::device_count()).unwrap_or(0);
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        match self {
            Self::Number(number) => Ok(number),
            Self::PerCore => Ok(cores()),
            Self::PerGpuOrCore => Ok(Some(gpus()).filter(|&gpus| gpus > 0).unwrap_or_else(cores)),
            Self::PerGpu => Some(gpus()).filter(|&gpus| gpus > 0).ok_or_else(|| {
                UsageError("--nproc-per-node gpu: there is no GPU here (`bbt doctor` says why): give a number".into())
            }),
        }
    }
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let program = program(&args)?;
    let slurm = Slurm::read(|name| std::env::var(name).ok())?;
    let mut world = world(&args, slurm)?;
    // It is there until this function returns.
    let store = (world.node == 0).then(|| host_store(&world.master_addr, world.master_port)).transpose()?;
    if let Some(store) = &store {
        world.master_port = store.port();
    }
    Supervisor { program, args: args.words, world, log_dir: args.log_dir }.run()?;
    Ok(())
}

/// What every rank runs: this executable, unless a test has its own.
fn program(args: &Args) -> anyhow::Result<PathBuf> {
    const EXAMPLE: &str = "bbt launch --nproc-per-node 2 -- train --config configs/tiny.yaml --ddp";
    if let Some(program) = &args.program {
        return Ok(program.clone());
    }
    match args.words.first() {
        Some(word) if word == "train" => {
            // What is wrong with the flags is said here, once, and not by every rank.
            if let Err(error) = super::parsed(std::iter::once("bbt".into()).chain(args.words.iter().cloned())) {
                error.exit();
            }
            std::env::current_exe().context("cannot find this executable")
        }
        Some(word) => {
            let word = word.display();
            Err(UsageError(format!("`{word}` cannot be distributed, only `train` can: {EXAMPLE}")).into())
        }
        None => Err(UsageError(format!("nothing to launch: say what after `--`, as in {EXAMPLE}")).into()),
    }
}

/// What the flags say, and where they do not, Slurm.
fn world(args: &Args, slurm: Option<Slurm>) -> Result<World, UsageError> {
    // Somebody who asks for another number of nodes has other plans than Slurm.
    let slurm = slurm.filter(|slurm| args.nnodes.is_none_or(|nodes| nodes == slurm.nodes));
    let nodes = args.nnodes.or(slurm.as_ref().map(|slurm| slurm.nodes)).unwrap_or(1);
    let (node, first_host) = slurm.map(|slurm| (slurm.node, slurm.first_host)).unzip();
    let several = |flag: &str| UsageError(format!("--nnodes {nodes} needs {flag}, on every machine"));
    let (node, master_addr, master_port) = if nodes == 1 {
        (args.node_rank.unwrap_or(0), args.master_addr.clone().unwrap_or("127.0.0.1".into()), 0)
    } else {
        let node = args.node_rank.or(node).ok_or_else(|| several("--node-rank K, from 0"))?;
        let addr = args.master_addr.clone().or(first_host);
        (node, addr.ok_or_else(|| several("--master-addr HOST, that of machine 0"))?, DEFAULT_PORT)
    };
    if node >= nodes {
        return Err(UsageError(format!("--node-rank {node}: the nodes of --nnodes {nodes} are 0 to {}", nodes - 1)));
    }
    if nodes > 1 && args.master_port == Some(0) {
        return Err(UsageError(
            "--master-port 0 is any free port: with several machines give one that all know".into(),
        ));
    }
    let master_port = args.master_port.unwrap_or(master_port);
    Ok(World { nodes, node, local: args.nproc_per_node.count()?, master_addr, master_port })
}

/// Holds the store that the ranks meet at, on this machine, until it is dropped. Port 0 is a free one.
fn host_store(master_addr: &str, master_port: u16) -> anyhow::Result<Store> {
    resolve(master_addr, Duration::from_secs(5)).with_context(|| {
        format!("--master-addr {master_addr}: the name does not resolve on this machine: give another, or an address")
    })?;
    Store::serve(master_addr, master_port, STORE_TIMEOUT).with_context(|| {
        format!(
            "cannot hold the store of the ranks at {master_addr}:{master_port}: choose another --master-port, or a \
             --master-addr that is this machine's"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Args {
        let line = ["bbt", "launch"].iter().chain(words).map(OsString::from);
        match crate::cli::parsed(line).map(|cli| cli.command) {
            Ok(crate::cli::Command::Launch(args)) => args,
            Ok(_) => panic!("another subcommand"),
            Err(error) => panic!("{error}"),
        }
    }

    /// Nodes, node, local ranks, address and port of `line` under this step of Slurm.
    fn shape(line: &str, slurm: Option<(u32, u32)>) -> Result<(u32, u32, u32, String, u16), String> {
        let slurm = slurm.map(|(nodes, node)| Slurm { nodes, node, first_host: "first".into() });
        let args = parsed(&line.split_whitespace().collect::<Vec<_>>());
        let world = world(&args, slurm).map_err(|error| error.to_string())?;
        Ok((world.nodes, world.node, world.local, world.master_addr, world.master_port))
    }

    #[test]
    fn flags_win_over_slurm() {
        let at = |nodes, node, local, addr: &str, port| Ok((nodes, node, local, addr.to_string(), port));
        assert_eq!(shape("", None), at(1, 0, 1, "127.0.0.1", 0));
        assert_eq!(shape("--nproc_per_node 3 --master_port 5", None), at(1, 0, 3, "127.0.0.1", 5));
        assert_eq!(shape("--nnodes 2 --node-rank 1 --master-addr a", None), at(2, 1, 1, "a", 29500));
        assert_eq!(shape("--nproc-per-node 8", Some((2, 1))), at(2, 1, 8, "first", 29500));
        assert_eq!(shape("--nnodes 2 --master-port 7", Some((2, 1))), at(2, 1, 1, "first", 7));
        assert_eq!(shape("--node-rank 0 --master-addr b", Some((2, 1))), at(2, 0, 1, "b", 29500));
        assert_eq!(shape("--nnodes 1", Some((2, 1))), at(1, 0, 1, "127.0.0.1", 0));
        assert_eq!(shape("", Some((1, 0))), at(1, 0, 1, "127.0.0.1", 0));
    }

    #[test]
    fn what_is_missing_or_too_much_is_named() {
        for (line, word) in [
            ("--nnodes 2 --master-addr a", "--node-rank"),
            ("--nnodes 2 --node-rank 1", "--master-addr"),
            ("--nnodes 2 --node-rank 2 --master-addr a", "0 to 1"),
            ("--node-rank 1", "--node-rank 1"),
            ("--nnodes 2 --node-rank 1 --master-addr a --master-port 0", "--master-port 0"),
            ("--nnodes 3", "--node-rank"),
        ] {
            let error = shape(line, Some((2, 5)).filter(|_| line == "--nnodes 3")).expect_err(line);
            assert!(error.contains(word), "{line}: {error}");
        }
    }

    #[test]
    fn processes_are_a_number_or_per_device() {
        assert_eq!(processes("4"), Ok(Processes::Number(4)));
        assert_eq!(processes("auto"), Ok(Processes::PerGpuOrCore));
        for text in ["0", "-1", "x", "", "1.5", "GPU"] {
            assert!(processes(text).is_err(), "{text}");
        }
        assert!(Processes::PerCore.count().is_ok_and(|cores| cores >= 1));
    }
}
