//! When a rank is lost, the others must not wait for it for ever, and somebody must say which one it was.
//!
//! Each rank has a thread with a store connection of its own, which looks twice a second whether a rank has
//! reported a failure, and whether the rank's own main thread has been in one phase of its step for longer than
//! the timeout. The first rank to report (a counter in the store decides) calls the roll: every rank whose
//! process is alive answers with the phase it is in. Who does not answer is lost. The one that called tells it;
//! the others end quietly, so that there is one message and not one per rank.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::libtorch::{Error, Store};

/// How often the store is asked.
const EVERY: Duration = Duration::from_millis(500);
/// How long ranks have to answer the roll call.
const ROLL_CALL: Duration = Duration::from_secs(5);
/// How long the others leave the one that tells what happened, before they end.
const TELLING: Duration = Duration::from_secs(2);
/// After so long the verdict is not waited for any more.
const VERDICT: Duration = Duration::from_secs(20);
/// How long rank 0 goes ahead with a failure that every rank has noticed.
const RANK_ZERO_FIRST: Duration = Duration::from_millis(300);

/// Counts the ranks that reported a failure.
const FAILED: &str = "failed";
/// What came out.
const VERDICT_KEY: &str = "verdict";
/// Counts the ranks that have seen it.
const SEEN: &str = "seen";

/// Called when this process has to end because of a failure: with the message where this rank is the one to tell
/// it. Does not return in a program; in a test it may.
pub type OnFailure = Arc<dyn Fn(Option<&str>) + Send + Sync>;

/// What a rank's main thread is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Getting ready.
    Starting,
    /// Waiting for bytes to train on.
    Reading,
    /// Forward, backward (which waits for other ranks' gradients) and optimizer.
    Computing,
    /// In a collective.
    Waiting,
    /// Computing the validation loss.
    Evaluating,
    /// Writing a checkpoint.
    Saving,
}

impl Phase {
    fn words(self) -> &'static str {
        match self {
            Self::Starting => "getting ready",
            Self::Reading => "reading data",
            Self::Computing => "computing",
            Self::Waiting => "waiting for other ranks",
            Self::Evaluating => "evaluating",
            Self::Saving => "saving a checkpoint",
        }
    }
}

/// Why a rank reports a failure.
#[derive(Debug, Clone, PartialEq)]
pub enum Cause {
    /// An error of its own.
    Own(String),
    /// A collective failed: another rank is the cause.
    Others(String),
}

/// What a rank that reported a failure is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Say this, and end.
    Tell(String),
    /// Another rank tells. End.
    Quiet,
}

/// What a rank answers to the roll call.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    phase: Phase,
    step: u64,
    seconds: u64,
    error: Option<String>,
}

/// What the threads of one rank share.
struct Shared {
    rank: usize,
    world_size: usize,
    timeout: Duration,
    /// Where the store is, in words.
    store_name: String,
    now: Mutex<(Phase, u64, Instant)>,
    /// This rank's own error, once it has one.
    error: Mutex<Option<String>>,
    /// Since when this rank has been reporting.
    reporting: Mutex<Option<Instant>>,
    /// Since when the store has owed an answer to this thread.
    asked: Mutex<Option<Instant>>,
    done: AtomicBool,
    /// Another rank tells of a failure: this one only has to end.
    ending: AtomicBool,
    on_failure: OnFailure,
}

