//! The training loop, readable top to bottom.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, nn};
use tracing::warn;

use super::ddp::{Ddp, DdpError};
use super::evaluation::{EvalOptions, evaluate_part, inputs_and_targets, sample};
use super::graph::BackwardGraph;
use super::internals::{Inputs, Internals};
use super::loss::{BITS_PER_NAT, byte_class_sums, cross_entropy, training_loss};
use super::lr_scheduler::{lr_for_step, seq_len_for_step, weight_decay_for_step};
use super::metrics::{ByteClassLoss, InternalsRow, MetricsError, MetricsWriter, TrainObserver, TrainRow, ValRow};
use super::parallel::Parallel;
use super::run_dir::{RunDir, RunDirError};
use super::tensorboard::{TensorBoardError, TensorBoardWriter};
use super::utilisation::{flops_per_byte, peak_tflops};
use super::watch::Phase;
use crate::checkpoint::{CheckpointError, Contents, Given, Progress, TrainingCheckpoint, parameter_names};
use crate::config::{Config, ConfigError, Decay, OptimizerName, Precision, TrainConfig};
use crate::data::{self, ByteDataset, DataError, Loader, LoaderOptions};
use crate::kernels::{AdamW8bitKernel, cuda_name};
use crate::libtorch::{self, HostCopy, cuda_memory, foreach_norms, host_memory};
use crate::models::BitByteLM;
use crate::utils::decay::DecayingTensors;
use crate::utils::device::{DeviceError, autocast, device};
use crate::utils::optim::{GradScaler, Optimizer, OptimizerState, ScalerState, adamw8bit_kernel, clip_gradients};

/// Why a run cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A value that does not fit.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device is absent.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The training or validation bytes cannot be used.
    #[error("{key}: {source}")]
    Data {
        /// The key that names them.
        key: &'static str,
        /// What is wrong.
        source: DataError,
    },
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The run directory cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The log cannot be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The event file cannot be written.
    #[error(transparent)]
    TensorBoard(#[from] TensorBoardError),
    /// Ranks cannot train together, or one was lost.
    #[error(transparent)]
    Ddp(#[from] DdpError),
    /// libtorch failed.
    #[error("{0}")]
    Libtorch(#[from] libtorch::Error),
    /// The model is too large for the device.
    #[error(
        "training this model needs about {} on {device} ({} for weights, gradients and optimizer of {parameters} parameters, {} for activations), but {} are free: make model.d_model, model.n_layer, train.batch_size or data.seq_len smaller{}",
        gib(needed.state.saturating_add(needed.activations)), gib(needed.state), gib(needed.activations), gib(*free),
        if *checkpointing { "" } else { ", or set train.checkpointing" }
    )]
    Memory {
        /// The device, in words.
        device: String,
        /// Number of parameters.
        parameters: i64,
        /// Bytes needed.
        needed: MemoryNeed,
        /// Bytes free.
        free: u64,
        /// Whether checkpointing is on.
        checkpointing: bool,
    },
    /// Too many steps in a row with a loss or gradient that is not finite.
    #[error(
        "{skipped} steps in a row had a loss or gradient that is not finite, up to step {}: go on from {} or an earlier one with a smaller optim.lr, or raise train.max_nonfinite",
        step + 1,
        checkpoint.as_deref().map_or("an earlier checkpoint (none was saved yet)".into(), |p| p.display().to_string())
    )]
    Diverged {
        /// Steps skipped in a row.
        skipped: u64,
        /// The last of them.
        step: u64,
        /// The last checkpoint.
        checkpoint: Option<PathBuf>,
    },
}

impl TrainError {
    /// Whether another rank is the cause. Want of memory is this one's own, wherever it shows.
    pub fn is_lost_rank(&self) -> bool {
        match self {
            Self::Ddp(DdpError::Lost { source, .. } | DdpError::Group(source)) => {
                !matches!(source, libtorch::Error::OutOfMemory(_))
            }
            _ => matches!(self, Self::Ddp(DdpError::NoWord { .. })),
        }
    }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

/// Where a run starts from.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// Fresh weights.
    Fresh,
    /// A checkpoint's weights, at step 0.
    Init(PathBuf),
    /// A checkpoint's weights, optimizer state, step and position in the data.
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// Whether its optimizer state is taken too (else the moments start at zero).
        optimizer_state: bool,
    },
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Optimizer steps done.
    pub completed: u64,
    /// Whether all steps of the configuration are done.
    pub finished: bool,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
}

/// What a checkpoint brings besides weights; rank 0 tells the other ranks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Restored {
    progress: Progress,
    scaler: ScalerState,
    /// Whether there is optimizer state that is not zero.
    optimizer: bool,
    /// The fingerprint of the bytes that it was trained on, where the checkpoint has one.
    data: Option<String>,
}

/// A model with its optimizer and its place in a run.
pub struct Trainer {
    // First: its hooks sit on the parameters below.
    parallel: Option<Parallel>,
    /// Where `train.cuda_graph` asks for it and there is one GPU.
    graph: Option<BackwardGraph>,
    config: Config,
    run: RunDir,
    device: Device,
    vs: nn::VarStore,
    model: BitByteLM,
    optimizer: Optimizer,
    /// What decays, where not everything does.
    decaying: Option<DecayingTensors>,
    scaler: Option<GradScaler>,
    /// The scaler's state that the run was resumed with, which it saves where it has no scaler.
    carried_scaler: ScalerState,
    /// What the user is told as training begins.
    notes: Vec<String>,
    /// The fingerprint of the training bytes.
    data: String,
    train_set: Arc<dyn ByteDataset>,
    val_set: Option<Arc<dyn ByteDataset>>,
    progress: Progress,
    /// The newest checkpoint that is known to be good.
    checkpoint: Option<PathBuf>,
    /// Set from outside ([`Trainer::save_at`]): the run saves after the step at hand.
    save_request: Arc<AtomicBool>,
    internals: Internals,
    /// What the devices of all ranks can do together, FLOP/s, where that is known.
    peak: Option<f64>,
    /// How many steps the device may be behind the host, which so need not wait for it.
    lag: usize,
}

/// An optimizer step that the host is through with; the device may still be at it.
struct Step {
    /// Its number, from 0.
    step: u64,
    lr: f64,
    seq_len: i64,
    /// Bytes of the run up to and with this step.
    bytes_seen: u64,
    /// Whether the losses by class of byte are among the numbers.
    byte_classes: bool,
    /// What [`Done`] is made of: fp64 `[5]`, four more for the classes of bytes, and behind them the statistics of the
    /// layers.
    numbers: HostCopy,
}

