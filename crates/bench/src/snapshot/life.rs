//! One guest by the API: it boots, fills its memory, stands still for snapshots, and goes on in another process.
//!
//! Does not know what becomes of the times.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::inotify;
use serde_json::{Value, json};

use super::table::Row;
use super::{Plan, milliseconds, networked, template};
use crate::client::Client;
use crate::run::Run;
use crate::vmm::{Kind, Vmm, utf8};

/// The command line of every guest; what its init is to do comes behind.
pub(super) const ARGUMENTS: &str = "console=ttyS0 quiet reboot=k panic=-1 tsc=reliable";
/// What the guest's init sends when memory is filled, and between two changes of memory.
pub(super) const FILLED: u8 = 0x02;
pub(super) const BEAT: u8 = 0x07;
/// How many pages the guest changes between two beats, where nothing else is said.
pub(super) const BEAT_PAGES: u64 = 16;
const PAGE_BYTES: u64 = 4096;

/// A guest as it differs from others of the same plan.
pub(super) struct Shape {
    pub(super) memory_mib: u64,
    /// What it changes for ever, at most half of memory; 0 for a guest that is idle.
    pub(super) window_mib: u64,
    /// How much of that between two beats.
    pub(super) beat_pages: u64,
    /// Between two beats.
    pub(super) pause_us: u32,
    pub(super) tracks_pages: bool,
    /// The tap of its network interface, if it has one.
    pub(super) tap: Option<String>,
}

/// Tells when sockets come. One for many processes that is dropped when nothing is measured: to close it takes a grace period of the
/// kernel, which is longer than a restore.
pub(super) struct Arrivals(OwnedFd);

impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Arrivals {
    pub(super) fn new() -> anyhow::Result<Self> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        Ok(Self(inotify::init(flags)?))
    }

    /// Forgets what has come, and becomes readable when something comes to `folder`.
    pub(super) fn expect(&self, folder: &Path) -> anyhow::Result<()> {
        inotify::add_watch(&self.0, folder, inotify::WatchFlags::CREATE)?;
        let mut events = [0; 4096];
        while rustix::io::read(&self.0, &mut events).is_ok() {}
        Ok(())
    }
}

/// A VMM's process and the connection to its API.
pub(super) struct Process {
    pub(super) run: Run,
    client: Client,
    /// Just before the process was made.
    pub(super) start: Instant,
}

/// The two files of a snapshot.
pub(super) struct Files {
    state: PathBuf,
    pub(super) memory: PathBuf,
}

impl Files {
    pub(super) fn new(folder: &Path, name: &str) -> Self {
        Self {
            state: folder.join(format!("{name}.state")),
            memory: folder.join(format!("{name}.memory")),
        }
    }

    /// So that the next is not written over it.
    pub(super) fn remove(&self) {
        let _ = fs::remove_file(&self.state);
        let _ = fs::remove_file(&self.memory);
    }

    /// What a load of it says, but whether the guest runs.
    pub(super) fn load_body(&self) -> anyhow::Result<Value> {
        Ok(json!({
            "snapshot_path": utf8(&self.state)?,
            "mem_backend": {"backend_type": "File", "backend_path": utf8(&self.memory)?},
        }))
    }

    fn body(&self, more: Value) -> anyhow::Result<String> {
        let mut body =
            json!({"snapshot_path": utf8(&self.state)?, "mem_file_path": utf8(&self.memory)?});
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        Ok(body.to_string())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.remove();
    }
}

/// What a snapshot of a guest took.
pub(super) struct Stood {
    /// From before it was told to stand still until it was said to go on.
    still: Duration,
    /// The snapshot alone.
    create: Duration,
}

/// What a snapshot of a guest that goes on took.
pub(super) struct Live {
    /// How long the guest stood still, by the VMM's own word.
    pub(super) still: Duration,
    /// Until all was written.
    pub(super) written: Duration,
}

