//! `alveole update`: changes what VMs are and may use, while they run as far as that goes.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use alveole_instance::{Happened, InstanceError, Limits, Restart, Vm};
use anyhow::bail;

use super::limits::{LimitArgs, apply};
use super::run::restart;
use crate::hint;
use crate::print;
use crate::size::MemorySize;

/// A machine that just starts has its API soon, and one that waits for its next start has what was written down.
const START_PATIENCE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);

#[derive(clap::Args)]
#[command(after_help = "\
Limits, --restart and labels are changed at once. The number of processors and the memory of a machine that runs cannot be: \
--next-start has them changed for its next start, whether somebody asks for that or --restart does.")]
pub(crate) struct UpdateArgs {
    /// Number of vCPUs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    cpus: Option<u8>,

    /// Guest memory: 512M, 2G, or a plain number of MiB
    #[arg(long, value_name = "SIZE")]
    memory: Option<MemorySize>,

    /// Let a VM that runs have --cpus and --memory from its next start on
    #[arg(long)]
    next_start: bool,

    #[command(flatten)]
    limits: LimitArgs,

    /// What happens after its end
    #[arg(long, value_name = "no|on-failure[:N]|always", value_parser = restart)]
    restart: Option<Restart>,

    /// Set a label; repeatable
    #[arg(long, value_name = "NAME[=VALUE]")]
    label: Vec<String>,

    /// Remove a label; repeatable
    #[arg(long, value_name = "NAME")]
    label_rm: Vec<String>,

    /// The VMs
    #[arg(required = true)]
    pub(super) vms: Vec<String>,
}

pub(super) fn update(vm: &Vm, args: &UpdateArgs) -> anyhow::Result<ExitCode> {
    let machine = args.cpus.is_some() || args.memory.is_some();
    if !machine
        && args.limits.is_empty()
        && args.restart.is_none()
        && args.label.is_empty()
        && args.label_rm.is_empty()
    {
        bail!(
            "nothing is to be changed: give --cpus, --memory, --disk-bandwidth, --disk-iops, --net-bandwidth, --restart, --label or --label-rm"
        );
    }
    let runs = vm.is_kept()?;
    if machine && runs && !args.next_start {
        bail!(
            "the processors and the memory of '{0}' cannot be changed while it runs: \
             add --next-start to have them changed for its next start, or stop it first (alveole stop {0})",
            vm.name
        );
    }
    let mut before = Limits::default();
    let mut changed = Vec::new();
    let mut reached = true;
    let now = vm.change(|record| -> anyhow::Result<()> {
        if record.remove && args.restart.is_some_and(|restart| restart != Restart::No) {
            bail!(
                "'{}' is removed with its end (--rm), so that it cannot be started again: leave --restart out",
                vm.name
            );
        }
        before = record.limits;
        if let Some(cpus) = args.cpus {
            record.cpus = cpus;
            changed.push(format!("cpus={cpus}"));
        }
        if let Some(memory) = args.memory {
            record.memory_mib = memory.mib();
            changed.push(format!("memory={memory}"));
        }
        args.limits.change(&mut record.limits);
        changed.extend(changed_limits(&before, &record.limits));
        if let Some(restart) = args.restart {
            record.restart = restart;
            changed.push(format!("restart={}", word(restart)));
        }
        for name in &args.label_rm {
            if record.labels.remove(name).is_none() {
                bail!("'{}' has no label '{name}': alveole inspect {0} shows those it has", vm.name);
            }
            changed.push(format!("label-rm={name}"));
        }
        for (name, value) in super::run::labels(&args.label) {
            changed.push(format!("label={name}={value}"));
            record.labels.insert(name, value);
        }
        // Last, and before it is written down: what the machine does not take would keep it from its next start.
        reached = apply_now(vm, &before, &record.limits)?;
        Ok(())
    })?;
    if !reached {
        // It was between two starts, and may have been described before this was written down.
        match apply(&now, &before, &now.record.limits) {
            Ok(()) | Err(InstanceError::DoesNotRun(_)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    now.note(Happened::Updated { changed });
    if machine && runs {
        hint(&format!(
            "'{0}' has its new processors and memory from its next start on (alveole stop {0}, alveole start {0})",
            vm.name
        ));
    }
    print(&format!("{}\n", vm.name))?;
    Ok(ExitCode::SUCCESS)
}

/// Gives a machine that runs, or just starts, its new limits. False: there is none now; one that starts later has them of itself.
fn apply_now(vm: &Vm, before: &Limits, after: &Limits) -> Result<bool, InstanceError> {
    if before == after {
        return Ok(true);
    }
    let until = Instant::now() + START_PATIENCE;
    loop {
        match apply(vm, before, after) {
            Err(InstanceError::DoesNotRun(_)) => {}
            done => return done.map(|()| true),
        }
        if !vm.is_kept()? || Instant::now() > until {
            return Ok(false);
        }
        thread::sleep(LOOK);
    }
}

fn changed_limits(before: &Limits, after: &Limits) -> Vec<String> {
    let each = |limits: &Limits| {
        [
            ("disk-bandwidth", limits.disk_bytes_per_s),
            ("disk-iops", limits.disk_operations_per_s),
            ("net-bandwidth", limits.network_bytes_per_s),
        ]
    };
    let pairs = each(before).into_iter().zip(each(after));
    pairs
        .filter(|(before, after)| before != after)
        .map(|(_, (name, limit))| format!("{name}={}", limit.unwrap_or_default()))
        .collect()
}

fn word(restart: Restart) -> String {
    match restart {
        Restart::No => "no".into(),
        Restart::Always => "always".into(),
        Restart::OnFailure(None) => "on-failure".into(),
        Restart::OnFailure(Some(most)) => format!("on-failure:{most}"),
    }
}