/// What one optimizer step did.
struct Done {
    /// Mean loss over the micro-batches, nats per byte.
    loss: f64,
    /// L2 norm of the gradient before clipping.
    grad_norm: f64,
    /// Whether it changed nothing, because the loss or the gradient was not finite.
    skipped: bool,
    /// Whether the run shall end after it.
    stop: bool,
    /// Whether the run shall save after it.
    save: bool,
    /// The losses by class of byte, where they are due.
    byte_classes: Option<ByteClassLoss>,
    /// A look inside, where it is due; on rank 0 only.
    internals: Option<InternalsRow>,
}

impl Trainer {
    /// Builds the model on its device and brings it to `start`. The configuration must be resolved
    /// against the checkpoint ([`crate::config::Layers::resolve`]). Nothing is written.
    ///
    /// # Errors
    /// An absent device, too little memory, unusable data, a checkpoint that does not fit.
    pub fn new(config: Config, start: Start) -> Result<Self, TrainError> {
        Self::build(config, start, None)
    }

    /// The same as one of many ranks, each of which calls this with an equal configuration. Rank 0 alone reads
    /// `start`'s checkpoint and writes; the others get everything from it.
    ///
    /// # Errors
    /// As [`Trainer::new`]; ranks that differ; a rank that is lost.
    pub fn distributed(config: Config, start: Start, ddp: Rc<Ddp>) -> Result<Self, TrainError> {
        Self::build(config, start, Some(ddp))
    }

    fn build(config: Config, start: Start, ddp: Option<Rc<Ddp>>) -> Result<Self, TrainError> {
        config.validate()?;
        let device = match &ddp {
            Some(ddp) => device(ddp.device(config.train.device)?)?,
            None => device(config.train.device)?,
        };
        if let Err(error) = adamw8bit_kernel(&config, device) {
            return Err(ConfigError::Invalid { key: "optim.name".into(), message: error.text().into() }.into());
        }
        check_memory(&config, ddp.as_ref().map_or(1, |ddp| ddp.world_size()), device)?;
        let train_set = open(&config.data.train, "data.train")?;
        for (_, seq_len) in config.data.curriculum() {
            config.data.order.windows(train_set.as_ref(), seq_len as usize).map_err(in_train_data)?;
        }
        let val_set = match &config.data.val {
            Some(spec) if config.train.eval_every > 0 => Some(open(spec, "data.val")?),
            _ => None,
        };
        let main = ddp.as_ref().is_none_or(|ddp| ddp.rank() == 0);

        // Drawn on the CPU, so that one seed gives the same weights on every device.
        let mut vs = nn::VarStore::new(Device::Cpu);
        let mut model = libtorch::drawing_alone(|| {
            tch::manual_seed(config.train.seed as i64);
            BitByteLM::new(&vs.root(), &config.model, &config.quant)
        });
        model.set_checkpointing(config.train.checkpointing);
        let loaded = match &start {
            Start::Init(path) | Start::Resume { path, .. } if main => {
                let given = Given { n_head: Some(config.model.n_head), act: Some(config.quant.act) };
                Some(TrainingCheckpoint::open_given(path, &given)?)
            }
            _ => None,
        };
        let mut restored = Restored::default();
        let mut moments = None;
        if let Some(checkpoint) = &loaded {
            checkpoint.check_trainable()?;
            checkpoint.load_weights(&vs)?;
            if let Start::Resume { optimizer_state, .. } = &start {
                if *optimizer_state {
                    let sizes: Vec<_> = vs.trainable_variables().iter().map(Tensor::size).collect();
                    let mut state = OptimizerState::zeros(config.optim.name, &sizes, Device::Cpu);
                    checkpoint.load_optimizer(&mut state)?;
                    moments = Some(state);
                }
                checkpoint.check_resumable()?;
                restored.progress = checkpoint.progress();
                restored.data = checkpoint.data().map(String::from);
                restored.scaler = checkpoint.scaler().unwrap_or_default();
                restored.optimizer = moments.is_some();
            }
        }
        vs.set_device(device);
        let (parallel, mut optimizer) = match ddp {
            None => (None, Optimizer::new(vs.trainable_variables(), &config.optim)),
            Some(ddp) => {
                ddp.check(&config, device, train_set.as_ref())?;
                restored = ddp.share("restored", main.then_some(restored))?;
                // Every rank has come: from here on they only wait for each other.
                ddp.enter(Phase::Waiting, restored.progress.completed);
                let group = ddp.join(&config.ddp, device)?;
                let (parallel, optimizer) =
                    Parallel::new(ddp, group, vs.trainable_variables(), &config.ddp, &config.optim)?;
                (Some(parallel), optimizer)
            }
        };
        match &parallel {
            Some(parallel) if restored.optimizer => parallel.spread_state(moments, &mut optimizer)?,
            None => moments.iter().for_each(|moments| optimizer.state.copy_from(moments)),
            _ => {}
        }
        let params = vs.trainable_variables();
        let matrices = || match &parallel {
            Some(parallel) => parallel.decaying_matrices(&params),
            None => DecayingTensors::matrices(&params),
        };
        let decaying = (config.optim.decay == Decay::Matrices).then(matrices);
        let data = train_set.fingerprint();
        let notes = other_data(restored.data.as_deref(), &data, &restored.progress, &config, train_set.as_ref());
        let carried_scaler = restored.scaler;
        let scaler = (config.train.precision == Precision::Fp16).then(|| GradScaler::new(restored.scaler, device));
        let checkpoint = match &start {
            Start::Resume { path, .. } => Some(path.clone()),
            _ => None,
        };
        let run = RunDir::new(&config.train.out);
        let progress = restored.progress;
        let internals = Internals::new(config.train.internals_every, &parameter_names(&config.model), &model);
        let devices = parallel.as_ref().map_or(1, |parallel: &Parallel| parallel.ddp().world_size());
        let peak = peak(&config.train, device).map(|peak| peak * devices as f64);
        let graph = match device {
            Device::Cuda(index) if parallel.is_none() => Some(index),
            _ => None,
        };
        let graph = graph.filter(|_| config.train.cuda_graph).map(BackwardGraph::new);
        let mut trainer = Self {
            parallel,
            graph,
            config,
            run,
            device,
            vs,
            model,
            optimizer,
            decaying,
            scaler,
            carried_scaler,
            notes,
            data,
            train_set,
            val_set,
            progress,
            checkpoint,
            save_request: Arc::default(),
            internals,
            peak,
            // The CPU has done a step when the call returns.
            lag: usize::from(device.is_cuda()),
        };
        trainer.arrange_buckets()?;
        // Not before: the order of buckets must not depend on where a run is resumed.
        trainer.set_quantization();
        Ok(trainer)
    }

