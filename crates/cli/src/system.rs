//! `alveole system`: what all of it takes on this host's disk, and how to have less.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use alveole_instance::State;
use anyhow::Context;
use clap::Subcommand;
use serde_json::json;

use crate::guests::{Format, table};
use crate::image::in_use;
use crate::places::Places;
use crate::print;
use crate::size::human;

#[derive(clap::Args)]
pub(crate) struct SystemArgs {
    #[command(subcommand)]
    command: SystemCommand,
}

#[derive(Subcommand)]
enum SystemCommand {
    /// Show what images, kernels and VMs take
    Df {
        /// text or json
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Remove VMs that have ended, and what no image and no VM needs
    #[command(
        after_help = "What VMs wrote is gone with them. VMs that were made and never started stay, as do kernels, snapshots and volumes (alveole volume prune)."
    )]
    Prune {
        /// Images that no VM has, too
        #[arg(short, long)]
        all: bool,
    },
}

pub(crate) fn system(args: &SystemArgs) -> anyhow::Result<ExitCode> {
    match &args.command {
        SystemCommand::Df { format } => df(*format),
        SystemCommand::Prune { all } => prune(*all),
    }
}

/// A kind of things, how many of them there are, what they take, and what of that nobody needs.
struct Kind {
    name: &'static str,
    count: u64,
    bytes: u64,
    unused_bytes: u64,
}

fn df(format: Format) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    let usage = places.images()?.usage()?;
    let mut kinds = Vec::new();
    for (name, usage) in [
        ("layers and configurations", usage.blobs),
        ("root disks of images", usage.disks),
        ("unfinished downloads", usage.unfinished),
    ] {
        kinds.push(Kind {
            name,
            count: usage.count,
            bytes: usage.bytes,
            unused_bytes: usage.unused_bytes,
        });
    }
    let kernels = places.kernels().list()?;
    kinds.push(Kind {
        name: "kernels",
        count: kernels.len() as u64,
        bytes: kernels.iter().map(|k| k.size_bytes).sum(),
        unused_bytes: 0,
    });
    let mut vms = Kind {
        name: "VMs",
        count: 0,
        bytes: 0,
        unused_bytes: 0,
    };
    // Copies and snapshots share files: each counts with the first that has it.
    let mut seen = HashSet::new();
    for vm in places.vms().list()? {
        let bytes = taken(vm.folder(), &mut seen);
        vms.count += 1;
        vms.bytes += bytes;
        if matches!(vm.state(), Ok(State::Ended(_) | State::Lost)) {
            vms.unused_bytes += bytes;
        }
    }
    kinds.push(vms);
    let snapshots = places.snapshots().list()?;
    kinds.push(Kind {
        name: "snapshots",
        count: snapshots.len() as u64,
        bytes: snapshots.iter().map(|s| taken(s.folder(), &mut seen)).sum(),
        unused_bytes: 0,
    });
    let (count, bytes, unused_bytes) = crate::volume::usage(&places)?;
    kinds.push(Kind {
        name: "volumes",
        count,
        bytes,
        unused_bytes,
    });
    let empty = places.empty_disks();
    kinds.push(Kind {
        name: "empty disks, to be copied",
        count: fs::read_dir(&empty).into_iter().flatten().count() as u64,
        bytes: taken(&empty, &mut seen),
        unused_bytes: 0,
    });
    let text = match format {
        Format::Json => {
            let list: Vec<_> = kinds
                .iter()
                .map(|k| json!({"kind": k.name, "count": k.count, "bytes": k.bytes, "unused_bytes": k.unused_bytes}))
                .collect();
            let json = serde_json::to_string_pretty(&list).context("cannot write JSON")?;
            format!("{json}\n")
        }
        Format::Text => {
            let rows = kinds.iter().map(|k| {
                vec![
                    k.name.to_owned(),
                    k.count.to_string(),
                    human(k.bytes),
                    human(k.unused_bytes),
                ]
            });
            table(&["KIND", "COUNT", "SIZE", "UNUSED"], rows.collect())
        }
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// What the files in a folder take of the disk, but for those (device, inode) that have been seen: holes do not.
fn taken(folder: &Path, seen: &mut HashSet<(u64, u64)>) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        .filter(|metadata| seen.insert((metadata.dev(), metadata.ino())))
        .map(|metadata| metadata.blocks().saturating_mul(512))
        .sum()
}

fn prune(all: bool) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    let vms = places.vms();
    vms.sweep();
    for vm in vms.list()? {
        if !matches!(vm.state(), Ok(State::Ended(_) | State::Lost)) {
            continue;
        }
        // One that was started just now has its keeper.
        let Ok(lock) = vm.lock() else { continue };
        let name = vm.name.clone();
        vm.remove(&lock)?;
        print(&format!("removed VM {name}\n"))?;
    }
    let (names, freed_bytes) = places.images()?.prune(&in_use()?, all)?;
    for name in names {
        print(&format!("removed image {name}\n"))?;
    }
    print(&format!("freed {} of images\n", human(freed_bytes)))?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_several_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        for folder in [&one, &two] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(one.join("memory"), vec![1; 64 << 10]).unwrap();
        fs::hard_link(one.join("memory"), two.join("memory-before")).unwrap();
        let mut seen = HashSet::new();
        let first = taken(&one, &mut seen);
        assert!(first >= 64 << 10, "{first}");
        assert_eq!(taken(&two, &mut seen), 0);
        assert_eq!(taken(&two, &mut HashSet::new()), first);
    }
}
