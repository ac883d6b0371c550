//! Training by many processes, one per rank: how they find each other, agree on what to do, and fail together.
//!
//! [`setup_ddp`] reads torchrun's variables and connects to the store; [`Ddp::check`] sees that all ranks mean
//! the same run; [`Ddp::join`] makes the process group. The collectives themselves are c10d's.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::net::{TcpStream, ToSocketAddrs};
use std::rc::Rc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::Device;

use super::watch::{Cause, OnFailure, Phase, Verdict, Watch};
use crate::config::{self, Config, DdpConfig, DeviceSpec};
use crate::data::ByteDataset;
use crate::launch::{RankEnv, resolve};
use crate::libtorch::{self, Backend, ProcessGroup, Store};
use crate::utils::optim::adamw8bit_kernel;

/// Why ranks cannot train together.
#[derive(Debug, thiserror::Error)]
pub enum DdpError {
    /// Rank 0 cannot hold the store.
    #[error("MASTER_PORT={port}: rank 0 cannot hold the store there: {source}: choose another port")]
    Serve {
        /// The port.
        port: u16,
        /// Why.
        source: libtorch::Error,
    },
    /// The name of the machine with the store is unknown here.
    #[error(
        "MASTER_ADDR={addr}: the name does not resolve on this machine ({source}): check it with `getent hosts {addr}`; {}",
        ALONE
    )]
    UnknownHost {
        /// The host.
        addr: String,
        /// The resolver's words.
        source: std::io::Error,
    },
    /// Nobody answers where the store should be.
    #[error(
        "MASTER_ADDR={addr}, MASTER_PORT={port}: rank {rank} got no answer from the store at {addr}:{port} within {seconds} s: is rank 0 or its launcher running there, and is the port open? ({source}); {}",
        ALONE
    )]
    Connect {
        /// This rank.
        rank: usize,
        /// The host.
        addr: String,
        /// The port.
        port: u16,
        /// How long it was tried.
        seconds: u64,
        /// libtorch's words.
        source: libtorch::Error,
    },
    /// Somebody is at the store's port who is no store.
    #[error(
        "MASTER_ADDR={addr}, MASTER_PORT={port}: something at {addr}:{port} takes connections, but did not answer rank {rank} as a store does within {seconds} s: is another program at that port? Choose another one for all ranks"
    )]
    Silent {
        /// This rank.
        rank: usize,
        /// The host.
        addr: String,
        /// The port.
        port: u16,
        /// How long it was tried.
        seconds: u64,
    },
    /// The network interface that Gloo is to use is not there.
    #[error(
        "GLOO_SOCKET_IFNAME={given}: no interface {name} on this machine is up and has an address; it has {found}: `ip -br addr` tells more"
    )]
    Interface {
        /// The variable's value.
        given: String,
        /// The name that is unknown.
        name: String,
        /// The names of the interfaces that there are.
        found: String,
    },
    /// The system refuses a thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// A rank did not come.
    #[error(
        "rank {rank} did not come within {seconds} s (ddp.timeout): were all {world_size} ranks of WORLD_SIZE={world_size} started? {}",
        capital(ALONE)
    )]
    Missing {
        /// The rank.
        rank: usize,
        /// How long it was waited for.
        seconds: u64,
        /// Number of ranks.
        world_size: usize,
    },
    /// Rank 0 did not say what to do.
    #[error("rank 0 said nothing within {seconds} s: {source}")]
    NoWord {
        /// How long it was waited for.
        seconds: u64,
        /// libtorch's words.
        source: libtorch::Error,
    },
    /// A rank means another run.
    #[error(
        "rank {rank} (on {host}) has {key} {theirs}, but rank 0 has {ours}: start every rank with the same program, configuration and data"
    )]
    Differs {
        /// The rank.
        rank: usize,
        /// Its machine.
        host: String,
        /// What differs.
        key: String,
        /// Its value.
        theirs: String,
        /// Rank 0's.
        ours: String,
    },
    /// Two ranks of one machine have the same GPU.
    #[error("ranks {first} and {second} (on {host}) both use {device}: give each rank of a machine its own LOCAL_RANK")]
    SharedDevice {
        /// One rank.
        first: usize,
        /// The other.
        second: usize,
        /// Their machine.
        host: String,
        /// The device.
        device: String,
    },
    /// There are fewer GPUs than ranks.
    #[error(
        "LOCAL_RANK={local_rank} has no GPU: this machine has {gpus}; start at most {gpus} ranks here (--nproc-per-node), or train on the CPU with --device cpu"
    )]
    TooFewGpus {
        /// This rank on its machine.
        local_rank: usize,
        /// Number of GPUs.
        gpus: i64,
    },
    /// A numbered device for several ranks.
    #[error("train.device: {0} is one device, but {1} ranks share this machine: use `cuda`, `cpu` or `auto`")]
    OneDevice(DeviceSpec, usize),
    /// The backend does not fit the device.
    #[error("ddp.backend: nccl works between GPUs, but the model is on the {0}: use auto or gloo")]
    NcclOnCpu(String),
    /// The group cannot be made.
    #[error("the ranks cannot form a process group: {0}")]
    Group(#[source] libtorch::Error),
    /// A collective failed.
    #[error("rank {rank}: {source}")]
    Lost {
        /// This rank.
        rank: usize,
        /// libtorch's words.
        source: libtorch::Error,
    },
    /// Parameters are not what they should be.
    #[error(
        "rank {rank} has other parameters than rank 0 after they were sent: its memory or the network damages data"
    )]
    Parameters {
        /// The rank.
        rank: usize,
    },
}