    /// Shows the reducer in which order gradients come, by one small backward.
    fn arrange_buckets(&mut self) -> Result<(), TrainError> {
        let Some(parallel) = &self.parallel else { return Ok(()) };
        let tokens = Tensor::zeros([1, 2], (Kind::Int64, self.device));
        parallel.arrange_buckets(|| {
            let lost = |source| DdpError::Lost { rank: parallel.ddp().rank(), source };
            let logits = autocast(self.device, self.config.train.precision, || self.model.forward(&tokens));
            backward(&cross_entropy(&logits.map_err(lost)?, &tokens)).map_err(lost)
        })?;
        self.optimizer.zero_grad();
        Ok(())
    }

    /// Quantizes as the next step does; so do validations before it, and whoever uses the model.
    fn set_quantization(&mut self) {
        self.model.set_quantization(self.config.quant.lambda(self.progress.completed, self.config.train.steps));
    }

    /// The model.
    pub fn model(&self) -> &BitByteLM {
        &self.model
    }

    /// The model's parameters.
    pub fn var_store(&self) -> &nn::VarStore {
        &self.vs
    }

    /// How far the run has come.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether this process is the one that writes: rank 0, or the only one.
    pub fn is_main(&self) -> bool {
        self.parallel.as_ref().is_none_or(Parallel::is_main)
    }

    /// Bytes of optimizer state that this process keeps.
    pub fn optimizer_bytes(&self) -> u64 {
        let tensors = self.optimizer.state.tensors();
        tensors.iter().map(|t| (t.numel() * t.kind().elt_size_in_bytes()) as u64).sum()
    }

    /// The engine that averages gradients, where ranks train together and do not shard them: tells its times.
    pub fn reducer(&self) -> Option<&libtorch::Reducer> {
        self.parallel.as_ref().and_then(Parallel::reducer)
    }

    /// Where the model lives.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whoever sets `request` has [`Trainer::train`] save after the step at hand, unset it, and go on. Many ranks do so
    /// as one when it is set on any of them.
    pub fn save_at(&mut self, request: Arc<AtomicBool>) {
        self.save_request = request;
    }

    /// The command that goes on with this run after its last checkpoint.
    pub fn resume_command(&self) -> String {
        let (config, out) = (quoted(&self.run.config()), quoted(&self.config.train.out));
        // The saved configuration stops where the run is by then.
        let further = if self.config.train.stop_at.is_some() { " --set train.stop_at=null" } else { "" };
        format!("bbt train --config {config} --out {out} --resume auto{further}")
    }

    /// Trains until the configuration's last step, its `stop_at`, or until `interrupt` is set: then the
    /// step at hand is finished and saved. Writes the run directory, which exists and may be written
    /// ([`RunDir::create`]).
    ///
    /// # Errors
    /// A full disk, divergence. The last checkpoint stays as it was.
    pub fn train(&mut self, observer: &mut dyn TrainObserver, interrupt: &AtomicBool) -> Result<Summary, TrainError> {
        let TrainConfig { steps: total, eval_every, save_every, .. } = self.config.train;
        let end = self.config.train.stop_at.map_or(total, |stop| stop.min(total));

        if self.is_main() {
            self.notes.drain(..).for_each(|note| observer.on_message(&note));
        }
        if let Some(AdamW8bitKernel::Own(why)) = adamw8bit_kernel(&self.config, self.device)? {
            observer.on_message(&format!("optim.name adamw8bit: bbt's own kernel runs: {why}"));
        }
        if self.config.train.cuda_graph && self.graph.is_none() {
            observer.on_message("train.cuda_graph is for one GPU: this run does without");
        }
        let mut loader = self.loader(end)?;

        // Only rank 0 writes.
        let mut logs = match self.is_main() {
            true => {
                self.run.ensure()?;
                self.run.write_config(&self.config.to_yaml())?;
                if let Some(kept) = self.run.kept_config() {
                    let (kept, ours) = (kept.display(), self.run.config());
                    observer.on_message(&format!(
                        "{kept} is not bbt's and stays as it is: the run's configuration is {}",
                        ours.display()
                    ));
                }
                Some(self.logs()?)
            }
            false => None,
        };

        let mut saved = None;
        // That somebody asked for a checkpoint, until there is one.
        let mut asked = false;
        let mut since = Lap::start(&loader);
        // Ranks agree on it in a step instead.
        let interrupted = |trainer: &Self| interrupt.load(Ordering::SeqCst) && trainer.parallel.is_none();
        let mut stop = interrupted(self);
        let mut pending = VecDeque::new();
        while self.progress.completed < end && !stop {
            let step = self.progress.completed;
            let seq_len = seq_len_for_step(step, total, &self.config.data.curriculum());
            let bytes_before = self.progress.bytes_seen;
            pending.push_back(self.step(seq_len, &mut loader, interrupt)?);
            if let Some(error) = self.graph.as_mut().and_then(BackwardGraph::take_refusal) {
                warn!(%error, "not recorded as a graph");
                observer.on_message(&format!("train.cuda_graph: cannot be recorded, this run does without: {error}"));
            }
            let bytes = self.progress.bytes_seen - bytes_before;
            since.bytes += bytes;
            since.flops += bytes as f64 * flops_per_byte(&self.config.model, seq_len);
            let completed = self.progress.completed;
            let last = completed == total;
            let eval_due = self.val_set.is_some() && (completed.is_multiple_of(eval_every) || last);
            let save_due = save_every > 0 && completed.is_multiple_of(save_every);
            asked |= self.parallel.is_none() && self.save_request.swap(false, Ordering::SeqCst);
            // What is written down must be known.
            let known = self.is_logged(step) || eval_due || save_due || asked || completed == end;
            stop |= interrupted(self);
            while pending.len() > if known || stop { 0 } else { self.lag } {
                let Some(begun) = pending.pop_front() else { break };
                let (step, done) = (begun.step, self.settle(&begun)?);
                // Ranks stop after the same step: the one in which they agreed to, or where the device lags behind,
                // the next.
                stop |= done.stop;
                asked |= done.save;
                if done.skipped && self.is_main() {
                    warn!(step, loss = done.loss, grad_norm = done.grad_norm, "not finite: step skipped");
                    observer.on_message(&format!("step {}: loss or gradient is not finite, step skipped", step + 1));
                }
                // A skipped step is always logged.
                if self.is_logged(step) || done.skipped {
                    let row = self.row(&begun, &done, since.finish(&loader));
                    if let Some((metrics, board)) = &mut logs {
                        metrics.train(&row)?;
                        board.train(&row)?;
                        observer.on_step(&row);
                    }
                }
                if let (Some(row), Some((metrics, board))) = (&done.internals, &mut logs) {
                    metrics.internals(row)?;
                    board.internals(row)?;
                    observer.on_internals(row);
                }
                if self.progress.skipped_in_a_row >= self.config.train.max_nonfinite {
                    let (skipped, checkpoint) = (self.progress.skipped_in_a_row, self.checkpoint.clone());
                    return Err(TrainError::Diverged { skipped, step, checkpoint });
                }
            }
            let aside = Instant::now();
            let mut improved = false;
            if let Some(val_set) = self.val_set.clone().filter(|_| eval_due) {
                let row = self.validate(step, val_set.as_ref())?;
                improved =
                    row.val_loss.is_finite() && self.progress.best_val_loss.is_none_or(|best| row.val_loss < best);
                if improved {
                    self.progress.best_val_loss = Some(row.val_loss);
                }
                if let Some((metrics, board)) = &mut logs {
                    metrics.validation(&row)?;
                    board.validation(&row)?;
                    observer.on_validation(&row);
                }
            }
            // Not while steps are skipped: what is kept from before is what a diverged run can go back to.
            // Where a step is still under way, the next one ends with nothing pending.
            let asked_now = asked && pending.is_empty();
            if last || ((improved || save_due || asked_now) && self.progress.skipped_in_a_row == 0) {
                self.save(improved)?;
                saved = Some(completed);
                if asked && self.is_main() {
                    observer.on_message(&format!("step {completed}: saved, as asked, {}", self.run.latest().display()));
                }
                asked = false;
            }
            since.aside += aside.elapsed();
            if !since.running {
                since = Lap::start(&loader);
            }
            // Where a step is still under way, another one is needed to see its end.
            stop |= pending.is_empty() && interrupted(self);
        }
        if saved != Some(self.progress.completed) {
            self.save(false)?;
        }
        // No rank ends before the last checkpoint is on disk.
        if let Some(parallel) = &self.parallel {
            parallel.barrier()?;
        }
        Ok(Summary {
            completed: self.progress.completed,
            finished: self.progress.completed >= total,
            checkpoint: self.run.latest(),
        })
    }

