//! `alveole pool`: copies of a snapshot that run already, to be taken at once.
//!
//! There is no daemon: whoever takes one leaves a process behind that fills the pool again. The copies are ordinary VMs with a
//! label, which is taken off the one that is taken.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use alveole_instance::{InstanceError, State, Vm};
use anyhow::{Context, bail};
use clap::Subcommand;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::guests::{self, Copies, Format, table};
use crate::places::Places;
use crate::{each_name, print};

/// The label of a VM that waits in a pool; its value is the pool.
const LABEL: &str = "alveole.pool";

#[derive(clap::Args)]
pub(crate) struct PoolArgs {
    #[command(subcommand)]
    command: PoolCommand,
}

#[derive(Subcommand)]
enum PoolCommand {
    /// Make a pool of copies of a snapshot, and fill it
    Create {
        /// How many are to be ready
        #[arg(short = 'n', long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        size: u32,
        /// Network interfaces of the copies, as of `alveole restore`; repeatable
        #[arg(long, value_name = "WHAT[,OPTION]...")]
        net: Vec<String>,
        /// How long the guest's programs in /etc/alveole/renew.d may take
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
        hooks: Duration,
        /// What to call it
        pool: String,
        /// The snapshot
        snapshot: String,
    },
    /// Take a copy that is ready, and print its name; the pool is filled again meanwhile
    Take {
        /// The pool
        pool: String,
    },
    /// Make as many copies as are missing
    Fill {
        /// The pool
        pool: String,
    },
    /// Show the pools
    Ls {
        /// text or json
        #[arg(long, value_enum, default_value_t)]
        format: Format,
    },
    /// Remove pools, and the copies that wait in them
    Rm {
        /// The pools
        #[arg(required = true)]
        pools: Vec<String>,
    },
}

/// What is written down about a pool.
#[derive(Debug, Serialize, Deserialize)]
struct Pool {
    snapshot: String,
    size: u32,
    #[serde(default)]
    net: Vec<String>,
    hooks_ms: u64,
}

impl Pool {
    /// Copies as this pool has them.
    fn copies(&self, number: u32, labels: BTreeMap<String, String>) -> Copies {
        Copies {
            number,
            name: None,
            net: self.net.clone(),
            remove: true,
            hooks: Duration::from_millis(self.hooks_ms),
            labels,
            track_changes: false,
        }
    }
}

/// A pool with its name, which nobody else changes or fills.
struct Held {
    name: String,
    pool: Pool,
    _lock: File,
}

fn file(places: &Places, name: &str) -> PathBuf {
    places.pools().join(format!("{name}.json"))
}

/// Names are those of files.
fn check_name(name: &str) -> anyhow::Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    if bytes.len() > 40
        || !bytes.iter().all(|b| plain(*b))
        || !ends(bytes.first())
        || !ends(bytes.last())
    {
        bail!(
            "'{name}' cannot be a pool's name: use 1 to 40 lower-case letters, digits and hyphens, and begin and end with a letter or digit"
        );
    }
    Ok(())
}

fn read(places: &Places, name: &str) -> anyhow::Result<Pool> {
    check_name(name)?;
    let path = file(places, name);
    let json = match fs::read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            bail!("there is no pool '{name}'; `alveole pool ls` shows them all")
        }
        json => json.with_context(|| format!("cannot read '{}'", path.display()))?,
    };
    serde_json::from_slice(&json).with_context(|| format!("cannot understand '{}'", path.display()))
}

fn hold(places: &Places, name: &str) -> anyhow::Result<Held> {
    let pool = read(places, name)?;
    let path = file(places, name);
    let act = || format!("cannot lock '{}'", path.display());
    let lock = File::open(&path).with_context(act)?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
        .with_context(act)?;
    // Removed while this waited.
    read(places, name)?;
    Ok(Held {
        name: name.into(),
        pool,
        _lock: lock,
    })
}

fn names(places: &Places) -> anyhow::Result<Vec<String>> {
    let folder = places.pools();
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read '{}'", folder.display()))?,
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            name.strip_suffix(".json").map(str::to_owned)
        })
        .collect();
    names.sort();
    Ok(names)
}

