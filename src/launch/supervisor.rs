//! Starts the ranks of one node, and stays until the last has ended.

use std::ffi::OsString;
use std::io::{self, PipeReader};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use super::output::Destination;
use super::process::Process;
use super::signals::{Signal, SignalListener};
use super::{LaunchError, World};

/// What is passed on to the ranks.
const LISTENED: [Signal; 5] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

/// At this signal the ranks are not asked any more.
const LAST_SIGNAL: usize = 3;

/// The ranks of one node: a program, run once for each.
#[derive(Debug, Clone)]
pub struct Supervisor {
    /// The program.
    pub program: PathBuf,
    /// Its arguments, the same for every rank.
    pub args: Vec<OsString>,
    /// How many there are, here and elsewhere.
    pub world: World,
    /// Where each rank gets a file `rank-R.log`, if anywhere. Only rank 0's lines are then shown.
    pub log_dir: Option<PathBuf>,
}

/// What the supervisor waits for.
enum Event {
    /// The process of this local rank has ended.
    Ended(usize),
    /// To be passed on.
    Signal(Signal),
    /// One of the ranks' streams is read to its end, or cannot be passed on.
    Read(Result<(), LaunchError>),
}

struct Rank {
    rank: u64,
    process: Process,
    destination: Arc<Destination>,
}

impl Supervisor {
    /// Runs the ranks until all have ended with status 0, or one has not: the others are then ended at once, with
    /// SIGKILL. Whatever a rank leaves of its process group ends with it.
    ///
    /// What they say goes to this process's streams in whole lines, each after `[rankR]: ` where there are more
    /// than one. SIGINT and SIGTERM to this process (SIGHUP as SIGTERM) are passed on to every rank, which may take
    /// its time to save; the third one ends them. SIGUSR1 and SIGUSR2 are passed on as often as they come. These
    /// signals do nothing else in this process from here on; those that it was started with ignored stay ignored. The
    /// ranks get SIGKILL when the calling thread ends, however it does.
    ///
    /// # Errors
    /// A rank failed, cannot be started, or has nowhere to write to.
    pub fn run(&self) -> Result<(), LaunchError> {
        let (sender, events) = mpsc::channel();
        let to_events = sender.clone();
        // A terminal that hangs up asks as SIGTERM does.
        let passed_on = move |signal| match signal {
            Signal::SIGHUP => Signal::SIGTERM,
            other => other,
        };
        let listening = SignalListener::start(&LISTENED, move |signal| {
            drop(to_events.send(Event::Signal(passed_on(signal))));
        });
        let _listener = listening.map_err(LaunchError::Signals)?;
        // An ended child would leave no status where SIGCHLD is ignored.
        let sigchld = signal_hook::flag::register(Signal::SIGCHLD as i32, Arc::default());
        sigchld.map_err(LaunchError::Signals)?;

        let (ended, end) = io::pipe().map_err(|source| self.cannot_start(source))?;
        let mut node = Node { ranks: vec![], unread: 0, events };
        let started = self.start(&mut node, &sender, &Arc::new(ended));
        let watched = started.map_err(Stopped::Otherwise).and_then(|()| node.watch());
        // All at once, then wait: dropping them would do both for one after the other.
        node.ranks.iter().for_each(|rank| rank.process.kill());
        for rank in &mut node.ranks {
            rank.process.reap();
        }
        drop(end);
        let read = node.read_to_the_end();
        match watched {
            Ok(()) => read,
            Err(Stopped::Failed(failed)) => Err(node.failure(&failed)),
            Err(Stopped::Otherwise(error)) => Err(error),
        }
    }

    /// Starts the ranks, and for each a thread that waits for its end and two that read what it says.
    fn start(&self, node: &mut Node, events: &Sender<Event>, ended: &Arc<PipeReader>) -> Result<(), LaunchError> {
        for index in 0..self.world.local {
            let rank = self.world.rank(index);
            let destination = Arc::new(self.destination(rank)?);
            let (process, pipes) = Process::start(self.command(index)).map_err(|source| self.cannot_start(source))?;
            let wait = process.waiter();
            node.ranks.push(Rank { rank, process, destination: destination.clone() });
            self.in_background(events, move || {
                wait();
                Event::Ended(index as usize)
            })?;
            for (stream, pipe) in pipes {
                let (destination, ended) = (destination.clone(), ended.clone());
                self.in_background(events, move || Event::Read(destination.follow(stream, pipe, &ended)))?;
                node.unread += 1;
            }
        }
        Ok(())
    }