    /// One optimizer step: forward and backward over the micro-batches, then clip and update. Where ranks train
    /// together, the last micro-batch's backward averages the gradients, and whether to skip the step, and
    /// whether to stop after it, is decided by all. Nothing here waits for the device.
    fn step(&mut self, seq_len: i64, loader: &mut Loader, interrupt: &AtomicBool) -> Result<Step, TrainError> {
        let accumulate = self.config.train.grad_accum;
        match &mut self.parallel {
            Some(parallel) => parallel.zero_grad(&mut self.optimizer),
            // A graph adds to the gradients where they are.
            None if self.graph.is_some() => self.optimizer.zero_grad(),
            None => self.optimizer.drop_grad()?,
        }
        let step = self.progress.completed;
        let reported = self.internals.is_due(step);
        let lambda = self.config.quant.lambda(step, self.config.train.steps);
        let mut inputs = (reported && self.is_main()).then(Inputs::default);
        let mut loss_sum = Tensor::zeros([], (Kind::Float, self.device));
        // Of steps that will be logged; a step that is logged because it was skipped has none.
        let due = self.config.train.log_byte_class_loss && self.is_logged(step);
        let mut byte_classes = due.then(|| Tensor::zeros([4], (Kind::Double, self.device)));
        let mut bytes = 0;
        for micro in 0..accumulate {
            self.enter(Phase::Reading);
            // The plan covers every step that is run.
            let Some(batch) = loader.next() else { unreachable!("the loader's plan ended before the run") };
            let batch = batch.map_err(in_train_data)?;
            self.enter(Phase::Computing);
            let (tokens, targets) = inputs_and_targets(&batch.bytes, batch.rows, self.device);
            let synchronising = self.parallel.as_ref().filter(|_| micro + 1 == accumulate);
            if let Some(parallel) = synchronising {
                parallel.prepare_for_forward()?;
            }
            let recordable = inputs.is_none() && byte_classes.is_none() && lambda == 1.0;
            let mut forward_backward = |tokens: &Tensor, targets: &Tensor| -> Result<Tensor, TrainError> {
                let forward = || autocast(self.device, self.config.train.precision, || self.model.forward(tokens));
                let logits = match &mut inputs {
                    Some(inputs) => inputs.watch(&self.model, forward)?,
                    None => forward()?,
                };
                let loss = training_loss(self.config.quant.kernel, &logits, targets)?;
                if let Some(sums) = &mut byte_classes {
                    *sums += byte_class_sums(&logits, targets);
                }
                let scaled = &loss / accumulate as f64;
                let scaled = self.scaler.as_ref().map_or(scaled.shallow_clone(), |scaler| scaler.scale(&scaled));
                if let Some(parallel) = synchronising {
                    parallel.prepare_for_backward()?;
                }
                match &self.parallel {
                    None => backward(&scaled)?,
                    Some(parallel) => {
                        backward(&scaled).map_err(|source| DdpError::Lost { rank: parallel.ddp().rank(), source })?;
                    }
                }
                Ok(loss.detach())
            };
            loss_sum += match &mut self.graph {
                Some(graph) if recordable => graph.run(&tokens, &targets, self.optimizer.params(), forward_backward)?,
                _ => forward_backward(&tokens, &targets)?,
            };
            bytes += targets.numel() as u64;
            self.progress.position = batch.position_after;
        }
        let mut loss = loss_sum / accumulate as f64;

        let grads = match &mut self.parallel {
            Some(parallel) => parallel.gradients(&self.optimizer)?,
            None => self.optimizer.gradients(),
        };
        let mut found_inf = Tensor::zeros([], (Kind::Float, self.device));
        if let Some(scaler) = &self.scaler {
            scaler.unscale(&grads, &found_inf)?;
        }
        let mut norms = foreach_norms(&grads)?;
        let mut norm = norms.norm();
        let mut requests = Tensor::zeros([2], (Kind::Double, self.device));
        if let Some(parallel) = &self.parallel {
            let of_each = reported.then_some(&norms);
            let (stop, save) = (interrupt.load(Ordering::SeqCst), self.save_request.swap(false, Ordering::SeqCst));
            let agreed = parallel.agree(&loss, &norm, &found_inf, [stop, save], of_each)?;
            (loss, norm, found_inf, requests) = (agreed.loss, agreed.norm, agreed.found_inf, agreed.requests);
            norms = agreed.norms.unwrap_or(norms);
            if let Some(sums) = &byte_classes {
                parallel.sum_on_device(sums)?;
            }
            bytes *= parallel.ddp().world_size() as u64;
        }
        let found_inf = found_inf.maximum(&not_finite(&loss, &norm));
        let internals = inputs.map(|inputs| self.internals.gather(&self.model, &inputs, &norms));
        if self.config.optim.grad_clip > 0.0 {
            clip_gradients(&grads, &norm, self.config.optim.grad_clip)?;
        }
        let (step, total) = (self.progress.completed, self.config.train.steps);
        let lr = lr_for_step(step, total, &self.config.optim);
        let mut weight_decay = weight_decay_for_step(step, total, &self.config.optim);
        if let Some(decaying) = &self.decaying {
            decaying.decay(lr, weight_decay, &found_inf)?;
            weight_decay = 0.0;
        }
        self.optimizer.step(&grads, lr, weight_decay, &found_inf)?;
        if let Some(parallel) = &self.parallel {
            parallel.after_step()?;
        }
        if let Some(scaler) = &mut self.scaler {
            scaler.update(&found_inf);
        }

        self.progress.completed += 1;
        self.progress.bytes_seen += bytes;
        self.set_quantization();
        let numbers = [loss, norm, found_inf].map(|x| x.to_kind(Kind::Double));
        let numbers = [Tensor::stack(&numbers, 0), requests].into_iter();
        let numbers: Vec<Tensor> = numbers.chain(byte_classes).chain(internals).collect();
        let numbers = HostCopy::start(&Tensor::cat(&numbers, 0))?;
        Ok(Step { step, lr, seq_len, bytes_seen: self.progress.bytes_seen, byte_classes: due, numbers })
    }

