//! Copies of VMs: a snapshot of a running one, and VMs that go on from a snapshot, each with a disk layer, names and addresses of its own.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use alveole_block_store::{Backing, Format, tools};
use alveole_host::programs;
use alveole_instance::{
    Beginning, Content, Happened, Identity, MEMORY, Machine, MonitorApi, MonitorTemplate, PACKED,
    Placed, Record, Restored, Snapshot, SnapshotRecord, Snapshots, State, Vm, memory_before,
};
use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use super::keep::{CHANGES, Disks, device_words, discarded, plug};
use super::run::{Begun, now_ms, start_keeper};
use super::served;
use super::template::Template;
use crate::hint;
use crate::interfaces::keep_over_exec;
use crate::places::Places;
use crate::run::{hand_over, path_of};

/// Memory is written to a disk meanwhile.
const TAKE_PATIENCE: Duration = Duration::from_secs(900);
/// So many copies are begun before the first of them runs.
const AT_ONCE: usize = 8;
/// From so many copies on, a process that has the snapshot prepared costs less than it spares.
const WORTH_A_TEMPLATE: u32 = 3;
/// What a disk for changes is laid over begins so.
const BASE: &str = "base-";
/// A disk for changes that is laid over another one.
pub(super) const OVERLAY: &str = "changes.qcow2";

/// What copies are to be.
#[derive(clap::Args)]
pub(crate) struct CopyArgs {
    /// How many
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    number: u32,
    /// Their name; of several it is followed by -1, -2 and so on [that of the VM and an id]
    #[arg(long)]
    name: Option<String>,
    /// Network interfaces, as `alveole run --net` has them, instead of those of the VM: as many, in the same order; repeatable
    #[arg(long, value_name = "WHAT[,OPTION]...")]
    net: Vec<String>,
    /// Remove them, and what they wrote, when they end
    #[arg(long)]
    rm: bool,
    /// How long the guest's programs in /etc/alveole/renew.d may take, as 10s; with 0s they do not run
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    hooks: Duration,
}

/// What copies are, however that was said.
#[derive(Clone, Debug)]
pub(crate) struct Copies {
    pub(crate) number: u32,
    pub(crate) name: Option<String>,
    pub(crate) net: Vec<String>,
    pub(crate) remove: bool,
    pub(crate) hooks: Duration,
    /// Besides those of the VM.
    pub(crate) labels: BTreeMap<String, String>,
    /// What they change is noted from their beginning, so that their first diff builds upon the snapshot.
    pub(crate) track_changes: bool,
}

impl From<&CopyArgs> for Copies {
    fn from(args: &CopyArgs) -> Self {
        Self {
            number: args.number,
            name: args.name.clone(),
            net: args.net.clone(),
            remove: args.rm,
            hooks: args.hooks,
            labels: BTreeMap::new(),
            track_changes: false,
        }
    }
}

/// What a snapshot is to be.
#[derive(Clone, Copy)]
pub(crate) enum Taking<'a> {
    /// All of memory.
    Full,
    /// What has changed since the snapshot before it, which is one of these; if there is none to build upon, all.
    Diff(&'a Snapshots),
    /// All of memory, not to be kept: no diff builds upon it, and a host that loses power may lose it.
    Passing,
}

/// What the monitor says of a snapshot that it has taken.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Said {
    stood_still_us: u64,
    memory_ids: Vec<String>,
}

