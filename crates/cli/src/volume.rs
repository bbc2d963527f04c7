//! `alveole volume`: disks with a name, which outlive the VMs that use them.

use std::process::ExitCode;

use alveole_instance::{Content, InstanceError, Volume};
use anyhow::Context;
use clap::Subcommand;
use serde_json::json;

use crate::guests::{Format, table, volumes};
use crate::places::Places;
use crate::size::{DiskSize, human};
use crate::{each_name, print};

#[derive(clap::Args)]
pub(crate) struct VolumeArgs {
    #[command(subcommand)]
    command: VolumeCommand,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Make a volume: an empty file system on a disk of its own. `alveole run -v NAME:GUEST` makes one as well
    Create {
        /// What it can grow to: it takes of this host's disk what is written to it; 10G if nothing is said
        #[arg(long, value_name = "SIZE")]
        size: Option<DiskSize>,
        /// A word about it, for people and programs; repeatable
        #[arg(long, value_name = "NAME[=VALUE]")]
        label: Vec<String>,
        /// What to call it
        name: String,
    },
    /// Show the volumes
    Ls {
        /// Names alone
        #[arg(short, long)]
        quiet: bool,
        /// text or json
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show everything that is known of volumes, as JSON
    Inspect {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove volumes, and what is in them
    Rm {
        /// Those that VMs have, too, if these do not run
        #[arg(short, long)]
        force: bool,
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove the volumes that no VM has, and what is in them
    Prune,
}

/// The names of the VMs that have a volume.
fn users(places: &Places, name: &str) -> anyhow::Result<Vec<String>> {
    let has = |vm: &alveole_instance::Vm| {
        let mut all = vm.record.volumes.iter();
        all.any(|p| matches!(&p.what, Content::Volume(n) if n == name))
    };
    let vms = places.vms().list()?;
    Ok(vms.into_iter().filter(has).map(|vm| vm.name).collect())
}

fn facts(places: &Places, volume: &Volume) -> anyhow::Result<serde_json::Value> {
    Ok(json!({
        "name": volume.name, "created_ms": volume.record.created_ms, "size_bytes": volume.record.size_bytes,
        "taken_bytes": volume.taken_bytes(), "labels": volume.record.labels, "disk": volume.disk(),
        "vms": users(places, &volume.name)?, "in_use": volume.is_used(),
    }))
}

pub(crate) fn volume(args: &VolumeArgs) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    let all = places.volumes();
    match &args.command {
        VolumeCommand::Create { size, label, name } => {
            let bytes = size.as_ref().map_or(volumes::USUAL_BYTES, |s| s.bytes());
            volumes::make(&places, &all, name, bytes, crate::guests::labels(label))?;
            print(&format!("{name}\n"))?;
        }
        VolumeCommand::Ls { quiet, format } => {
            let list = all.list()?;
            let text = match format {
                _ if *quiet => list.iter().map(|v| format!("{}\n", v.name)).collect(),
                Format::Json => {
                    let facts: Result<Vec<_>, _> = list.iter().map(|v| facts(&places, v)).collect();
                    let json =
                        serde_json::to_string_pretty(&facts?).context("cannot write JSON")?;
                    format!("{json}\n")
                }
                Format::Text => {
                    let mut rows = Vec::new();
                    for v in &list {
                        rows.push(vec![
                            v.name.clone(),
                            human(v.taken_bytes()),
                            human(v.record.size_bytes),
                            users(&places, &v.name)?.join(", "),
                        ]);
                    }
                    table(&["NAME", "TAKEN", "SIZE", "VMS"], rows)
                }
            };
            print(&text)?;
        }
        VolumeCommand::Inspect { names } => {
            let mut found = Vec::new();
            for name in names {
                found.push(facts(&places, &all.find(name)?)?);
            }
            let json = serde_json::to_string_pretty(&found).context("cannot write JSON")?;
            print(&format!("{json}\n"))?;
        }
        VolumeCommand::Rm { force, names } => {
            return each_name(names, |name| {
                remove(&places, name, *force)?;
                print(&format!("{name}\n"))
            });
        }
        VolumeCommand::Prune => {
            let mut freed = 0;
            for volume in all.list()? {
                if !users(&places, &volume.name)?.is_empty() {
                    continue;
                }
                let (name, bytes) = (volume.name.clone(), volume.taken_bytes());
                match volume.remove() {
                    // A VM has it since.
                    Err(InstanceError::VolumeInUse(_)) => continue,
                    removed => removed?,
                }
                freed += bytes;
                print(&format!("removed volume {name}\n"))?;
            }
            print(&format!("freed {}\n", human(freed)))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(places: &Places, name: &str, force: bool) -> anyhow::Result<()> {
    let found = places.volumes().find(name)?;
    let users = users(places, name)?;
    if !force && !users.is_empty() {
        anyhow::bail!(
            "the volume '{name}' is one of {}: remove that first, or say --force, which it does not start again without",
            users.join(", ")
        );
    }
    Ok(found.remove()?)
}

/// What volumes take, how many there are, and what of that no VM has.
pub(crate) fn usage(places: &Places) -> anyhow::Result<(u64, u64, u64)> {
    let (mut count, mut bytes, mut unused) = (0, 0, 0);
    for volume in places.volumes().list()? {
        let taken = volume.taken_bytes();
        count += 1;
        bytes += taken;
        if users(places, &volume.name)?.is_empty() {
            unused += taken;
        }
    }
    Ok((count, bytes, unused))
}