/// The pool that is filled from this snapshot, if there is one.
pub(crate) fn of_snapshot(places: &Places, snapshot: &str) -> anyhow::Result<Option<String>> {
    for name in names(places)? {
        if read(places, &name)?.snapshot == snapshot {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// The VMs that wait in a pool.
fn waiting(places: &Places, name: &str) -> anyhow::Result<Vec<Vm>> {
    let vms = places.vms().list()?.into_iter();
    Ok(vms
        .filter(|vm| vm.record.labels.get(LABEL).is_some_and(|of| of == name))
        .collect())
}

/// Those of them that can be taken.
fn ready(vms: &[Vm]) -> usize {
    vms.iter().filter(|vm| is_ready(vm)).count()
}

fn is_ready(vm: &Vm) -> bool {
    matches!(vm.state(), Ok(State::Kept(phase)) if phase.main_pid.is_some())
}

pub(crate) fn pool(args: &PoolArgs) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    match &args.command {
        PoolCommand::Create {
            size,
            net,
            hooks,
            pool: name,
            snapshot,
        } => {
            check_name(name)?;
            places.snapshots().find(snapshot)?;
            let pool = Pool {
                snapshot: snapshot.clone(),
                size: *size,
                net: net.clone(),
                hooks_ms: u64::try_from(hooks.as_millis()).unwrap_or(u64::MAX),
            };
            write(&places, name, &pool)?;
            fill(&places, name)
        }
        PoolCommand::Fill { pool } => fill(&places, pool),
        PoolCommand::Take { pool } => take(&places, pool),
        PoolCommand::Ls { format } => ls(&places, *format),
        PoolCommand::Rm { pools } => each_name(pools, |name| {
            remove(&places, name)?;
            print(&format!("{name}\n"))
        }),
    }
}

fn write(places: &Places, name: &str, pool: &Pool) -> anyhow::Result<()> {
    let folder = places.pools();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .with_context(|| format!("cannot make the folder '{}'", folder.display()))?;
    let path = file(places, name);
    let act = || format!("cannot write '{}'", path.display());
    let mut new = tempfile::NamedTempFile::new_in(&folder).with_context(act)?;
    serde_json::to_writer_pretty(&mut new, pool).with_context(act)?;
    new.flush().with_context(act)?;
    match new.persist_noclobber(&path) {
        Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => bail!(
            "there is a pool '{name}' already: say another name, or remove it (alveole pool rm {name})"
        ),
        done => done.map(drop).with_context(act),
    }
}

fn fill(places: &Places, name: &str) -> anyhow::Result<ExitCode> {
    let held = hold(places, name)?;
    let snapshot = places.snapshots().find(&held.pool.snapshot)?;
    let waiting = waiting(places, name)?;
    let there = u32::try_from(ready(&waiting)).unwrap_or(u32::MAX);
    let number = held.pool.size.saturating_sub(there);
    let label = [(LABEL.to_owned(), held.name.clone())];
    let copies = held.pool.copies(number, label.into());
    guests::restore(&snapshot, &copies, |_| Ok(()))
}

fn take(places: &Places, name: &str) -> anyhow::Result<ExitCode> {
    let pool = read(places, name)?;
    let taken = match take_ready(places, name)? {
        Some(vm) => vm,
        // All are taken: this one waits for its own.
        None => {
            let snapshot = places.snapshots().find(&pool.snapshot)?;
            let copies = pool.copies(1, BTreeMap::new());
            let mut made = None;
            let result = guests::restore(&snapshot, &copies, |vm| {
                made = Some(vm.name.clone());
                Ok(())
            })?;
            match made {
                Some(vm) => vm,
                None => return Ok(result),
            }
        }
    };
    print(&format!("{taken}\n"))?;
    fill_behind(name)?;
    Ok(ExitCode::SUCCESS)
}

/// Takes the label off one that is ready: who does that has it.
fn take_ready(places: &Places, name: &str) -> anyhow::Result<Option<String>> {
    for vm in waiting(places, name)? {
        if !is_ready(&vm) {
            continue;
        }
        let mut mine = false;
        let changed = vm.change(|record| {
            mine = record.labels.remove(LABEL).is_some();
            Ok::<_, InstanceError>(())
        });
        // One that is gone is nobody's.
        if changed.is_ok() && mine {
            return Ok(Some(vm.name));
        }
    }
    Ok(None)
}

/// Leaves a process behind that makes what is missing.
fn fill_behind(name: &str) -> anyhow::Result<()> {
    let exe = std::env::current_exe().context("cannot find out which program this is")?;
    Command::new(exe)
        .args(["pool", "fill", name])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Signals of the terminal are not for it.
        .process_group(0)
        .spawn()
        .context("cannot fill the pool again")?;
    Ok(())
}

fn ls(places: &Places, format: Format) -> anyhow::Result<ExitCode> {
    let mut all = Vec::new();
    for name in names(places)? {
        let pool = read(places, &name)?;
        let ready = ready(&waiting(places, &name)?);
        all.push((name, pool, ready));
    }
    let text = match format {
        Format::Json => {
            let facts: Vec<_> = all
                .iter()
                .map(|(name, pool, ready)| {
                    json!({
                        "name": name, "snapshot": pool.snapshot, "size": pool.size, "ready": ready, "net": pool.net,
                        "hooks_ms": pool.hooks_ms,
                    })
                })
                .collect();
            format!("{}\n", serde_json::to_string_pretty(&facts)?)
        }
        Format::Text => {
            let rows = all.into_iter().map(|(name, pool, ready)| {
                vec![
                    name,
                    pool.snapshot,
                    ready.to_string(),
                    pool.size.to_string(),
                ]
            });
            table(&["NAME", "SNAPSHOT", "READY", "SIZE"], rows.collect())
        }
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn remove(places: &Places, name: &str) -> anyhow::Result<()> {
    let held = hold(places, name)?;
    let path = file(places, name);
    fs::remove_file(&path).with_context(|| format!("cannot remove '{}'", path.display()))?;
    for vm in waiting(places, &held.name)? {
        guests::end_and_remove(&places.vms(), vm)?;
    }
    Ok(())
}