/// The threads that watch one rank.
pub struct Watch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Watches rank `rank` through `store`, a connection of its own.
    pub fn start(
        store: Store,
        store_name: String,
        rank: usize,
        world_size: usize,
        timeout: Duration,
        on_failure: OnFailure,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            rank,
            world_size,
            timeout,
            store_name,
            now: Mutex::new((Phase::Starting, 0, Instant::now())),
            error: Mutex::new(None),
            reporting: Mutex::new(None),
            asked: Mutex::new(None),
            done: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            on_failure,
        });
        let (asking, guarding) = (shared.clone(), shared.clone());
        let threads = vec![
            thread::Builder::new().name("watch".into()).spawn(move || asking.ask(&store))?,
            thread::Builder::new().name("watch-store".into()).spawn(move || guarding.guard())?,
        ];
        Ok(Self { shared, threads })
    }

    /// The main thread begins `phase` of step `step`.
    pub fn enter(&self, phase: Phase, step: u64) {
        *lock(&self.shared.now) = (phase, step, Instant::now());
    }

    /// The phase at hand and its step.
    pub fn phase(&self) -> (Phase, u64) {
        let (phase, step, _) = *lock(&self.shared.now);
        (phase, step)
    }

    /// Reports a failure of the main thread through `store`, its own connection.
    pub fn fail(&self, store: &Store, cause: Cause) -> Verdict {
        if let Cause::Own(message) = &cause {
            *lock(&self.shared.error) = Some(message.clone());
            if self.shared.rank != 0 {
                thread::sleep(RANK_ZERO_FIRST);
            }
        }
        let reporting = lock(&self.shared.reporting).is_some();
        if reporting || self.shared.ending.load(Ordering::SeqCst) {
            // The other thread is at it, and ends the process.
            thread::sleep(VERDICT + TELLING);
            return Verdict::Quiet;
        }
        *lock(&self.shared.reporting) = Some(Instant::now());
        let verdict = self.shared.report(store, cause);
        if verdict == Verdict::Quiet {
            // A launcher ends all ranks as soon as one has failed, the one that tells with them.
            thread::sleep(TELLING);
        }
        verdict
    }

    /// Nothing that happens from here on is a failure: the ranks part.
    pub fn done(&self) {
        self.shared.done.store(true, Ordering::SeqCst);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.done();
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread that reports a failure ends the process itself.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn is_done(&self) -> bool {
        self.done.load(Ordering::SeqCst)
    }

    /// Asks the store, over and over.
    fn ask(&self, store: &Store) {
        while !self.is_done() {
            *lock(&self.asked) = Some(Instant::now());
            let failed = store.contains(FAILED);
            *lock(&self.asked) = None;
            match failed {
                _ if self.is_done() => return,
                Ok(true) => return self.answer(store),
                Err(error) => return self.store_is_gone(&error.to_string()),
                Ok(false) => {}
            }
            let (phase, step, since) = *lock(&self.now);
            // Getting ready has several waits, each with a timeout and a message of its own.
            let patience = if phase == Phase::Starting { 4 } else { 1 };
            if since.elapsed() > self.timeout * patience {
                let cause = format!(
                    "rank {} has been {} at step {} for {} s",
                    self.rank,
                    phase.words(),
                    step + 1,
                    since.elapsed().as_secs()
                );
                *lock(&self.reporting) = Some(Instant::now());
                return match self.report(store, Cause::Others(cause)) {
                    Verdict::Tell(message) => (self.on_failure)(Some(&message)),
                    Verdict::Quiet => self.end_quietly(),
                };
            }
            thread::park_timeout(EVERY);
        }
    }

    /// Answers the roll call, and ends.
    fn answer(&self, store: &Store) {
        // The main thread of the rank that tells is at work.
        if lock(&self.reporting).is_some() {
            return;
        }
        self.ending.store(true, Ordering::SeqCst);
        let _ = self.say_alive(store);
        self.see_verdict(store);
        self.end_quietly();
    }

    fn see_verdict(&self, store: &Store) {
        if wait_for(VERDICT, || store.contains(VERDICT_KEY)) {
            let _ = store.add(SEEN, 1);
        }
    }

    fn end_quietly(&self) {
        thread::sleep(TELLING);
        (self.on_failure)(None);
    }

    fn say_alive(&self, store: &Store) -> Result<(), Error> {
        let (phase, step, since) = *lock(&self.now);
        let answer = Answer { phase, step, seconds: since.elapsed().as_secs(), error: lock(&self.error).clone() };
        store.set(&alive(self.rank), &serde_json::to_vec(&answer).unwrap_or_default())
    }

    fn report(&self, store: &Store, cause: Cause) -> Verdict {
        let verdict = || {
            let first = store.add(FAILED, 1)? == 1;
            self.say_alive(store)?;
            if !first {
                self.see_verdict(store);
                return Ok(Verdict::Quiet);
            }
            let message = match &cause {
                Cause::Own(message) => message.clone(),
                Cause::Others(message) => self.call_the_roll(store, message),
            };
            store.set(VERDICT_KEY, message.as_bytes())?;
            // With this process the store may go: the others must have seen that it is told.
            let others = self.world_size as i64 - 1;
            wait_for(TELLING, || Ok(store.add(SEEN, 0)? >= others));
            Ok(Verdict::Tell(message))
        };
        match (verdict(), cause) {
            (Ok(verdict), _) => verdict,
            // The own error is what matters, whatever became of the store.
            (Err(_), Cause::Own(message)) => Verdict::Tell(message),
            (Err::<_, Error>(error), Cause::Others(_)) => Verdict::Tell(self.without_store(&error.to_string())),
        }
    }

    /// Who is lost, or what keeps a rank so long.
    fn call_the_roll(&self, store: &Store, cause: &str) -> String {
        let mut answers: Vec<Option<Answer>> = (0..self.world_size).map(|_| None).collect();
        let began = Instant::now();
        while began.elapsed() < ROLL_CALL && answers.iter().any(Option::is_none) {
            for (rank, answer) in answers.iter_mut().enumerate().filter(|(_, answer)| answer.is_none()) {
                if store.contains(&alive(rank)).unwrap_or(false) {
                    let bytes = store.get(&alive(rank), EVERY).unwrap_or_default();
                    *answer = serde_json::from_slice(&bytes).ok();
                }
            }
            thread::sleep(EVERY / 10);
        }
        let name = |rank: usize| match store
            .get(&super::ddp::hello(rank), EVERY)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<super::ddp::Hello>(&bytes).ok())
        {
            Some(hello) => format!("rank {rank} (process {} on {})", hello.pid, hello.host),
            None => format!("rank {rank}"),
        };
        let step = lock(&self.now).1 + 1;
        let answers = || answers.iter().enumerate();
        if let Some((_, Some(answer))) = answers().find(|(_, a)| a.as_ref().is_some_and(|a| a.error.is_some())) {
            return answer.error.clone().unwrap_or_default();
        }
        let silent: Vec<String> = answers().filter(|(_, a)| a.is_none()).map(|(rank, _)| name(rank)).collect();
        if !silent.is_empty() {
            let (does, has, hangs) =
                if silent.len() == 1 { ("does", "it has", "hangs") } else { ("do", "they have", "hang") };
            return format!(
                "{} {does} not answer at step {step}: {has} died, {hangs}, or cannot be reached. {REMEDY}",
                silent.join(", ")
            );
        }
        let late = |a: &&Answer| !matches!(a.phase, Phase::Waiting) && a.seconds > self.timeout.as_secs() / 2;
        match answers().find_map(|(rank, a)| a.as_ref().filter(late).map(|a| (rank, a))) {
            Some((rank, a)) => format!(
                "{} has been {} at step {} for {} s: raise ddp.timeout ({} s) if that is as it should be. {REMEDY}",
                name(rank),
                a.phase.words(),
                a.step + 1,
                a.seconds,
                self.timeout.as_secs()
            ),
            None => format!(
                "ranks wait for each other at step {step}, though all are alive and reach the store: is traffic between \
                 them blocked, or on the wrong interface (firewall, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)? ({cause}) \
                 {REMEDY}"
            ),
        }
    }

    fn without_store(&self, error: &str) -> String {
        format!(
            "rank {}: the store, {}, is gone ({error}): the process that held it died or cannot be reached. {REMEDY}",
            self.rank, self.store_name
        )
    }

    /// Every rank notices by itself: the lower ones first, so that one of a launcher's ranks tells it.
    fn store_is_gone(&self, error: &str) {
        thread::sleep(Duration::from_millis((100 * self.rank as u64).min(3000)));
        let reporting = lock(&self.reporting).is_some();
        if !self.is_done() && !reporting {
            (self.on_failure)(Some(&self.without_store(error)));
        }
    }

    /// Sees that the other thread and the main thread get their answers from the store.
    fn guard(&self) {
        while !self.is_done() {
            thread::park_timeout(EVERY / 2);
            let asked = lock(&self.asked).is_some_and(|since| since.elapsed() > self.timeout);
            let reporting = lock(&self.reporting).is_some_and(|since| since.elapsed() > ROLL_CALL + VERDICT);
            if !self.is_done() && (asked || reporting) {
                let message = format!("no answer for {} s", self.timeout.as_secs());
                return (self.on_failure)(Some(&self.without_store(&message)));
            }
        }
    }
}

/// How to go on after a failure.
const REMEDY: &str = "`--resume auto` goes on from the last checkpoint";

fn alive(rank: usize) -> String {
    format!("alive/{rank}")
}

/// Waits until `condition` holds, asking now and then; gives up after `limit`, or when the store is gone.
fn wait_for(limit: Duration, mut condition: impl FnMut() -> Result<bool, Error>) -> bool {
    let began = Instant::now();
    while began.elapsed() < limit {
        match condition() {
            Ok(true) => return true,
            Ok(false) => thread::sleep(EVERY / 5),
            Err(_) => return false,
        }
    }
    false
}