    /// Waits for the device to be through with a step, and counts it.
    fn settle(&mut self, begun: &Step) -> Result<Done, TrainError> {
        let arrived = begun.numbers.wait()?;
        let mut numbers = vec![0.0; arrived.numel()];
        arrived.copy_data(&mut numbers, arrived.numel());
        let (&[loss, grad_norm, found_inf, stop, save], rest) =
            numbers.split_first_chunk().expect("a step's five numbers come first");
        let (byte_classes, internals) = match rest.split_first_chunk() {
            Some((&sums, internals)) if begun.byte_classes => (Some(ByteClassLoss::new(sums)), internals),
            _ => (None, rest),
        };
        let skipped = found_inf > 0.0;
        self.progress.skipped += u64::from(skipped);
        self.progress.skipped_in_a_row = if skipped { self.progress.skipped_in_a_row + 1 } else { 0 };
        let internals = (!internals.is_empty()).then(|| self.internals.row(begun.step, internals));
        Ok(Done { loss, grad_norm, skipped, stop: stop > 0.0, save: save > 0.0, byte_classes, internals })
    }

    /// Says what this rank is doing, for the watch.
    fn enter(&self, phase: Phase) {
        if let Some(parallel) = &self.parallel {
            parallel.ddp().enter(phase, self.progress.completed);
        }
    }

    /// This rank's number and that of all.
    fn place(&self) -> (usize, usize) {
        self.parallel.as_ref().map_or((0, 1), |parallel| (parallel.ddp().rank(), parallel.ddp().world_size()))
    }

    /// Batches for the steps up to `end`, prepared ahead.
    fn loader(&self, end: u64) -> Result<Loader, TrainError> {
        let total = self.config.train.steps;
        let curriculum = self.config.data.curriculum();
        let plan = (self.progress.completed..end).map(move |s| seq_len_for_step(s, total, &curriculum) as usize);
        let (rank, world) = self.place();
        let options = LoaderOptions {
            order: self.config.data.order,
            seed: self.config.data.seed,
            start: self.progress.position,
            batch_size: self.config.train.batch_size as usize,
            grad_accum: self.config.train.grad_accum as usize,
            rank,
            world,
        };
        Loader::new(self.train_set.clone(), options, plan).map_err(in_train_data)
    }

    /// The logs, continued where the run is.
    fn logs(&self) -> Result<(MetricsWriter, TensorBoardWriter), TrainError> {
        let dir = &self.run.events();
        match self.progress.completed.checked_sub(1) {
            None => Ok((MetricsWriter::create(&self.run.metrics())?, TensorBoardWriter::create(dir, None)?)),
            Some(last) => Ok((
                MetricsWriter::resume(&self.run.metrics(), last)?,
                TensorBoardWriter::create(dir, Some(self.progress.completed))?,
            )),
        }
    }

    fn row(&self, begun: &Step, done: &Done, lap: LapTime) -> TrainRow {
        TrainRow {
            step: begun.step,
            loss: done.loss,
            bits_per_byte: done.loss * BITS_PER_NAT,
            lr: begun.lr,
            grad_norm: done.grad_norm,
            seq_len: begun.seq_len,
            bytes_seen: begun.bytes_seen,
            bytes_per_second: lap.bytes_per_second,
            mfu: self.peak.map(|peak| lap.flops_per_second / peak),
            data_wait: lap.data_wait,
            skipped_steps: self.progress.skipped,
            loss_scale: self.scaler.as_ref().map(|s| s.state().scale),
            peak_memory_bytes: self.peak_memory(),
            byte_classes: done.byte_classes.clone(),
        }
    }

    /// Whether a step is logged, however it ends: every so many, and the last.
    fn is_logged(&self, step: u64) -> bool {
        step.is_multiple_of(self.config.train.log_every) || step + 1 == self.config.train.steps
    }

    fn peak_memory(&self) -> u64 {
        match self.device {
            Device::Cuda(index) => cuda_memory(index).map_or(0, |memory| memory.peak),
            _ => host_memory().peak,
        }
    }

