//! What clients have said of a machine, and are told of it: its description, from the first request to the end.
//!
//! Before the start the description grows here, each request checked at once: what is refused leaves no trace. After
//! it, control changes it as it changes the machine.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use alveole_counters::Registry;
use alveole_metrics::{Form, Gauges, Process, exposition};
use alveole_mmds::Metadata;
use alveole_vm_config::{
    CpuConfigSource, CpuTemplate, Drive, DriveUpdate, Logger, Metrics, NetworkInterface,
    NetworkInterfaceUpdate, RateLimiter, VmConfig,
};
use alveole_vm_control::{Answer, Command, InstanceInfo, Refusal, State, permit};

use crate::catalog;
use crate::resources::{self, ResourceError};
use crate::validate::{Invalid, ValidConfig, ValidDrive, validate};

/// Who answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Name of the machine.
    pub id: String,
    /// Name of the program.
    pub app_name: String,
    /// Its version.
    pub version: String,
    /// Version of the API that is spoken.
    pub api_version: String,
    /// When the process started: times of the boot are told from then.
    pub began: Instant,
}

/// What runs here and in which state, for threads that do not own the machine. The owner posts a state before it answers whoever
/// has changed it.
#[derive(Debug, Clone)]
pub struct Bulletin {
    identity: Arc<Identity>,
    /// Nothing while the owner must be asked. Held for no longer than it takes to copy it.
    state: Arc<Mutex<Option<State>>>,
}

impl Bulletin {
    fn new(identity: Identity) -> Self {
        Self {
            identity: Arc::new(identity),
            state: Arc::default(),
        }
    }

    /// What was posted last; nothing where its owner must be asked.
    #[must_use]
    pub fn instance(&self) -> Option<InstanceInfo> {
        let state = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.map(|state| self.instance_in(state))
    }

    fn instance_in(&self, state: State) -> InstanceInfo {
        InstanceInfo {
            id: self.identity.id.clone(),
            state,
            vmm_version: self.identity.version.clone(),
            app_name: self.identity.app_name.clone(),
        }
    }

    fn post(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
    }
}

/// The description of a machine, and who answers for it.
#[derive(Debug, Clone)]
pub struct Desk {
    bulletin: Bulletin,
    config: VmConfig,
    metadata: Arc<Metadata>,
}

impl Desk {
    /// A desk on which lies `config`: the default where nothing has been said yet. `metadata` is what the guest reads.
    #[must_use]
    pub fn new(identity: Identity, config: VmConfig, metadata: Arc<Metadata>) -> Self {
        Self {
            bulletin: Bulletin::new(identity),
            config,
            metadata,
        }
    }

    /// From when times of the boot are told.
    pub(crate) fn began(&self) -> Instant {
        self.bulletin.identity.began
    }

    /// What others may read of the machine without asking.
    #[must_use]
    pub fn bulletin(&self) -> &Bulletin {
        &self.bulletin
    }

    /// Lets others know the state of the machine.
    pub fn post(&self, state: State) {
        self.bulletin.post(state);
    }

    /// What the guest reads.
    #[must_use]
    pub fn metadata(&self) -> &Arc<Metadata> {
        &self.metadata
    }

    /// The description so far.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Notes where log lines go.
    pub fn set_logger(&mut self, logger: Logger) {
        self.config.logger = Some(logger);
    }

    /// Notes where counters are written.
    pub fn set_metrics(&mut self, metrics: Metrics) {
        self.config.metrics = Some(metrics);
    }