/// Takes a snapshot of a running VM into this folder. The guest goes on.
pub(crate) fn take(vm: &Vm, folder: &Path, what: Taking<'_>) -> anyhow::Result<SnapshotRecord> {
    let name = &vm.name;
    let (phase, main_pid) = match vm.state()? {
        State::Kept(phase) => match phase.main_pid {
            Some(pid) => (phase, pid),
            None => bail!(
                "the VM '{name}' is just starting, or its agent alone serves: take a snapshot when its process runs"
            ),
        },
        _ => bail!(
            "the VM '{name}' does not run, and a snapshot is of one that does: alveole start {name} starts it"
        ),
    };
    let writes = |placed: &&Placed| matches!(placed.what, Content::Volume(_)) && !placed.read_only;
    if let Some(Placed {
        what: Content::Volume(volume),
        ..
    }) = vm.record.volumes.iter().find(writes)
    {
        bail!(
            "the VM '{name}' writes to the volume '{volume}', which no second VM can have: a snapshot of it could not be used; have \
             the volume read-only (-v {volume}:PATH:ro), or let the VM have a place of its own (-v PATH)"
        );
    }
    let changes = changes(vm);
    let drives: Vec<Value> = changes
        .iter()
        .map(|path| json!({"drive_id": CHANGES, "path_on_host": folder.join(file_name(path))}))
        .collect();
    let ask = |what| {
        let is_diff = matches!(what, Taking::Diff(_));
        let is_passing = matches!(what, Taking::Passing);
        let body = json!({
            "snapshot_path": folder.join("state"), "mem_file_path": folder.join(MEMORY),
            "snapshot_type": if is_diff { "Diff" } else { "Full" }, "live": true, "sync": !is_passing, "drives": drives,
            "is_base": !is_passing, "track_dirty_pages": is_diff,
        });
        let said = MonitorApi::new(vm, TAKE_PATIENCE).put("/snapshot/create", &body)?;
        let said = serde_json::from_str(&said).context("the monitor's answer is none")?;
        anyhow::Ok::<Said>(said)
    };
    let mut said = ask(what)?;
    if let Taking::Diff(all) = what {
        let ids = said.memory_ids.split_last();
        let before = ids.map_or(&[][..], |(_own, before)| before);
        if before.is_empty() {
            hint(&format!(
                "this snapshot has all of memory: until now nobody has noted what the VM '{name}' changes; from now on it is noted, and the \
                 next --diff has that alone"
            ));
        } else if !link_before(&all.memory_files()?, before, folder)? {
            hint(
                "the snapshot that this one would build upon has been removed, flattened or packed: it has all of memory, and the next --diff \
                 builds upon it",
            );
            let first = said.stood_still_us;
            said = ask(Taking::Full)?;
            said.stood_still_us += first;
        }
    }
    if let Some(changes) = changes {
        let copy = folder.join(file_name(&changes));
        // Copies are laid over it.
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o400))
            .with_context(|| format!("cannot protect '{}'", copy.display()))?;
    }
    for file in kept_files(vm.folder())? {
        link(&file, &folder.join(file_name(&file)))?;
    }
    let Said {
        stood_still_us,
        memory_ids,
    } = said;
    vm.note(Happened::Snapshot { stood_still_us });
    Ok(SnapshotRecord {
        version: SnapshotRecord::VERSION,
        created_ms: now_ms(),
        stood_still_us,
        vm: name.clone(),
        record: vm.record.clone(),
        cpus: phase.cpus,
        memory_mib: phase.memory_mib,
        main_pid,
        network: phase.network,
        memory_ids,
    })
}

/// Gives the memory files that a diff builds upon, by their ids, names in its folder, so that it needs no other snapshot; false, and no
/// names: one of them is gone.
fn link_before(
    all: &BTreeMap<String, PathBuf>,
    ids: &[String],
    folder: &Path,
) -> anyhow::Result<bool> {
    let mut linked = Vec::new();
    let mut one = |id: &String| {
        let Some(from) = all.get(id).filter(|path| path.exists()) else {
            return Ok(false);
        };
        let to = folder.join(memory_before(id));
        // Its snapshot may be removed meanwhile.
        match link(from, &to) {
            Ok(()) => linked.push(to),
            Err(_) if !from.exists() => return Ok(false),
            Err(e) => return Err(e),
        }
        Ok(true)
    };
    for id in ids {
        if !one(id)? {
            for name in linked {
                fs::remove_file(&name)
                    .with_context(|| format!("cannot remove '{}'", name.display()))?;
            }
            return Ok(false);
        }
    }
    Ok(true)
}