    fn validate(&self, step: u64, val_set: &dyn ByteDataset) -> Result<ValRow, TrainError> {
        let seq_len = self.config.train.eval_seq_len.unwrap_or(self.config.data.max_seq_len()) as usize;
        let options = EvalOptions { seq_len, stride: seq_len, precision: self.config.train.precision };
        let documents = sample(val_set, self.config.train.eval_bytes);
        self.enter(Phase::Evaluating);
        // Each batch is a sign of life.
        let alive = |_| self.enter(Phase::Evaluating);
        let mut found = evaluate_part(&self.model, &documents, options, self.device, self.place(), alive)?;
        if let Some(parallel) = &self.parallel {
            found.sums = parallel.sum(&found.sums, self.device)?;
        }
        let found = found.total();
        Ok(ValRow { step, val_loss: found.loss, val_bits_per_byte: found.bits_per_byte(), bytes: found.bytes })
    }

    /// Writes a checkpoint and makes it the latest: rank 0 does, and all ranks take part.
    fn save(&mut self, best: bool) -> Result<(), TrainError> {
        self.enter(Phase::Saving);
        let gathered = match &self.parallel {
            Some(parallel) => parallel.gather_state(&self.optimizer)?,
            None => None,
        };
        if self.is_main() {
            let path = self.run.make_way(self.progress.completed)?;
            let last = self.progress.completed.saturating_sub(1);
            let contents = Contents {
                config: &self.config,
                vs: &self.vs,
                optimizer: gathered.as_ref().unwrap_or(&self.optimizer.state),
                lr: lr_for_step(last, self.config.train.steps, &self.config.optim),
                weight_decay: weight_decay_for_step(last, self.config.train.steps, &self.config.optim),
                scaler: self.scaler.as_ref().map_or(self.carried_scaler, GradScaler::state),
                data: &self.data,
                progress: &self.progress,
            };
            contents.write(&path)?;
            self.run.publish(self.progress.completed, self.config.train.keep, best)?;
        }
        self.checkpoint = Some(self.run.latest());
        Ok(())
    }
}

/// 1 where the loss or the gradient's norm is not finite, else 0: fp32 `[]`.
fn not_finite(loss: &Tensor, norm: &Tensor) -> Tensor {
    norm.isfinite().logical_and(&loss.isfinite()).logical_not().to_kind(Kind::Float)
}

/// `loss.backward()`, its failure as an error and not as a panic.
fn backward(loss: &Tensor) -> Result<(), libtorch::Error> {
    Ok(loss.f_backward()?)
}

/// Peak of one device in FLOP/s, as it is set or known.
fn peak(config: &TrainConfig, device: Device) -> Option<f64> {
    let known = || match device {
        Device::Cuda(index) => peak_tflops(&cuda_name(index).ok()?, config.precision),
        _ => None,
    };
    config.peak_tflops.or_else(known).map(|tera| tera * 1e12)
}

/// Time, bytes and waiting since the last row of the log.
struct Lap {
    began: Instant,
    waited: f64,
    bytes: u64,
    /// That the model needs for them.
    flops: f64,
    /// Spent on evaluation and saving, which is not the steps' time.
    aside: Duration,
    running: bool,
}

struct LapTime {
    bytes_per_second: f64,
    flops_per_second: f64,
    data_wait: f64,
}

impl Lap {
    fn start(loader: &Loader) -> Self {
        let (began, waited) = (Instant::now(), loader.wait_seconds());
        Self { began, waited, bytes: 0, flops: 0.0, aside: Duration::ZERO, running: true }
    }

    /// Ends the lap.
    fn finish(&mut self, loader: &Loader) -> LapTime {
        self.running = false;
        let seconds = self.began.elapsed().saturating_sub(self.aside).as_secs_f64().max(1e-9);
        LapTime {
            bytes_per_second: self.bytes as f64 / seconds,
            flops_per_second: self.flops / seconds,
            data_wait: (loader.wait_seconds() - self.waited) / seconds,
        }
    }
}

/// What there is to say where a run goes on over bytes of another fingerprint, `now`, than it had `before`.
fn other_data(
    before: Option<&str>,
    now: &str,
    progress: &Progress,
    config: &Config,
    train_set: &dyn ByteDataset,
) -> Vec<String> {
    let Some(before) = before.filter(|&before| before != now) else { return vec![] };
    let bytes = |fingerprint: &str| fingerprint.split(',').next().unwrap_or_default().to_string();
    let seq_len = seq_len_for_step(progress.completed, config.train.steps, &config.data.curriculum()) as usize;
    let windows = config.data.order.windows(train_set, seq_len).map_or(0, |windows| windows.count());
    let goes_on = (progress.position.seq_len, progress.position.windows) == (seq_len as u64, windows);
    vec![format!(
        "data.train {} holds other bytes than the checkpoint was trained on ({} of them; then {}): {}",
        config.data.train,
        bytes(now),
        bytes(before),
        if goes_on { "the place in them stays what it was" } else { "a new pass over them begins" },
    )]
}

fn in_train_data(source: DataError) -> TrainError {
    TrainError::Data { key: "data.train", source }
}

fn open(spec: &str, key: &'static str) -> Result<Arc<dyn ByteDataset>, TrainError> {
    data::open(spec).map_err(|source| TrainError::Data { key, source })
}

/// Bytes that training takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryNeed {
    /// Weights, gradients and the optimizer's two moments: 16 bytes a parameter, or 10 with moments of 8 bits, and 2
    /// for the quantized weight. Of N ranks that shard (`ddp.zero_stage`) each has an N-th of the moments, and of 8 bytes
    /// that it steps and sends with.
    pub state: u64,
    /// Activations of one micro-batch at the longest sequence, roughly.
    pub activations: u64,
}