impl Process {
    /// Starts a VMM that has no machine yet. Its socket is alone in `folder`, which is made; what it says is in a file beside that.
    pub(super) fn start(
        plan: &Plan,
        vmm: &Vmm,
        folder: &Path,
        arrivals: &Arrivals,
    ) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let socket = folder.join("api");
        let _ = fs::remove_file(&socket);
        let mut words = vec!["--api-sock", utf8(&socket)?, "--level", "Error"];
        if vmm.kind == Kind::Alveole {
            words.extend(["--console", "stdio"]);
        }
        let words: Vec<OsString> = words.into_iter().map(Into::into).collect();
        arrivals.expect(folder)?;
        let stderr = folder.with_extension("stderr");
        let start = Instant::now();
        let run = Run::start(vmm.path.as_os_str(), &words, &stderr, plan.patience)?;
        let client = Client::connect(&socket, &arrivals.0, plan.patience)
            .map_err(|error| anyhow::anyhow!(run.failure(&format!("{error:#}"))))?;
        Ok(Self { run, client, start })
    }

    /// Boots a guest until its memory is filled.
    pub(super) fn boot(
        plan: &Plan,
        vmm: &Vmm,
        shape: &Shape,
        arrivals: &Arrivals,
    ) -> anyhow::Result<Self> {
        let mut process = Self::start(plan, vmm, &plan.scratch.join("first"), arrivals)?;
        let mut line = format!(
            "{ARGUMENTS} bench_fill={} bench_window={} bench_pages={} bench_pause={}",
            shape.memory_mib / 2,
            shape.window_mib.min(shape.memory_mib / 2),
            shape.beat_pages,
            shape.pause_us
        );
        let mut initrd = &plan.initrd;
        if let Some(tap) = &shape.tap {
            initrd = plan
                .net_initrd
                .as_ref()
                .context("there is no initramfs with a network")?;
            line += networked::GUEST_ARGUMENTS;
            let body = networked::interface(tap).to_string();
            process.ask("PUT", networked::INTERFACE_PATH, &body)?;
        }
        let source = json!({
            "kernel_image_path": utf8(&plan.kernel)?, "initrd_path": utf8(initrd)?, "boot_args": line,
        });
        let machine = json!({
            "vcpu_count": plan.cpus, "mem_size_mib": shape.memory_mib, "track_dirty_pages": shape.tracks_pages,
        });
        process.ask("PUT", "/boot-source", &source.to_string())?;
        process.ask("PUT", "/machine-config", &machine.to_string())?;
        if let Some(body) = &plan.cpu_config {
            process.ask("PUT", "/cpu-config", body)?;
        }
        process.ask("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#)?;
        process.run.wait_for(FILLED).map_err(anyhow::Error::msg)?;
        Ok(process)
    }

    /// Asks, and says how long the answer took.
    pub(super) fn ask(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<Duration> {
        self.client
            .ask(method, path, body)
            .map_err(|error| anyhow::anyhow!(self.run.failure(&format!("{error:#}"))))
    }

    /// Takes a snapshot while the guest stands still, in place of the one that is there.
    pub(super) fn take(&mut self, files: &Files, kind: &str) -> anyhow::Result<Stood> {
        files.remove();
        let body = files.body(json!({"snapshot_type": kind}))?;
        // Whoever writes for ever finds room in the pipe.
        self.run.drain();
        let start = Instant::now();
        self.ask("PATCH", "/vm", r#"{"state": "Paused"}"#)?;
        let create = self.ask("PUT", "/snapshot/create", &body)?;
        self.ask("PATCH", "/vm", r#"{"state": "Resumed"}"#)?;
        Ok(Stood {
            still: start.elapsed(),
            create,
        })
    }

    pub(super) fn take_full(&mut self, files: &Files) -> anyhow::Result<()> {
        self.take(files, "Full").map(|_| ())
    }

    /// Takes a snapshot while the guest goes on.
    pub(super) fn take_live(&mut self, files: &Files, kind: &str) -> anyhow::Result<Live> {
        files.remove();
        let body = files.body(json!({"snapshot_type": kind, "live": true}))?;
        self.run.drain();
        let start = Instant::now();
        self.client.send("PUT", "/snapshot/create", &body)?;
        let answer = self.client.receive().context("a live snapshot")?;
        let written = start.elapsed();
        let answer: Value = serde_json::from_str(&answer)
            .with_context(|| format!("the answer to a live snapshot: {answer:?}"))?;
        let still = answer["stood_still_us"]
            .as_u64()
            .with_context(|| format!("stood_still_us is not in {answer}"))?;
        Ok(Live {
            still: Duration::from_micros(still),
            written,
        })
    }

    /// Loads a snapshot into a process that has no machine, and has the guest go on; how long the answer took.
    pub(super) fn load(&mut self, files: &Files) -> anyhow::Result<Duration> {
        self.load_with(files, json!({}))
    }

    /// The same, and says more.
    pub(super) fn load_with(&mut self, files: &Files, more: Value) -> anyhow::Result<Duration> {
        let mut body = files.load_body()?;
        body["resume_vm"] = json!(true);
        if let (Value::Object(body), Value::Object(more)) = (&mut body, more) {
            body.extend(more);
        }
        self.ask("PUT", "/snapshot/load", &body.to_string())
    }

    /// Has a snapshot loaded and the guest go on, and does not wait for the answer.
    pub(super) fn send_load(&mut self, files: &Files) -> anyhow::Result<()> {
        let mut body = files.load_body()?;
        body["resume_vm"] = json!(true);
        self.client.send("PUT", "/snapshot/load", &body.to_string())
    }

    /// Waits until the guest has changed its whole window once more.
    pub(super) fn change_all(&mut self, shape: &Shape) -> anyhow::Result<()> {
        self.run.drain();
        let window_pages = (shape.window_mib.min(shape.memory_mib / 2) << 20) / PAGE_BYTES;
        let beats = usize::try_from(window_pages / shape.beat_pages)?;
        let beaten = self.run.wait_for_many(BEAT, beats);
        beaten.map(drop).map_err(anyhow::Error::msg)
    }

    /// Waits until the guest has beaten; how long after the start of the process.
    pub(super) fn beat(&mut self) -> anyhow::Result<Duration> {
        let beat = self.run.wait_for(BEAT);
        beat.map_err(|what| anyhow::anyhow!("no beat after the restore: {what}"))
    }
}

/// Snapshots of a guest of `mib` that changes `window_mib` for ever, in `folder`, and a restore.
pub(super) fn measure(
    plan: &Plan,
    vmm: &Vmm,
    mib: u64,
    window_mib: u64,
    folder: &Path,
    add: &mut dyn FnMut(Row, f64),
) -> anyhow::Result<()> {
    let mut shape = Shape {
        memory_mib: mib,
        window_mib,
        beat_pages: BEAT_PAGES,
        pause_us: 500,
        tracks_pages: false,
        tap: None,
    };
    let arrivals = Arrivals::new()?;
    let files = Files::new(folder, "full");
    let mut guest = Process::boot(plan, vmm, &shape, &arrivals).context("boot")?;
    let first = guest.take(&files, "Full").context("first full snapshot")?;
    let second = guest.take(&files, "Full").context("second full snapshot")?;
    add(Row::First, milliseconds(first.still));
    add(Row::Second, milliseconds(second.still));
    add(Row::SecondCreate, milliseconds(second.create));
    // Peers know no such thing.
    if vmm.kind == Kind::Alveole {
        let live = guest.take_live(&files, "Full")?;
        add(Row::Live, milliseconds(live.still));
        add(Row::LiveWritten, milliseconds(live.written));
        guest.take_full(&files).context("third full snapshot")?;
    }
    drop(guest);
    restore(plan, vmm, &files, &arrivals, add).context("restore")?;
    if vmm.kind == Kind::Alveole {
        template::measure(plan, vmm, &files, &arrivals, add)?;
    }
    drop(files);

    shape.tracks_pages = true;
    let (full, diff) = (Files::new(folder, "base"), Files::new(folder, "diff"));
    let mut guest =
        Process::boot(plan, vmm, &shape, &arrivals).context("boot with track_dirty_pages")?;
    guest.take_full(&full).context("full snapshot")?;
    guest.change_all(&shape)?;
    let stood = guest.take(&diff, "Diff").context("diff snapshot")?;
    add(Row::Diff, milliseconds(stood.still));
    let blocks = fs::metadata(&diff.memory)?.blocks();
    add(Row::DiffMib, (blocks * 512) as f64 / f64::from(1 << 20));
    Ok(())
}

fn restore(
    plan: &Plan,
    vmm: &Vmm,
    files: &Files,
    arrivals: &Arrivals,
    add: &mut dyn FnMut(Row, f64),
) -> anyhow::Result<()> {
    let mut process = Process::start(plan, vmm, &plan.scratch.join("second"), arrivals)?;
    let load = process.load(files)?;
    let answered = process.start.elapsed();
    let beat = process.beat()?;
    add(Row::Load, milliseconds(load));
    add(Row::Answered, milliseconds(answered));
    add(Row::Beat, milliseconds(beat));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::SNAPSHOT_INIT;

    #[test]
    fn both_sides_agree_on_what_is_sent() {
        for want in [
            format!("const FILLED: u8 = {FILLED:#04x};"),
            format!("const BEAT: u8 = {BEAT:#04x};"),
            format!("const PAGE_BYTES: usize = {PAGE_BYTES};"),
            "b\"bench_pages=\"".to_owned(),
        ] {
            assert!(SNAPSHOT_INIT.contains(&want), "{want}");
        }
    }

    #[test]
    fn only_what_comes_later_has_arrived() {
        let dir = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::new().unwrap();
        let has_come = || crate::run::wait_readable(&arrivals.0, Instant::now());
        arrivals.expect(dir.path()).unwrap();
        assert!(!has_come());
        fs::write(dir.path().join("api"), "").unwrap();
        assert!(has_come());
        arrivals.expect(dir.path()).unwrap();
        assert!(!has_come());
    }

    #[test]
    fn files_are_named_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path(), "x");
        fs::write(&files.memory, "m").unwrap();
        fs::write(&files.state, "s").unwrap();
        let body: Value =
            serde_json::from_str(&files.body(json!({"live": true})).unwrap()).unwrap();
        assert_eq!(body["mem_file_path"], json!(files.memory));
        assert_eq!(body["live"], json!(true));
        drop(files);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