    fn in_background(
        &self,
        events: &Sender<Event>,
        work: impl FnOnce() -> Event + Send + 'static,
    ) -> Result<(), LaunchError> {
        let events = events.clone();
        let spawned = thread::Builder::new().spawn(move || drop(events.send(work())));
        spawned.map(drop).map_err(|source| self.cannot_start(source))
    }

    fn destination(&self, rank: u64) -> Result<Destination, LaunchError> {
        match &self.log_dir {
            Some(dir) => Destination::log(&dir.join(format!("rank-{rank}.log")), rank == 0),
            None if self.world.size() == 1 => Ok(Destination::console(String::new())),
            None => Ok(Destination::console(format!("[rank{rank}]: "))),
        }
    }

    fn command(&self, local_rank: u32) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.world.variables(local_rank));
        if std::env::var_os("OMP_NUM_THREADS").is_none() {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            let threads = (cores / self.world.local as usize).max(1);
            command.env("OMP_NUM_THREADS", threads.to_string());
        }
        command
    }

    fn cannot_start(&self, source: io::Error) -> LaunchError {
        LaunchError::Start { program: self.program.clone(), source }
    }
}

/// Why the ranks are to be ended.
enum Stopped {
    /// These have failed, the one that was first before the others.
    Failed(Vec<(usize, ExitStatus)>),
    Otherwise(LaunchError),
}

/// The ranks under way.
struct Node {
    ranks: Vec<Rank>,
    /// How many of their streams are not yet read to the end.
    unread: usize,
    events: Receiver<Event>,
}

impl Node {
    /// Waits until all ranks have ended with status 0.
    fn watch(&mut self) -> Result<(), Stopped> {
        let (mut running, mut signals) = (self.ranks.len(), 0);
        while running > 0 {
            // The threads of those running see to it that something comes.
            let Ok(event) = self.events.recv() else { break };
            match event {
                Event::Ended(index) => {
                    running -= 1;
                    let status = self.ranks[index].process.reap();
                    if !status.success() {
                        return Err(Stopped::Failed(self.failed(index, status)));
                    }
                }
                // A cluster's warning, which does not end the run.
                Event::Signal(signal @ (Signal::SIGUSR1 | Signal::SIGUSR2)) => {
                    self.ranks.iter().for_each(|rank| rank.process.signal(signal));
                }
                Event::Signal(signal) => {
                    signals += 1;
                    if signals == LAST_SIGNAL {
                        return Err(Stopped::Otherwise(LaunchError::Interrupted(signal)));
                    }
                    self.ranks.iter().for_each(|rank| rank.process.signal(signal));
                }
                Event::Read(read) => {
                    self.unread -= 1;
                    read.map_err(Stopped::Otherwise)?;
                }
            }
        }
        Ok(())
    }

    /// The rank at `first`, which has failed with `status`, and those that have failed by now, too.
    fn failed(&mut self, first: usize, status: ExitStatus) -> Vec<(usize, ExitStatus)> {
        let mut failed = vec![(first, status)];
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            if index != first && rank.process.has_ended() {
                failed.push((index, rank.process.reap()));
            }
        }
        failed.retain(|(_, status)| !status.success());
        failed
    }

    /// Waits until everything that the ranks have said is passed on. Where nobody takes it, another signal ends
    /// the wait.
    fn read_to_the_end(&mut self) -> Result<(), LaunchError> {
        let mut result = Ok(());
        while self.unread > 0 {
            match self.events.recv() {
                Ok(Event::Read(read)) => {
                    self.unread -= 1;
                    result = result.and(read);
                }
                Ok(Event::Ended(_) | Event::Signal(Signal::SIGUSR1 | Signal::SIGUSR2)) => {}
                Ok(Event::Signal(_)) | Err(_) => break,
            }
        }
        result
    }

    /// The failure to tell of several: the first that said something, else the first.
    fn failure(&self, failed: &[(usize, ExitStatus)]) -> LaunchError {
        let spoke = failed.iter().find(|(index, _)| !self.ranks[*index].destination.tail().is_empty());
        let &(index, status) = spoke.unwrap_or(&failed[0]);
        let Rank { rank, process, destination } = &self.ranks[index];
        LaunchError::Failed { rank: *rank, pid: process.id(), status, stderr: destination.tail() }
    }
}