/// What training `config` takes on each of so many ranks, in bytes. The codes of the last look inside are a byte a
/// parameter. Activations are estimated from the tensors that autograd keeps: per layer and token, in values of 4 bytes,
/// 2 d with checkpointing (the inputs of both halves), else about 9 d + 3 d_ff under fused kernels and 20 d + 8 d_ff
/// under libtorch's; one half of a block is always live, and the logits three times.
pub fn memory_need(config: &Config, ranks: usize) -> MemoryNeed {
    let m = &config.model;
    let tokens = config.train.batch_size.saturating_mul(config.data.max_seq_len());
    let fused = config.quant.may_fuse();
    // While quantization comes in, the reference computes.
    let (d, d_ff) = if fused && config.quant.start_frac == 0.0 { (9, 3) } else { (20, 8) };
    let layer = d * m.d_model + d_ff * m.d_ff;
    let kept = if config.train.checkpointing { 2 * m.d_model } else { layer };
    let moments = match config.optim.name {
        OptimizerName::AdamW => 8,
        OptimizerName::AdamW8bit => 2,
    };
    let values = m.n_layer.saturating_mul(kept) + layer + 3 * crate::config::VOCAB_SIZE;
    let parameters = m.parameters() as u64;
    // A rank's part of the mean gradient, and of the parameters once more.
    let stepped = match ranks as u64 {
        ranks if ranks > 1 && config.ddp.zero_stage > 0 => parameters.saturating_mul(moments + 8).div_ceil(ranks),
        _ => parameters.saturating_mul(moments),
    };
    MemoryNeed {
        // Fused kernels keep each weight quantized, in two orders.
        state: (8 + if fused { 2 } else { 0 } + u64::from(config.train.internals_every > 0))
            .saturating_mul(parameters)
            .saturating_add(stepped),
        activations: 4u64.saturating_mul(tokens.saturating_mul(values) as u64),
    }
}

fn check_memory(config: &Config, ranks: usize, device: Device) -> Result<(), TrainError> {
    let free = match device {
        Device::Cuda(index) => cuda_memory(index)?.free,
        _ => host_memory().available,
    };
    let needed = memory_need(config, ranks);
    // Zero: the system does not say.
    if free > 0 && needed.state.saturating_add(needed.activations) > free {
        return Err(TrainError::Memory {
            device: format!("{device:?}").to_lowercase(),
            parameters: config.model.parameters(),
            needed,
            free,
            checkpointing: config.train.checkpointing,
        });
    }
    Ok(())
}