/// What helps where the variables are left over from another run.
const ALONE: &str = "to train as one process, `unset RANK WORLD_SIZE`";

fn capital(text: &str) -> String {
    let (first, rest) = text.split_at(text.len().min(1));
    first.to_uppercase() + rest
}

/// How long the name of the store's machine may stay unknown. A cluster may still be starting; a mistyped name should
/// not take all of `ddp.timeout`.
const NAME_UNKNOWN: Duration = Duration::from_secs(30);

/// What every rank says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub host: String,
    pub pid: u32,
    version: String,
    libtorch: String,
    device: String,
    /// The training bytes: how many, in how many shards, and a checksum of their beginnings and ends.
    data: String,
    config: String,
    /// Whose kernel steps 8-bit moments, which is to be the same: ranks step their copies of the weights by themselves.
    adamw8bit: Option<String>,
}

pub(super) fn hello(rank: usize) -> String {
    format!("hello/{rank}")
}

/// One rank's tie to the others.
pub struct Ddp {
    // Dropped from top to bottom: first who uses the store.
    /// Held here as well: a failure is to be reported before a closed connection tells the other ranks of it.
    group: OnceCell<Rc<ProcessGroup>>,
    watch: Watch,
    store: Store,
    /// The store itself, where this rank holds it.
    _server: Option<Store>,
    env: RankEnv,
    timeout: Duration,
}

/// Connects this rank to the others, as `torch.distributed.init_process_group` begins: waits up to `timeout` for
/// the store. `on_failure` is called from another thread when this process has to end because a rank was lost.
///
/// # Errors
/// No store, or none can be held.
pub fn setup_ddp(env: RankEnv, timeout: Duration, on_failure: OnFailure) -> Result<Ddp, DdpError> {
    let (addr, port) = (env.master_addr.as_str(), env.master_port);
    resolve(addr, timeout.min(NAME_UNKNOWN)).map_err(|source| DdpError::UnknownHost { addr: addr.into(), source })?;
    let server = match env.rank == 0 && !env.agent_store {
        true => Some(Store::serve(addr, port, timeout).map_err(|source| DdpError::Serve { port, source })?),
        false => None,
    };
    // Attempts of a restarted run share the launcher's store.
    let prefix = format!("bbt/{}", env.restart_count);
    let connect = || {
        Store::connect(addr, port, timeout, &prefix).map_err(|source| {
            let (rank, addr, seconds) = (env.rank, addr.to_string(), timeout.as_secs());
            match accepts(&addr, port) {
                true => DdpError::Silent { rank, addr, port, seconds },
                false => DdpError::Connect { rank, addr, port, seconds, source },
            }
        })
    };
    let store = connect()?;
    let holder = if env.agent_store { "held by the launcher" } else { "held by rank 0" };
    let store_name = format!("{holder} at {addr}:{port}");
    let watch = Watch::start(connect()?, store_name, env.rank, env.world_size, timeout, on_failure);
    Ok(Ddp { group: OnceCell::new(), watch: watch.map_err(DdpError::Thread)?, store, _server: server, env, timeout })
}