    /// Carries out a command that only concerns the description, or tells of it. Those that concern the program
    /// (log, counters) or a running machine are not for here, and are refused.
    ///
    /// # Errors
    /// It may not be carried out now, or makes no sense: the text says why and what to do.
    pub fn carry_out(&mut self, state: State, command: Command) -> Result<Answer, Refusal> {
        permit(state, &command)?;
        if let Some(answer) = self.tell(state, &command) {
            return Ok(answer);
        }
        let mut next = self.config.clone();
        let what = command.to_string();
        match command {
            Command::PutMetadata(data) => {
                let done = self.metadata.put(data);
                return done.map(|()| Answer::Done).map_err(|e| failed(&what, &e));
            }
            Command::PatchMetadata(patch) => {
                let done = self.metadata.patch(&patch);
                return done.map(|()| Answer::Done).map_err(|e| failed(&what, &e));
            }
            Command::PutMetadataConfig(config) => next.mmds_config = Some(config),
            Command::PutBootSource(source) => {
                if source.kernel_image_path.as_os_str().is_empty() {
                    return Err(told(&what, &[Invalid::NoKernel]));
                }
                resources::try_boot_files(&source).map_err(|e| failed(&what, &e))?;
                next.boot_source = source;
            }
            Command::PutMachineConfig(mut config) => {
                let said = config.cpu_template;
                config.cpu_template = said.or(next.machine_config.cpu_template);
                next.machine_config = config;
                name_template(said, &mut next);
            }
            Command::PatchMachineConfig(update) => {
                next.machine_config = update.applied_to(&next.machine_config);
                name_template(update.cpu_template, &mut next);
            }
            Command::PutCpuConfig(config) => {
                next.cpu_config = Some(CpuConfigSource::Here(config));
                next.machine_config.cpu_template = None;
            }
            Command::PutDrive(drive) => put(&mut next.drives, *drive, |d: &Drive| &d.drive_id),
            Command::PutNetworkInterface(interface) => {
                let all = &mut next.network_interfaces;
                put(all, *interface, |i: &NetworkInterface| &i.iface_id);
            }
            Command::PutVsock(vsock) => next.vsock = Some(vsock),
            Command::PutEntropy(entropy) => next.entropy = Some(entropy),
            Command::PutSerial(serial) => next.serial = Some(serial),
            Command::GetInstance
            | Command::GetVersion
            | Command::GetConfig
            | Command::GetMachineConfig
            | Command::GetMetrics { .. }
            | Command::GetMetadata
            | Command::PutLogger(_)
            | Command::PutMetrics(_)
            | Command::Start
            | Command::Pause
            | Command::Resume
            | Command::SendCtrlAltDel
            | Command::FlushMetrics
            | Command::PatchDrive(_)
            | Command::SetLink { .. }
            | Command::PatchNetworkInterface(_)
            | Command::CreateSnapshot(_)
            | Command::LoadSnapshot(_) => {
                return Err(Refusal::Failed(format!(
                    "cannot {what}: this is a bug of the monitor, please report it"
                )));
            }
        }
        let valid = check(&next, &what)?;
        self.try_new(&next, &valid).map_err(|e| failed(&what, &e))?;
        self.config = next;
        Ok(Answer::Done)
    }

    /// The answer to a question; none where something is to be done.
    fn tell(&self, state: State, command: &Command) -> Option<Answer> {
        Some(match command {
            Command::GetInstance => Answer::Instance(self.bulletin.instance_in(state)),
            Command::GetVersion => Answer::Version(self.bulletin.identity.api_version.clone()),
            Command::GetConfig => Answer::Config(Box::new(self.config.clone())),
            Command::GetMachineConfig => Answer::MachineConfig(self.config.machine_config.clone()),
            Command::GetMetrics { open_metrics } => self.exposition(state, *open_metrics, None),
            Command::GetMetadata => Answer::Metadata(self.metadata.get()),
            _ => return None,
        })
    }

    /// Counters as text; before there is a machine, what is known of it.
    pub(crate) fn exposition(
        &self,
        state: State,
        open_metrics: bool,
        machine: Option<(&Registry, &Process, Gauges)>,
    ) -> Answer {
        let form = if open_metrics {
            Form::OpenMetrics
        } else {
            Form::Text
        };
        let (mut counters, mut histograms) = (Vec::new(), Vec::new());
        let (mut gauges, mut process) = (Gauges::default(), None);
        if let Some((registry, files, known)) = machine {
            (counters, histograms) = (registry.gather(), registry.gather_histograms());
            (gauges, process) = (known, Some(files.read()));
        }
        gauges.id.clone_from(&self.bulletin.identity.id);
        gauges.version.clone_from(&self.bulletin.identity.version);
        gauges.state = state.to_string();
        Answer::Text {
            content_type: form.content_type(),
            text: exposition(form, &gauges, &counters, &histograms, process.as_ref()),
        }
    }

    /// Looks whether what is new in `next` is there on the host.
    fn try_new(&self, next: &VmConfig, valid: &ValidConfig) -> Result<(), ResourceError> {
        for drive in &next.drives {
            if !self.config.drives.contains(drive)
                && let Some(drive) = valid.drive(&drive.drive_id)
            {
                catalog::try_drive(drive)?;
            }
        }
        for interface in &next.network_interfaces {
            if !self.config.network_interfaces.contains(interface)
                && let Some(interface) = valid.interface(&interface.iface_id)
            {
                catalog::try_interface(interface)?;
            }
        }
        Ok(())
    }

    /// The description with another path behind a drive, and bounds of it changed; and the drive as it then is.
    ///
    /// # Errors
    /// There is no such drive, or the machine's rules do not allow it.
    pub(crate) fn changed_drive(
        &self,
        update: &DriveUpdate,
        what: &str,
    ) -> Result<(VmConfig, ValidDrive), Refusal> {
        let mut next = self.config.clone();
        let id = &update.drive_id;
        let known = self.config.drives.iter().map(|d| &*d.drive_id);
        let no_such = || unknown(what, "drive", known);
        let Some(drive) = next.drives.iter_mut().find(|d| d.drive_id == *id) else {
            return Err(no_such());
        };
        if let Some(path) = &update.path_on_host {
            drive.path_on_host.clone_from(path);
        }
        if let Some(limiter) = &update.rate_limiter {
            merge(&mut drive.rate_limiter, limiter);
        }
        let valid = validate(&next).map_err(|broken| told(what, &broken))?;
        match valid.drive(id) {
            Some(drive) => Ok((next, drive.clone())),
            None => Err(no_such()),
        }
    }