/// A path as a shell reads it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    if text.chars().all(|c| c.is_alphanumeric() || "/._-+,:@%".contains(c)) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    /// Rows of the log, as text: not a number equals nothing.
    #[derive(Default)]
    struct Rows(Vec<String>);

    impl TrainObserver for Rows {
        fn on_step(&mut self, row: &TrainRow) {
            // But for what the clock says.
            let row = TrainRow { bytes_per_second: 0.0, data_wait: 0.0, peak_memory_bytes: 0, ..row.clone() };
            self.0.push(format!("{row:?}"));
        }

        fn on_internals(&mut self, row: &InternalsRow) {
            self.0.push(format!("{row:?}"));
        }
    }

    fn trainer(dir: &Path, lag: usize, change: impl FnOnce(&mut Config)) -> Trainer {
        let mut config = Config::default();
        config.model = ModelConfig { n_layer: 1, d_model: 16, n_head: 2, d_ff: 24, ..config.model };
        config.data.seq_len = Some(8);
        config.data.train = dir.join("bytes").display().to_string();
        config.train = TrainConfig { steps: 9, batch_size: 2, log_every: 4, save_every: 3, ..config.train };
        config.train.internals_every = 3;
        config.train.out = dir.join(format!("lag{lag}"));
        change(&mut config);
        std::fs::write(dir.join("bytes"), (0..=255).cycle().take(2000).collect::<Vec<u8>>()).unwrap();
        let mut trainer = Trainer::new(config, Start::Fresh).unwrap();
        trainer.lag = lag;
        trainer
    }

    /// A device that lags behind the host, as a GPU does: what is logged and saved must not change.
    #[test]
    fn a_device_that_lags_behind_changes_nothing() {
        let changes: [fn(&mut Config); 3] = [
            |_| {},
            |config| config.train.stop_at = Some(5),
            // After the first step nothing is finite any more, and the second would be saved.
            |config| {
                (config.optim.lr, config.optim.warmup_frac) = (1e30, 0.0);
                config.train.save_every = 2;
            },
        ];
        for change in changes {
            let dir = tempfile::tempdir().unwrap();
            let mut prompt = trainer(dir.path(), 0, change);
            let mut lagging = trainer(dir.path(), 1, change);
            lagging.vs.copy(&prompt.vs).unwrap();
            let [(rows, summary), (lagging_rows, lagging_summary)] = [&mut prompt, &mut lagging].map(|trainer| {
                let mut rows = Rows::default();
                let summary = trainer.train(&mut rows, &AtomicBool::new(false)).unwrap();
                (rows.0, summary)
            });
            assert_eq!(rows, lagging_rows);
            assert!(rows.iter().filter(|row| row.starts_with("InternalsRow")).count() > 1);
            assert_eq!(summary.completed, lagging_summary.completed);
            assert_eq!(prompt.progress, lagging.progress);
            let saved = |trainer: &Trainer| {
                let entries = std::fs::read_dir(trainer.run.dir()).unwrap().map(|entry| entry.unwrap());
                let checkpoints = entries.filter(|entry| entry.path().extension().is_some_and(|e| e == "pt"));
                let progress = |path: &Path| TrainingCheckpoint::open(path).unwrap().progress();
                let mut all: Vec<_> = checkpoints.map(|entry| (entry.file_name(), progress(&entry.path()))).collect();
                all.sort_by(|a, b| a.0.cmp(&b.0));
                all
            };
            assert_eq!(saved(&prompt), saved(&lagging));
            // Nothing is saved while steps are skipped, but for the end.
            assert!(prompt.progress.skipped == 0 || saved(&prompt).len() == 2, "{:?}", saved(&prompt));
            for (name, tensor) in prompt.vs.variables() {
                assert!(tensor.equal(&lagging.vs.variables()[&name]), "{name}");
            }
        }
    }

    /// The bits of all parameters and of the optimizer's state.
    fn bits(trainer: &Trainer) -> Vec<Vec<u8>> {
        let tensors = trainer.vs.trainable_variables().into_iter().chain(trainer.optimizer.state.tensors());
        tensors.map(|tensor| crate::libtorch::cpu_bytes(&tensor).as_ref().to_vec()).collect()
    }

    /// So large that the gradients of half precision overflow.
    fn with_scale(trainer: &mut Trainer, scale: f64) {
        trainer.scaler =
            Some(GradScaler::new(ScalerState { scale, growth_tracker: 7, ..Default::default() }, Device::Cpu));
    }

    #[test]
    fn the_last_step_is_logged_evaluated_and_saved() {
        #[derive(Default)]
        struct Steps(Vec<u64>, Vec<u64>);
        impl TrainObserver for Steps {
            fn on_step(&mut self, row: &TrainRow) {
                self.0.push(row.step);
            }
            fn on_validation(&mut self, row: &ValRow) {
                self.1.push(row.step);
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = trainer(dir.path(), 0, |config| {
            config.data.val = Some(config.data.train.clone());
            (config.train.steps, config.train.eval_every, config.train.keep) = (8, 5, 10);
        });
        let mut steps = Steps::default();
        let summary = trainer.train(&mut steps, &AtomicBool::new(false)).unwrap();
        // Logged every 4 steps, evaluated every 5, saved every 3 and where validation is the best so far.
        assert_eq!((steps.0, steps.1), (vec![0, 4, 7], vec![4, 7]));
        for steps in [3, 5, 6, 8] {
            assert!(trainer.run.after(steps).exists(), "{steps}");
        }
        assert_eq!(TrainingCheckpoint::open(&summary.checkpoint).unwrap().progress(), trainer.progress);
    }

    #[test]
    fn a_validation_that_is_not_finite_is_not_the_best() {
        let dir = tempfile::tempdir().unwrap();
        let mut trainer = trainer(dir.path(), 0, |config| {
            config.data.val = Some(config.data.train.clone());
            (config.train.steps, config.train.eval_every) = (2, 1);
        });
        {
            let _no_grad = tch::no_grad_guard();
            let _ = trainer.vs.variables()["tok_emb.weight"].narrow(1, 0, 1).fill_(f64::NAN);
        }
        trainer.train(&mut (), &AtomicBool::new(false)).unwrap();
        assert_eq!(trainer.progress.best_val_loss, None);
        assert!(!trainer.run.best().exists());
    }

    #[test]
    fn the_loss_and_the_norm_each_decide_that_a_step_is_skipped() {
        let number = |x: f64| Tensor::from_slice(&[x]).squeeze();
        let skipped = |loss, norm| not_finite(&number(loss), &number(norm)).double_value(&[]) == 1.0;
        assert!(!skipped(5.0, 1e30));
        for bad in [f64::NAN, f64::INFINITY] {
            assert!(skipped(bad, 1.0) && skipped(5.0, bad) && skipped(bad, bad));
        }
    }

    #[test]
    fn a_skipped_step_changes_no_weight_and_no_moment() {
        for (precision, name, decay) in [
            (Precision::Fp32, OptimizerName::AdamW, Decay::Matrices),
            (Precision::Fp32, OptimizerName::AdamW, Decay::All),
            (Precision::Fp16, OptimizerName::AdamW, Decay::Matrices),
            (Precision::Fp16, OptimizerName::AdamW8bit, Decay::Matrices),
            (Precision::Fp32, OptimizerName::AdamW8bit, Decay::All),
        ] {
            let dir = tempfile::tempdir().unwrap();
            for lag in [0, 1] {
                let mut trainer = trainer(dir.path(), lag, |config| {
                    (config.train.precision, config.optim.name, config.optim.decay) = (precision, name, decay);
                    (config.optim.lr, config.optim.weight_decay, config.optim.warmup_frac) = (0.1, 0.5, 0.0);
                    config.train.stop_at = Some(3);
                });
                if precision == Precision::Fp16 {
                    with_scale(&mut trainer, f64::exp2(60.0));
                } else {
                    // One number in the embedding of every byte.
                    let _no_grad = tch::no_grad_guard();
                    let _ = trainer.vs.variables()["tok_emb.weight"].narrow(1, 0, 1).fill_(f64::NAN);
                }
                let before = bits(&trainer);
                trainer.train(&mut (), &AtomicBool::new(false)).unwrap();
                assert_eq!((trainer.progress.completed, trainer.progress.skipped), (3, 3), "{precision:?}");
                assert!(bits(&trainer) == before, "{precision:?} {name:?} {decay:?}");
            }
        }
    }

    #[test]
    fn an_overflow_halves_the_scale_and_the_run_recovers() {
        let dir = tempfile::tempdir().unwrap();
        let first = f64::exp2(30.0);
        let mut trainer = trainer(dir.path(), 0, |config| {
            (config.train.precision, config.train.steps, config.train.log_every) = (Precision::Fp16, 40, 1);
            config.train.max_nonfinite = 100;
        });
        with_scale(&mut trainer, first);
        struct Scales(Vec<(u64, f64)>);
        impl TrainObserver for Scales {
            fn on_step(&mut self, row: &TrainRow) {
                self.0.push((row.skipped_steps, row.loss_scale.unwrap()));
            }
        }
        let mut rows = Scales(vec![]);
        trainer.train(&mut rows, &AtomicBool::new(false)).unwrap();
        for (skipped, scale) in &rows.0 {
            assert_eq!(*scale, first * f64::exp2(-(*skipped as f64)), "{:?}", rows.0);
        }
        let last = rows.0.last().unwrap().0;
        // 2^14 to 2^30: what is left of 40 steps is trained.
        assert!((1..=16).contains(&last), "{:?}", rows.0);
        assert_eq!((trainer.progress.skipped, trainer.progress.skipped_in_a_row), (last, 0));
        let since = rows.0.iter().filter(|(skipped, _)| *skipped == last).count() as i64 - 1;
        assert_eq!(trainer.scaler.as_ref().unwrap().state().growth_tracker, since, "{:?}", rows.0);
    }

    #[test]
    fn what_ranks_share_out_each_needs_a_part_of() {
        for (name, moments) in [(OptimizerName::AdamW, 8), (OptimizerName::AdamW8bit, 2)] {
            let mut config = Config::default();
            config.optim.name = name;
            let parameters = config.model.parameters() as u64;
            let whole = memory_need(&config, 1);
            assert_eq!(memory_need(&config, 4), whole, "nothing is shared out");
            config.ddp.zero_stage = 1;
            assert_eq!(memory_need(&config, 1), whole, "nor is it by one rank");
            // Of the moments, and of the gradient and the parameters in fp32.
            let expected = whole.state - parameters * moments + parameters * (moments + 8) / 8;
            let needed = memory_need(&config, 8);
            assert!(needed.state.abs_diff(expected) <= 1 && needed.activations == whole.activations, "{needed:?}");
        }
    }

    #[test]
    fn a_lagging_device_diverges_at_the_same_step() {
        let dir = tempfile::tempdir().unwrap();
        for lag in [0, 1] {
            let mut trainer = trainer(dir.path(), lag, |config| {
                (config.optim.lr, config.optim.warmup_frac) = (1e30, 0.0);
                config.train.max_nonfinite = 3;
            });
            let error = trainer.train(&mut (), &AtomicBool::new(false)).unwrap_err();
            assert!(matches!(error, TrainError::Diverged { skipped: 3, step: 3, .. }), "{error}");
        }
    }
}