/// The disk that takes a VM's changes, if it is there.
fn changes(vm: &Vm) -> Option<PathBuf> {
    let found = [vm.at(OVERLAY), vm.at(CHANGES)];
    found.into_iter().find(|path| path.exists())
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// What of a VM or snapshot is never written: what its disk is laid over, and copies of folders.
fn kept_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let act = || format!("cannot read the folder '{}'", folder.display());
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).with_context(act)? {
        let path = entry.with_context(act)?.path();
        let name = file_name(&path);
        if name.starts_with(BASE) || name.starts_with("volume") && name.ends_with(".erofs") {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

/// A second name for the same file, which lives as long as one of both.
fn link(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::hard_link(from, to).with_context(|| {
        format!(
            "cannot link '{}' to '{}': VMs and snapshots have to be on one file system",
            to.display(),
            from.display()
        )
    })
}

/// Makes one disk of those that a snapshot's is laid over, and one memory file of those that it is made of, in a folder that takes the
/// place of the snapshot's; false: they are so already.
pub(crate) fn flatten(snapshot: &Snapshot) -> anyhow::Result<bool> {
    let (bases, mut files): (Vec<_>, Vec<_>) = kept_files(snapshot.folder())?
        .into_iter()
        .partition(|file| file_name(file).starts_with(BASE));
    let is_diff = !snapshot.builds_upon().is_empty();
    if bases.is_empty() && !is_diff {
        return Ok(false);
    }
    snapshot.replace(|folder| {
        let mut record = snapshot.record.clone();
        if is_diff {
            record.memory_ids = vec![one_memory(snapshot, folder)?];
        } else {
            // The working set is of the memory file by its id.
            files.extend(["state", MEMORY, PACKED, "working-set"].map(|name| snapshot.at(name)));
        }
        if bases.is_empty() {
            files.extend([OVERLAY, CHANGES].map(|name| snapshot.at(name)));
        } else {
            one_disk(&snapshot.at(OVERLAY), &folder.join(OVERLAY))?;
        }
        files.retain(|file| file.exists());
        files
            .iter()
            .try_for_each(|file| link(file, &folder.join(file_name(file))))?;
        anyhow::Ok(record)
    })?;
    Ok(true)
}

/// Of the same name and format, as the state has them.
fn one_disk(overlay: &Path, disk: &Path) -> anyhow::Result<()> {
    let format = Format::Qcow2;
    tools::convert(overlay, format, disk, format, Backing::BesideImage)
        .with_context(|| format!("cannot make one disk of '{}'", overlay.display()))?;
    fs::set_permissions(disk, fs::Permissions::from_mode(0o400))
        .with_context(|| format!("cannot protect '{}'", disk.display()))
}

/// Has the monitor make one memory file of a diff's, with a state that names it, in this folder. Gives its id.
fn one_memory(snapshot: &Snapshot, folder: &Path) -> anyhow::Result<String> {
    let done = std::process::Command::new(programs::vmm()?)
        .arg("--flatten-snapshot")
        .arg(snapshot.at("state"))
        .arg("--into-state")
        .arg(folder.join("state"))
        .arg("--into-memory")
        .arg(folder.join(MEMORY))
        .output()
        .context("cannot start the monitor")?;
    if !done.status.success() {
        bail!("{}", String::from_utf8_lossy(&done.stderr).trim());
    }
    let said = String::from_utf8_lossy(&done.stdout);
    let id = said.lines().find_map(|line| line.strip_prefix("id "));
    id.map(str::to_owned)
        .context("the monitor does not say which memory file it has made: it is of another version")
}

/// Makes a copy's disk, over that of the snapshot.
fn lay_over(snapshot: &Snapshot, vm: &Vm) -> anyhow::Result<()> {
    let files = kept_files(snapshot.folder())?;
    for file in &files {
        link(file, &vm.at(&file_name(file)))?;
    }
    let depth = files
        .iter()
        .filter(|f| file_name(f).starts_with(BASE))
        .count()
        + 1;
    for (name, end, format) in [
        (OVERLAY, ".qcow2", Format::Qcow2),
        (CHANGES, "", Format::Raw),
    ] {
        let from = snapshot.at(name);
        if from.exists() {
            let base = vm.at(&format!("{BASE}{depth}{end}"));
            link(&from, &base)?;
            tools::create_overlay(&vm.at(OVERLAY), &base, format)
                .with_context(|| format!("cannot make the disk of '{}'", vm.name))?;
            return Ok(());
        }
    }
    Ok(())
}

/// The words about networks of a copy.
fn network(snapshot: &SnapshotRecord, name: &str, nets: &[String]) -> anyhow::Result<Vec<String>> {
    let mut words = Vec::new();
    let mut said = !nets.is_empty();
    for word in &snapshot.record.network {
        let Some((option, value)) = word.split_once('=') else {
            continue;
        };
        match option {
            // Its own, or somebody else's already.
            "--name" | "--hostname" | "--publish" => {}
            "--net" if !nets.is_empty() => {}
            "--net" => {
                said = true;
                if value.starts_with("tap=") || value.starts_with("macvtap=") {
                    bail!(
                        "the VM '{}' has --net {value}, which no second VM can have: say another one, by --net",
                        snapshot.vm
                    );
                }
                let options = value.split(',').filter(|o| !o.starts_with("mac="));
                words.push(format!("--net={}", options.collect::<Vec<_>>().join(",")));
            }
            _ => words.push(word.clone()),
        }
    }
    words.extend(nets.iter().map(|net| format!("--net={net}")));
    // It came by itself, and by itself might not come again, or come where there was none.
    if !said {
        let usual = if snapshot.network.is_empty() {
            "none"
        } else {
            "user"
        };
        words.push(format!("--net={usual}"));
    }
    words.push(format!("--name={name}"));
    Ok(words)
}

/// The image's root disk, which on another host, or for another user, lies somewhere else.
pub(crate) fn root_disk(places: &Places, record: &Record) -> anyhow::Result<PathBuf> {
    if record.root_disk.exists() {
        return Ok(record.root_disk.clone());
    }
    let found = match record.image_id.as_str() {
        "" => None,
        id => places.images()?.resolve(id).ok(),
    };
    found.map(|image| image.root_disk).with_context(|| {
        format!(
            "the image '{}' of the snapshot is not here (it was '{}'): pull or import it",
            record.image,
            record.root_disk.display()
        )
    })
}

/// Makes a VM that is to go on from the snapshot.
fn make(places: &Places, snapshot: &Snapshot, name: &str, copies: &Copies) -> anyhow::Result<Vm> {
    let of = &snapshot.record;
    let mut labels = of.record.labels.clone();
    // What this program says of a VM is not true of its copies.
    labels.retain(|name, _| !name.starts_with("alveole."));
    labels.extend(copies.labels.clone());
    let record = Record {
        id: Record::new_id()?,
        root_disk: root_disk(places, &of.record)?,
        created_ms: now_ms(),
        cpus: of.cpus,
        memory_mib: of.memory_mib,
        hostname: name.to_owned(),
        network: network(of, name, &copies.net)?,
        published_free: Vec::new(),
        remove: copies.remove,
        labels,
        ..of.record.clone()
    };
    let vm = places.vms().create(name, &record)?;
    if let Err(e) = lay_over(snapshot, &vm) {
        forget(&vm);
        return Err(e);
    }
    Ok(vm)
}

/// Removes what did not become a VM.
fn forget(vm: &Vm) {
    let removed = vm.lock().and_then(|lock| vm.clone().remove(&lock));
    if let Err(e) = removed {
        hint(&format!("warning: {e}"));
    }
}

/// Makes copies; `ready` is given each when it is a VM of its own.
pub(crate) fn restore(
    snapshot: &Snapshot,
    copies: &Copies,
    mut ready: impl FnMut(&Vm) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    let places = Places::usual();
    places.vms().sweep();
    let _loading = snapshot.load()?;
    let hooks = format!("--hooks-ms={}", copies.hooks.as_millis());
    let from = snapshot
        .folder()
        .to_str()
        .with_context(|| format!("'{}' is no UTF-8", snapshot.folder().display()))?;
    let template = match copies.number {
        // What is packed is served to each by a process of its own.
        WORTH_A_TEMPLATE.. if !snapshot.is_packed() => Template::start(snapshot)
            // Each copy says what is wrong with the snapshot, if that is it.
            .map_err(|e| log::debug!("{e:#}"))
            .ok(),
        _ => None,
    };
    let mut words = vec!["--from".to_owned(), from.to_owned(), hooks];
    if let Some(template) = &template {
        words.push(format!("--template={}", template.socket().display()));
    }
    if copies.track_changes {
        words.push("--track-changes".to_owned());
    }
    let words: Vec<&str> = words.iter().map(|word| &**word).collect();
    let mut begun = VecDeque::new();
    let mut well = true;
    for number in 1..=copies.number {
        let name = match (&copies.name, copies.number) {
            (Some(name), 1) => name.clone(),
            (Some(name), _) => format!("{name}-{number}"),
            (None, _) => format!("{}-{}", snapshot.record.vm, Record::new_id()?),
        };
        let copy = make(&places, snapshot, &name, copies).and_then(|vm| start_keeper(&vm, &words));
        match copy {
            Ok(copy) => begun.push_back(copy),
            Err(e) => {
                hint(&format!("{e:#}"));
                well = false;
            }
        }
        if well
            && begun.len() >= AT_ONCE
            && let Some(copy) = begun.pop_front()
        {
            well = runs(copy, &mut ready)?;
        }
        // What one cannot do the next cannot either.
        if !well {
            break;
        }
    }
    for copy in begun {
        well &= runs(copy, &mut ready)?;
    }
    Ok(match well {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Waits until a copy runs; says if not, and why.
fn runs(
    mut copy: Begun,
    ready: &mut impl FnMut(&Vm) -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let why = match copy.hear() {
        Ok(word) if word == "runs" => {
            ready(&copy.vm)?;
            return Ok(true);
        }
        Ok(why) => why,
        Err(e) => format!("{e:#}"),
    };
    hint(&format!("the VM '{}' did not start: {why}", copy.vm.name));
    // Its keeper is at its end, and it has never been anything.
    let _ = copy.keeper.wait();
    if copy.vm.again().is_ok() {
        forget(&copy.vm);
    }
    Ok(false)
}

/// What all copies of a snapshot load.
pub(super) fn load_of(snapshot: &Snapshot) -> Value {
    json!({
        "snapshot_path": snapshot.at("state"),
        "mem_backend": {"backend_type": "File", "backend_path": snapshot.at(MEMORY)},
    })
}

/// The machine of a VM that goes on from the snapshot in this folder; by the template, if there is one at this socket.
pub(super) fn restored(
    places: &Places,
    vm: &Vm,
    from: &Path,
    hooks: Option<Duration>,
    template: Option<&Path>,
    track_changes: bool,
) -> anyhow::Result<Machine> {
    let snapshot = Snapshot::open(from)?
        .with_context(|| format!("there is no snapshot in '{}'", from.display()))?;
    let disks = Disks::kept(places, vm)?;
    let plugged = plug(vm, false)?;
    let drives: Vec<Value> = disks
        .drives
        .iter()
        .map(|d| json!({"drive_id": d.drive_id, "path_on_host": d.path_on_host, "format": d.format, "backing": d.backing}))
        .collect();
    let interfaces: Vec<Value> = plugged
        .interfaces
        .iter()
        .map(|i| {
            json!({
                "iface_id": i.iface_id, "host_dev_name": i.host_dev_name, "link": i.link, "vhost_fds": i.vhost_fds, "egress": i.egress,
                "link_up": false,
            })
        })
        .collect();
    let (backend, server) = served::memory(vm, &snapshot)?;
    let mut load = load_of(&snapshot);
    load["mem_backend"] = backend;
    load["resume_vm"] = true.into();
    load["track_dirty_pages"] = track_changes.into();
    // Of one that was just taken, all is in the page cache; what is packed has another way.
    load["working_set_path"] = (!snapshot.is_passing() && !snapshot.is_packed())
        .then(|| snapshot.at("working-set"))
        .map_or(Value::Null, |path| json!(path));
    load["drive_overrides"] = drives.into();
    load["network_overrides"] = interfaces.into();
    load["vsock_override"] = json!({"uds_path": vm.socket("vsock")});
    let load = hand_over(&without_nulls(load))?;
    let mut monitor = std::process::Command::new(programs::vmm()?);
    monitor
        .arg("--load-snapshot")
        .arg(path_of(&load))
        .arg("--api-sock")
        .arg(vm.socket("api"))
        .args(["--id", &vm.record.id]);
    keep_over_exec(&plugged.descriptors)?;
    let identity = Identity::new(
        &vm.record.hostname,
        &snapshot.record.network,
        &device_words(&plugged),
    )?;
    let links = plugged.interfaces.iter().map(|i| i.iface_id.clone());
    let restored = Restored {
        from: snapshot.record.vm.clone(),
        identity,
        main_pid: snapshot.record.main_pid,
        hooks,
        links: links.collect(),
    };
    let inherited = plugged.descriptors.iter().map(AsRawFd::as_raw_fd);
    let template = template.map(|socket| MonitorTemplate {
        socket: socket.to_owned(),
        descriptors: inherited.chain([load.as_raw_fd()]).collect(),
    });
    let mut held = disks.held;
    held.push(Box::new(load));
    held.push(server);
    held.push(Box::new(plugged.descriptors));
    Ok(Machine {
        monitor,
        template,
        begin: Beginning::Restored(restored),
        held,
        discarded: discarded(&vm.record),
    })
}

/// What is not said is left out.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let said = fields.into_iter().filter(|(_, value)| !value.is_null());
            said.map(|(name, value)| (name, without_nulls(value)))
                .collect()
        }
        Value::Array(all) => all.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(words: &[&str], devices: usize) -> SnapshotRecord {
        let json = json!({
            "version": 1, "created_ms": 1, "stood_still_us": 1, "vm": "web", "cpus": 1, "memory_mib": 64, "main_pid": 9,
            "network": vec!["alveole.net=02:00:00:00:00:01"; devices],
            "record": {
                "version": 1, "id": "0123456789ab", "image": "x", "image_id": "", "created_ms": 1, "root_disk": "/x",
                "kernel": "k", "cpus": 1, "memory_mib": 64, "disk_bytes": null, "read_only": false, "hostname": "web",
                "network": words, "process": {}, "stop_signal": 15, "restart": "no", "remove": false,
            },
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_copy_has_names_and_addresses_of_its_own() {
        let words = [
            "--net=front,mac=02:00:00:00:00:07,queues=2",
            "--net=user",
            "--publish=8080:80",
            "--hostname=w",
            "--allow=to=any",
            "--name=web",
        ];
        let own = network(&record(&words, 2), "copy", &[]).unwrap();
        assert_eq!(
            own,
            [
                "--net=front,queues=2",
                "--net=user",
                "--allow=to=any",
                "--name=copy"
            ]
        );
        let other = ["tap=t7".to_owned()];
        let own = network(&record(&["--net=tap=t1"], 0), "copy", &other).unwrap();
        assert_eq!(own, ["--net=tap=t7", "--name=copy"]);
        let error = network(&record(&["--net=tap=t1"], 0), "copy", &[]).unwrap_err();
        assert!(error.to_string().contains("tap=t1"), "{error}");
    }

    #[test]
    fn what_came_by_itself_comes_again_or_not() {
        let with = network(&record(&["--name=web"], 1), "copy", &[]).unwrap();
        assert_eq!(with, ["--net=user", "--name=copy"]);
        let without = network(&record(&[], 0), "copy", &[]).unwrap();
        assert_eq!(without, ["--net=none", "--name=copy"]);
    }

    #[test]
    fn a_diff_has_names_for_all_that_it_builds_upon_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let folder = at("diff");
        fs::create_dir(&folder).unwrap();
        fs::write(at("a"), "of a").unwrap();
        fs::write(at("b"), "of b").unwrap();
        let all = ["a", "b", "gone"].map(|id| (id.to_owned(), at(id))).into();
        let names = || {
            let mut names: Vec<_> = fs::read_dir(&folder)
                .unwrap()
                .map(|entry| file_name(&entry.unwrap().path()))
                .collect();
            names.sort();
            names
        };
        let link = |ids: &[&str]| {
            let ids: Vec<_> = ids.iter().map(|id| (*id).to_owned()).collect();
            link_before(&all, &ids, &folder).unwrap()
        };
        // Of one the name is there and the file is not, of the other nothing is known.
        assert!(!link(&["a", "gone"]) && !link(&["a", "unknown"]));
        assert!(names().is_empty());
        assert!(link(&["a", "b"]));
        assert_eq!(names(), ["memory-a", "memory-b"]);
        fs::remove_file(at("b")).unwrap();
        assert_eq!(fs::read_to_string(folder.join("memory-b")).unwrap(), "of b");
    }

    #[test]
    fn what_is_not_said_is_left_out() {
        let all = json!({"a": null, "b": [{"c": null, "d": 1}], "e": false});
        assert_eq!(without_nulls(all), json!({"b": [{"d": 1}], "e": false}));
    }
}