    /// Takes bounds of a drive over into the description.
    ///
    /// # Errors
    /// There is no such drive.
    pub(crate) fn change_drive_limits(
        &mut self,
        update: &DriveUpdate,
        what: &str,
    ) -> Result<(), Refusal> {
        let all = &mut self.config.drives;
        let Some(drive) = all.iter_mut().find(|d| d.drive_id == update.drive_id) else {
            let known = all.iter().map(|d| &*d.drive_id);
            return Err(unknown(what, "drive", known));
        };
        if let Some(limiter) = &update.rate_limiter {
            merge(&mut drive.rate_limiter, limiter);
        }
        Ok(())
    }

    /// Takes bounds of a network interface over into the description.
    ///
    /// # Errors
    /// There is no such interface.
    pub(crate) fn change_interface(
        &mut self,
        update: &NetworkInterfaceUpdate,
        what: &str,
    ) -> Result<(), Refusal> {
        let all = &mut self.config.network_interfaces;
        let Some(interface) = all.iter_mut().find(|i| i.iface_id == update.iface_id) else {
            let known = all.iter().map(|i| &*i.iface_id);
            return Err(unknown(what, "network interface", known));
        };
        if let Some(limiter) = &update.rx_rate_limiter {
            merge(&mut interface.rx_rate_limiter, limiter);
        }
        if let Some(limiter) = &update.tx_rate_limiter {
            merge(&mut interface.tx_rate_limiter, limiter);
        }
        Ok(())
    }

    /// Program and version, as snapshots name them.
    pub(crate) fn writer(&self) -> String {
        let Identity {
            app_name, version, ..
        } = &*self.bulletin.identity;
        format!("{app_name} {version}")
    }

    /// Whether nothing has been said of the machine yet: where log and counters go does not count.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        let said = VmConfig {
            logger: None,
            metrics: None,
            ..self.config.clone()
        };
        said == VmConfig::default()
    }

    /// Takes over the description of a snapshot. Where log and counters go stays.
    pub fn set_restored(&mut self, config: VmConfig) {
        let VmConfig {
            logger, metrics, ..
        } = std::mem::take(&mut self.config);
        self.config = VmConfig {
            logger,
            metrics,
            ..config
        };
    }

    /// Takes over what [`Self::changed_drive`] gave.
    pub(crate) fn set_config(&mut self, config: VmConfig) {
        self.config = config;
    }
}

/// What processors say of themselves has one owner, and the last who speaks counts: a template that is named, also none, takes the
/// place of bits.
fn name_template(said: Option<CpuTemplate>, next: &mut VmConfig) {
    if said.is_some() {
        next.cpu_config = None;
    }
    if said == Some(CpuTemplate::None) {
        next.machine_config.cpu_template = None;
    }
}

/// Checks a description that may lack its kernel still.
fn check(next: &VmConfig, what: &str) -> Result<ValidConfig, Refusal> {
    let mut whole = Cow::Borrowed(next);
    if next.boot_source.kernel_image_path.as_os_str().is_empty() {
        // Any name does: the rules only ask whether there is one.
        whole.to_mut().boot_source.kernel_image_path = "kernel".into();
    }
    validate(&whole).map_err(|broken| told(what, &broken))
}

/// Sets the one of this name anew in its place, or adds it.
fn put<T>(all: &mut Vec<T>, new: T, id: impl Fn(&T) -> &String) {
    match all.iter_mut().find(|old| id(old) == id(&new)) {
        Some(old) => *old = new,
        None => all.push(new),
    }
}

/// Takes over which bounds are named. One that is nothing bounds no more.
fn merge(limiter: &mut Option<RateLimiter>, update: &RateLimiter) {
    let mut whole = limiter.unwrap_or_default();
    for (bucket, new) in [
        (&mut whole.bandwidth, update.bandwidth),
        (&mut whole.ops, update.ops),
    ] {
        if let Some(new) = new {
            *bucket = (new.size > 0 && new.refill_time > 0).then_some(new);
        }
    }
    *limiter = (whole != RateLimiter::default()).then_some(whole);
}

fn unknown<'a>(what: &str, kind: &str, known: impl Iterator<Item = &'a str>) -> Refusal {
    let known: Vec<_> = known.collect();
    let known = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    Refusal::Failed(format!(
        "cannot {what}: the machine has no such {kind}; it has {known}"
    ))
}

fn failed(what: &str, why: &dyn std::error::Error) -> Refusal {
    Refusal::Failed(format!("cannot {what}: {why}"))
}

fn told(what: &str, broken: &[Invalid]) -> Refusal {
    let all: Vec<_> = broken.iter().map(ToString::to_string).collect();
    Refusal::Failed(format!("cannot {what}: {}", all.join("; ")))
}
