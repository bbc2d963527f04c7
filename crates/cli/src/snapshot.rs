//! `alveole snapshot`, `restore`, `fork`: moments of running VMs, and VMs that go on from them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use alveole_host::programs;
use alveole_instance::{InstanceError, MEMORY, PACKED, Snapshot, SnapshotRecord, memory_before};
use anyhow::{Context, anyhow, bail};
use clap::Subcommand;
use serde_json::json;

use crate::guests::{self, Copies, CopyArgs, Format, Taking, table, take};
use crate::memory::told;
use crate::packing;
use crate::places::Places;
use crate::pool;
use crate::size::human;
use crate::{each_name, hint, print};

#[derive(clap::Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Subcommand)]
enum SnapshotCommand {
    /// Take a snapshot of a running VM, memory and disk of one moment; the VM goes on
    Create {
        /// Only what has changed in memory since the snapshot of this VM before it, which may be removed afterwards. The first has all, and what
        /// changes is noted from then on, which costs the VM some time
        #[arg(long)]
        diff: bool,
        /// The VM
        vm: String,
        /// What to call it [the VM's name, and -1, -2 and so on]
        name: Option<String>,
    },
    /// Show the snapshots
    Ls {
        /// Names alone
        #[arg(short, long)]
        quiet: bool,
        /// text or json
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Show everything that is known of snapshots, as JSON
    Inspect {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Read snapshots as a load would, and say what is wrong with them
    Verify {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Make one disk of those that a snapshot of a copy is laid over, and one memory file of those of a diff, so that it stands alone
    Flatten {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Compress the memory of snapshots, in place; VMs that go on from them have theirs from a process that unpacks it as they touch it
    Pack {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Have the memory of snapshots as it was, to be mapped and shared by all VMs that go on from them
    Unpack {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Write a snapshot to an archive, as it is; the image of its VM is not in it (alveole image export)
    Export {
        /// Its name
        name: String,
        /// The file, or - for standard output
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// Get a snapshot from an archive that `export` has written, on this host or another one. Who made it can have a VM that is made of it read
    /// what this user can read: take those of people you trust
    Import {
        /// The file, or - for standard input
        file: PathBuf,
        /// What to call it
        name: String,
    },
    /// Remove snapshots; VMs that go on from them stay
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(clap::Args)]
pub(crate) struct RestoreArgs {
    #[command(flatten)]
    copies: CopyArgs,
    /// The snapshot
    snapshot: String,
    /// Note what they change in memory from their beginning, so that their first snapshot by `create --diff` builds upon this one. What they
    /// use anew comes in small pages then
    #[arg(long)]
    track_changes: bool,
}

#[derive(clap::Args)]
pub(crate) struct ForkArgs {
    #[command(flatten)]
    copies: CopyArgs,
    /// A VM that runs, and goes on, or a snapshot
    of: String,
}

pub(crate) fn snapshot(args: &SnapshotArgs) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    let all = places.snapshots();
    match &args.command {
        SnapshotCommand::Create { diff, vm, name } => {
            let vm = places.vms().find(vm)?;
            let what = match diff {
                true => Taking::Diff(&all),
                false => Taking::Full,
            };
            let take = |folder: &Path| take(&vm, folder, what);
            let made = match name {
                Some(name) => all.create(name, take)?,
                None => {
                    let taken: Vec<_> = all.list()?.into_iter().map(|s| s.name).collect();
                    let mut names = (1_u32..).map(|number| format!("{}-{number}", vm.name));
                    let name = names
                        .find(|name| !taken.contains(name))
                        .context("too many snapshots")?;
                    all.create(&name, take)?
                }
            };
            hint(&format!(
                "the VM '{}' stood still for {:.1} ms",
                vm.name,
                made.record.stood_still_us as f64 / 1000.0
            ));
            print(&format!("{}\n", made.name))?;
        }
        SnapshotCommand::Ls { quiet, format } => {
            let list = all.list()?;
            let text = match format {
                _ if *quiet => list.iter().map(|s| format!("{}\n", s.name)).collect(),
                Format::Json => {
                    let facts: Vec<_> = list.iter().map(|s| facts(s, &list)).collect();
                    format!("{}\n", serde_json::to_string_pretty(&facts)?)
                }
                Format::Text => {
                    let row = |s: &Snapshot| {
                        let of = &s.record;
                        vec![
                            s.name.clone(),
                            of.vm.clone(),
                            guests::shortened(&of.record.image),
                            created(of.created_ms),
                            format!("{} MiB{}", of.memory_mib, packed(s)),
                            kind(s, &list),
                            human(s.memory_bytes()),
                            human(s.taken_bytes()),
                        ]
                    };
                    let head = [
                        "NAME", "VM", "IMAGE", "TAKEN", "MEMORY", "KIND", "ITS OWN", "ON DISK",
                    ];
                    table(&head, list.iter().map(row).collect())
                }
            };
            print(&text)?;
        }
        SnapshotCommand::Inspect { names } => {
            let found: Result<Vec<_>, _> = names.iter().map(|name| all.find(name)).collect();
            let list = all.list()?;
            let facts: Vec<_> = found?.iter().map(|s| facts(s, &list)).collect();
            print(&format!("{}\n", serde_json::to_string_pretty(&facts)?))?;
        }
        SnapshotCommand::Verify { names } => {
            return each_name(names, |name| verify(&all.find(name)?));
        }
        SnapshotCommand::Flatten { names } => {
            return each_name(names, |name| match guests::flatten(&all.find(name)?)? {
                true => print(&format!(
                    "{name}: its memory is one file now, and its disk one\n"
                )),
                false => print(&format!(
                    "{name}: its memory is one file already, and its disk one\n"
                )),
            });
        }
        SnapshotCommand::Pack { names } => {
            return each_name(names, |name| match packing::pack(&all.find(name)?)? {
                Some(sizes) => print(&format!("{name}: {}\n", told(&sizes))),
                None => print(&format!("{name}: it is packed already\n")),
            });
        }
        SnapshotCommand::Unpack { names } => {
            return each_name(names, |name| match packing::unpack(&all.find(name)?)? {
                true => print(&format!("{name}: unpacked\n")),
                false => print(&format!("{name}: it is not packed\n")),
            });
        }
        SnapshotCommand::Export { name, output } => export(&all.find(name)?, output)?,
        SnapshotCommand::Import { file, name } => {
            let made = all.create(name, |folder| import(file, folder))?;
            print(&format!("{}\n", made.name))?;
        }
        SnapshotCommand::Rm { names } => {
            return each_name(names, |name| {
                let found = all.find(name)?;
                if let Some(pool) = pool::of_snapshot(&places, name)? {
                    bail!(
                        "the pool '{pool}' is filled from the snapshot '{name}': remove that first (alveole pool rm {pool})"
                    );
                }
                found.remove()?;
                print(&format!("{name}\n"))
            });
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Packs what lies in its folder, by the host's tar, which knows holes.
fn export(snapshot: &Snapshot, output: &Path) -> anyhow::Result<()> {
    let _loading = snapshot.load()?;
    let done = Command::new("tar")
        .args(["--create", "--sparse", "--format=posix", "--file"])
        .arg(output)
        .arg("--directory")
        .arg(snapshot.folder())
        .arg(".")
        .stdin(Stdio::null())
        .status()
        .context("cannot start tar: install it")?;
    if !done.success() {
        if output != Path::new("-") {
            // What is not whole is no archive.
            let _ = fs::remove_file(output);
        }
        bail!("cannot write '{}': tar says why", output.display());
    }
    Ok(())
}

/// Unpacks an archive, and sees that it has what a snapshot has and nothing else.
fn import(file: &Path, folder: &Path) -> anyhow::Result<SnapshotRecord> {
    let done = Command::new("tar")
        .args([
            "--extract",
            "--no-same-owner",
            "--no-same-permissions",
            "--file",
        ])
        .arg(file)
        .arg("--directory")
        .arg(folder)
        .status()
        .context("cannot start tar: install it")?;
    if !done.success() {
        bail!("cannot read '{}': tar says why", file.display());
    }
    let not_one = |what: &str| anyhow!("'{}' is no snapshot of alveole: {what}", file.display());
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // A link would have a VM read, or write, what it leads to.
        if !entry.file_type()?.is_file() {
            let name = entry.file_name().to_string_lossy().into_owned();
            return Err(not_one(&format!("'{name}' in it is no file")));
        }
    }
    let found = Snapshot::open(folder)?.ok_or_else(|| not_one("it has no snapshot.json"))?;
    let before = found.builds_upon();
    if let Some(id) = before
        .iter()
        .find(|id| !id.bytes().all(|b| b.is_ascii_hexdigit()))
    {
        return Err(not_one(&format!("'{id}' is no id of a memory file")));
    }
    let memory = if found.is_packed() { PACKED } else { MEMORY };
    let names = ["state", memory].map(str::to_owned).into_iter();
    for name in names.chain(before.iter().map(|id| memory_before(id))) {
        if !folder.join(&name).exists() {
            return Err(not_one(&format!("it has no '{name}'")));
        }
    }
    Ok(found.record)
}

fn created(ms: u64) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(ms / 1000);
    humantime::format_rfc3339_seconds(time).to_string()
}

/// What a list says behind the size of its memory.
fn packed(snapshot: &Snapshot) -> &'static str {
    if snapshot.is_packed() { ", packed" } else { "" }
}

/// The snapshot whose memory is the newest of what this one builds upon, if it is there.
fn base<'a>(snapshot: &Snapshot, all: &'a [Snapshot]) -> Option<&'a str> {
    let id = snapshot.builds_upon().last()?;
    let base = all.iter().find(|s| s.memory_id() == Some(id))?;
    Some(&base.name)
}

/// What a snapshot has of its VM's memory, for people.
fn kind(snapshot: &Snapshot, all: &[Snapshot]) -> String {
    match base(snapshot, all) {
        Some(base) => format!("diff of {base}"),
        None if snapshot.builds_upon().is_empty() => "full".into(),
        // It has all that it needs.
        None => "diff of one removed".into(),
    }
}

fn facts(snapshot: &Snapshot, all: &[Snapshot]) -> serde_json::Value {
    let of = &snapshot.record;
    json!({
        "name": snapshot.name, "vm": of.vm, "image": of.record.image, "image_id": of.record.image_id,
        "created_ms": of.created_ms, "stood_still_us": of.stood_still_us, "cpus": of.cpus, "memory_mib": of.memory_mib,
        "packed": snapshot.is_packed(), "kind": if snapshot.builds_upon().is_empty() { "full" } else { "diff" }, "base": base(snapshot, all),
        "memory_files": snapshot.memory_files().len().max(1), "memory_bytes": snapshot.memory_bytes(),
        "taken_bytes": snapshot.taken_bytes(), "folder": snapshot.folder(), "record": of.record,
    })
}

/// Has the monitor read it, who knows what is in it, and looks at what else a copy needs.
fn verify(snapshot: &Snapshot) -> anyhow::Result<()> {
    let record = &snapshot.record.record;
    let mut wrong = Vec::new();
    let places = Places::usual();
    if let Err(e) = guests::root_disk(&places, record) {
        wrong.push(format!("{e:#}"));
    }
    if let Err(e) = places.kernels().get(Some(&record.kernel)) {
        wrong.push(format!("{e:#}"));
    }
    let mut read = Command::new(programs::vmm()?);
    read.arg("--verify-snapshot").arg(snapshot.at("state"));
    let stand_in = packing::verified(snapshot).unwrap_or_else(|e| {
        wrong.push(format!("{e:#}"));
        None
    });
    if let Some(file) = &stand_in {
        read.arg("--memory").arg(file.path());
    }
    let read = read.output().context("cannot start the monitor")?;
    if !read.status.success() {
        let said = String::from_utf8_lossy(&read.stderr);
        wrong.push(said.trim().to_owned());
    }
    if !wrong.is_empty() {
        bail!(
            "the snapshot '{}' cannot be used: {}",
            snapshot.name,
            wrong.join("; ")
        );
    }
    print(&format!("{}: whole\n", snapshot.name))
}

pub(crate) fn restore(args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    let snapshot = Places::usual().snapshots().find(&args.snapshot)?;
    let copies = Copies {
        track_changes: args.track_changes,
        ..(&args.copies).into()
    };
    restored(&snapshot, &copies)
}

/// Makes copies, and prints the name of each.
fn restored(snapshot: &Snapshot, copies: &Copies) -> anyhow::Result<ExitCode> {
    guests::restore(snapshot, copies, |vm| print(&format!("{}\n", vm.name)))
}

pub(crate) fn fork(args: &ForkArgs) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    match places.vms().find(&args.of) {
        Ok(vm) => {
            let take = |folder: &Path| take(&vm, folder, Taking::Passing);
            let passing = places.snapshots().pass(take)?;
            restored(passing.snapshot(), &(&args.copies).into())
        }
        Err(InstanceError::Unknown(name)) => match places.snapshots().find(&name) {
            Ok(snapshot) => restored(&snapshot, &(&args.copies).into()),
            Err(InstanceError::UnknownSnapshot(_)) => bail!(
                "there is neither a VM nor a snapshot '{name}'; `alveole ps` shows the VMs that run, `alveole snapshot ls` the \
                 snapshots"
            ),
            Err(e) => Err(e.into()),
        },
        Err(e) => Err(e.into()),
    }
}