/// Whether somebody at `host`:`port` takes connections.
fn accepts(host: &str, port: u16) -> bool {
    let addresses = (host, port).to_socket_addrs().into_iter().flatten();
    addresses.take(4).any(|address| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())
}

/// The interface that Gloo says it cannot use, if that is what failed.
fn unknown_interface(error: &libtorch::Error) -> Option<DdpError> {
    let given = std::env::var("GLOO_SOCKET_IFNAME").ok()?;
    let name = error.text().split("Unable to find address for: ").nth(1)?.split_whitespace().next()?.to_string();
    let interfaces = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let mut found: Vec<String> = interfaces.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    found.sort();
    Some(DdpError::Interface { given, name, found: found.join(", ") })
}

impl Ddp {
    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.env.rank
    }

    /// Its number on this machine.
    pub fn local_rank(&self) -> usize {
        self.env.local_rank
    }

    /// Number of processes in all.
    pub fn world_size(&self) -> usize {
        self.env.world_size
    }

    /// Whether a launcher has restarted the run.
    pub fn restarted(&self) -> bool {
        self.env.restart_count > 0
    }

    /// Rank 0 tells the others `value`; they return it.
    ///
    /// # Errors
    /// Rank 0 says nothing.
    pub fn share<T: Serialize + DeserializeOwned>(&self, key: &str, value: Option<T>) -> Result<T, DdpError> {
        let no_word = |source| DdpError::NoWord { seconds: self.timeout.as_secs(), source };
        let failure = |error: serde_json::Error| no_word(libtorch::Error::Other(error.to_string()));
        match value {
            Some(value) => {
                let bytes = serde_json::to_vec(&value).map_err(failure)?;
                self.store.set(key, &bytes).map_err(no_word)?;
                Ok(value)
            }
            None => {
                let bytes = self.store.get(key, self.timeout).map_err(no_word)?;
                serde_json::from_slice(&bytes).map_err(failure)
            }
        }
    }

    /// The device of this rank: the GPU of its local rank, or the CPU.
    ///
    /// # Errors
    /// More ranks than GPUs, or one device named for several ranks.
    pub fn device(&self, spec: DeviceSpec) -> Result<DeviceSpec, DdpError> {
        let gpus = if tch::Cuda::is_available() { tch::Cuda::device_count() } else { 0 };
        match spec {
            DeviceSpec::Auto if gpus == 0 => Ok(DeviceSpec::Cpu),
            DeviceSpec::Cuda(index) if index > 0 && self.env.local_world_size > 1 => {
                Err(DdpError::OneDevice(spec, self.env.local_world_size))
            }
            DeviceSpec::Cuda(index) if index > 0 => Ok(spec),
            DeviceSpec::Auto | DeviceSpec::Cuda(_) if self.env.local_rank as i64 >= gpus && gpus > 0 => {
                Err(DdpError::TooFewGpus { local_rank: self.env.local_rank, gpus })
            }
            DeviceSpec::Auto | DeviceSpec::Cuda(_) => Ok(DeviceSpec::Cuda(self.env.local_rank)),
            DeviceSpec::Cpu => Ok(DeviceSpec::Cpu),
        }
    }

    /// Sees, on rank 0, that every rank means the same run: program, libtorch, configuration and training bytes.
    ///
    /// # Errors
    /// The first difference, or a rank that does not come.
    pub fn check(&self, config: &Config, device: Device, data: &dyn ByteDataset) -> Result<(), DdpError> {
        let own = Hello {
            host: hostname::get().map_or("?".into(), |name| name.to_string_lossy().into_owned()),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            libtorch: env!("BBT_TORCH_VERSION").into(),
            device: format!("{device:?}").to_lowercase(),
            data: data.fingerprint(),
            config: config.to_yaml(),
            adamw8bit: adamw8bit_kernel(config, device).ok().flatten().map(|kernel| kernel.name().into()),
        };
        let bytes = serde_json::to_vec(&own).unwrap_or_default();
        let rank = self.env.rank;
        self.store.set(&hello(rank), &bytes).map_err(|source| DdpError::Lost { rank, source })?;
        if rank != 0 {
            return Ok(());
        }
        let mut devices = BTreeMap::from([((own.host.clone(), own.device.clone()), 0)]);
        for rank in 1..self.env.world_size {
            let missing = DdpError::Missing { rank, seconds: self.timeout.as_secs(), world_size: self.env.world_size };
            let Some(theirs) = self.store.get(&hello(rank), self.timeout).ok() else { return Err(missing) };
            let Ok(theirs) = serde_json::from_slice::<Hello>(&theirs) else {
                return Err(differs(rank, "?", "program", "another version", "this one"));
            };
            own.compare(rank, &theirs)?;
            let place = (theirs.host.clone(), theirs.device.clone());
            if let (Some(first), true) = (devices.insert(place, rank), theirs.device.starts_with("cuda")) {
                return Err(DdpError::SharedDevice { first, second: rank, host: theirs.host, device: theirs.device });
            }
        }
        Ok(())
    }

    /// Makes the process group of all ranks, for tensors on `device`. It lives as long as this tie.
    ///
    /// # Errors
    /// The backend is missing or does not fit, or a rank does not come.
    pub fn join(&self, options: &DdpConfig, device: Device) -> Result<Rc<ProcessGroup>, DdpError> {
        let backend = match (options.backend, device) {
            (config::Backend::Auto, Device::Cuda(_)) | (config::Backend::Nccl, Device::Cuda(_)) => Backend::Nccl,
            (config::Backend::Nccl, _) => return Err(DdpError::NcclOnCpu(format!("{device:?}").to_lowercase())),
            (config::Backend::Auto | config::Backend::Gloo, _) => Backend::Gloo,
        };
        // Longer than the watch waits: it knows more than c10d's own timeout says.
        let timeout = self.timeout + Duration::from_secs(30);
        let group = ProcessGroup::new(&self.store, self.env.rank, self.env.world_size, backend, device, timeout)
            .map_err(|error| unknown_interface(&error).unwrap_or(DdpError::Group(error)))?;
        Ok(self.group.get_or_init(|| Rc::new(group)).clone())
    }

    /// The main thread begins `phase` of step `step` (from 0).
    pub fn enter(&self, phase: Phase, step: u64) {
        self.watch.enter(phase, step);
    }

    /// Runs a collective: `f`, whose failure means that another rank is lost.
    ///
    /// # Errors
    /// What `f` says.
    pub fn collective<T>(&self, f: impl FnOnce() -> Result<T, libtorch::Error>) -> Result<T, DdpError> {
        let (phase, step) = self.watch.phase();
        self.enter(Phase::Waiting, step);
        let result = f().map_err(|source| DdpError::Lost { rank: self.env.rank, source })?;
        self.enter(phase, step);
        Ok(result)
    }

    /// Reports that this rank cannot go on; `lost` where that is for a collective that failed. Says whether this
    /// rank is the one to tell the user, and what.
    pub fn fail(&self, message: String, lost: bool) -> Verdict {
        let cause = if lost { Cause::Others(message) } else { Cause::Own(self.of_rank(message)) };
        self.watch.fail(&self.store, cause)
    }

    fn of_rank(&self, message: String) -> String {
        if self.env.world_size == 1 || self.env.rank == 0 {
            message
        } else {
            format!("rank {}: {message}", self.env.rank)
        }
    }

    /// The run has ended on this rank: the others' ends are no failures any more.
    pub fn done(&self) {
        self.watch.done();
    }
}

fn differs(rank: usize, host: &str, key: &str, theirs: &str, ours: &str) -> DdpError {
    let text = |s: &str| s.to_string();
    DdpError::Differs { rank, host: text(host), key: text(key), theirs: text(theirs), ours: text(ours) }
}

/// Keys that may differ: where things lie on a machine, and its device's number.
const LOCAL_KEYS: [&str; 4] = ["data.train", "data.val", "train.out", "train.device"];

impl Hello {
    fn compare(&self, rank: usize, theirs: &Hello) -> Result<(), DdpError> {
        let pairs =
            [("bbt", &self.version, &theirs.version), ("libtorch", &self.libtorch, &theirs.libtorch)].into_iter();
        let data = [("data.train (bytes, shards, checksum)", &self.data, &theirs.data)];
        for (key, ours, other) in pairs {
            if ours != other {
                return Err(differs(rank, &theirs.host, key, other, ours));
            }
        }
        let (ours, others) = (flat(&self.config), flat(&theirs.config));
        let keys: std::collections::BTreeSet<&String> = ours.keys().chain(others.keys()).collect();
        for key in keys.into_iter().filter(|key| !LOCAL_KEYS.contains(&key.as_str())) {
            let value = |of: &BTreeMap<String, String>| of.get(key).cloned().unwrap_or("no such key".into());
            if ours.get(key) != others.get(key) {
                return Err(differs(rank, &theirs.host, key, &value(&others), &value(&ours)));
            }
        }
        for (key, ours, other) in data {
            if ours != other {
                return Err(differs(rank, &theirs.host, key, other, ours));
            }
        }
        let kind = |device: &str| device.split('(').next().unwrap_or_default().to_string();
        if kind(&self.device) != kind(&theirs.device) {
            return Err(differs(rank, &theirs.host, "train.device", &theirs.device, &self.device));
        }
        if self.adamw8bit != theirs.adamw8bit {
            let [theirs_is, ours_is] = [theirs, self].map(|of| of.adamw8bit.as_deref().unwrap_or("no kernel"));
            return Err(differs(rank, &theirs.host, "optim.name adamw8bit by", theirs_is, ours_is));
        }
        Ok(())
    }
}

/// `section.key` → value of a configuration in YAML.
fn flat(yaml: &str) -> BTreeMap<String, String> {
    let mut flat = BTreeMap::new();
    let sections: BTreeMap<String, BTreeMap<String, config::Value>> = config::yaml::parse(yaml).unwrap_or_default();
    for (section, keys) in sections {
        for (key, value) in keys {
            let value = serde_json::to_string(&value).unwrap_or_default();
            flat.insert(format!("{section}.{key}"), value);
        }
    }
    flat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_step_8_bit_moments_by_one_kernel() {
        let hello = |kernel: Option<&str>| Hello {
            host: "far".into(),
            pid: 1,
            version: "1".into(),
            libtorch: "2".into(),
            device: "cuda(0)".into(),
            data: "none".into(),
            config: Config::default().to_yaml(),
            adamw8bit: kernel.map(str::to_string),
        };
        let ours = hello(Some("bbt's own kernel"));
        assert!(ours.compare(1, &hello(Some("bbt's own kernel"))).is_ok());
        let error = ours.compare(1, &hello(Some("bitsandbytes' kernel"))).expect_err("another kernel").to_string();
        assert!(error.contains("(on far) has optim.name adamw8bit by bitsandbytes' kernel, but rank 0"), "{error}");
    }
}
