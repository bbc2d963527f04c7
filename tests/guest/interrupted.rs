//! What is interrupted or killed while a VM is made, starts, runs and ends, at any moment: what is left, the next command understands.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::images::Home;
use super::networks::host;
use crate::harness::images::{path, tool};
use crate::harness::patience;

/// The processes of a home, by what their environment says, and what they are.
pub(super) fn processes(home: &Home) -> Vec<(i32, String)> {
    let mark = format!("ALVEOLE_HOME={}", path(&home.dir.path().join("home")));
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let read = |what: &str| fs::read(entry.path().join(what)).unwrap_or_default();
        if read("environ")
            .split(|b| *b == 0)
            .any(|word| word == mark.as_bytes())
        {
            let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            found.push((pid, line));
        }
    }
    found
}

fn spawn(home: &Home, words: &[&str]) -> Child {
    home.command(words)
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Names of VMs' folders; those that are about to go are none, nor is what happened to VMs (`.events`).
pub(super) fn folders(home: &Home) -> Vec<String> {
    let entries = fs::read_dir(home.dir.path().join("home/state/vms"));
    let names = entries.into_iter().flatten().flatten();
    let names = names.map(|e| e.file_name().into_string().unwrap());
    names.filter(|n| !n.starts_with('.')).collect()
}

/// Words of a run with this network.
fn run_on<'a>(home: &'a Home, net: &'a str, before: &[&'a str], after: &[&'a str]) -> Vec<&'a str> {
    [&["run", "--net", net], before, &[path(&home.root)], after].concat()
}

/// How long a run takes here from its first moment to its last.
fn whole_run(home: &Home, net: &str) -> Duration {
    let begun = Instant::now();
    home.does(&run_on(home, net, &["--rm"], &["true"]));
    begun.elapsed()
}

#[test]
fn ctrl_c_at_any_moment_leaves_nothing() {
    const MOMENTS: u32 = 12;
    let Some(home) = Home::new() else { return };
    let whole = whole_run(&home, "none");
    for moment in 0..MOMENTS {
        let mut run = spawn(&home, &home.run(&["--rm"], &["sleep", "1000"]));
        std::thread::sleep(whole * moment / (MOMENTS - 2));
        killpg(Pid::from_raw(run.id().cast_signed()), Signal::SIGINT).unwrap();
        let until = Instant::now() + patience(20);
        while run.try_wait().unwrap().is_none() {
            assert!(
                Instant::now() < until,
                "{moment} of {MOMENTS}: it goes on: {:?}",
                processes(&home)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        home.wait_until(20, "end of all of it", || {
            folders(&home).is_empty() && processes(&home).is_empty()
        });
        assert_eq!(home.does(&["ps", "-aq"]), "", "{moment} of {MOMENTS}");
    }
}

#[test]
fn whatever_is_killed_can_be_cleared_away() {
    let Some(home) = Home::new() else { return };
    kill_at_random(&home, "none", 10, "");
}

/// `passt` carries the network of one VM, and nothing else.
#[test]
fn a_killed_passt_takes_its_vms_network_alone() {
    let Some(home) = Home::new() else { return };
    let Some(_world) = host(&[("passt", "passt")]) else {
        return;
    };
    home.does(&run_on(
        &home,
        "user",
        &["-d", "--name", "box"],
        &["sleep", "100000"],
    ));
    let carrier = || home.does(&["exec", "box", "sh", "-c", "cat /sys/class/net/e*/carrier"]);
    let passt = || {
        let all = processes(&home).into_iter();
        let mut found = all.filter(|(_, line)| is(line, "passt"));
        found.next().map(|(pid, _)| Pid::from_raw(pid))
    };
    assert_eq!(carrier(), "1");
    kill(passt().unwrap(), Signal::SIGKILL).unwrap();
    home.wait_until(20, "loss of the network", || carrier() == "0");
    assert_eq!(home.state("box"), "running");
    // Its next start has a network again.
    home.does(&["stop", "box"]);
    home.does(&["start", "box"]);
    assert_eq!(carrier(), "1");
    home.does(&["rm", "-f", "box"]);
    home.wait_until(20, "end of passt", || passt().is_none());
    kill_at_random(&home, "user", 4, "passt");
}

/// Whether this is the command line of that program.
fn is(line: &str, program: &str) -> bool {
    let first = line.split(' ').next().unwrap_or_default();
    first.rsplit('/').next() == Some(program)
}

/// Starts VMs and kills one of their processes some time after, one of `victim` where there is one.
fn kill_at_random(home: &Home, net: &str, rounds: u32, victim: &str) {
    let whole = whole_run(home, net);
    // The same each time: a linear congruential generator.
    let mut state = 0x5eed_u64;
    let mut random = |below: u32| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(state >> 33).unwrap() % below
    };
    let mut met = victim.is_empty();
    for round in 0..rounds {
        let name = format!("vm{round}");
        let words = ["--name", name.as_str()];
        let mut run = spawn(home, &run_on(home, net, &words, &["sleep", "1000"]));
        std::thread::sleep(whole * random(120) / 100);
        let mut all = processes(home);
        if all.iter().any(|(_, line)| is(line, victim)) {
            all.retain(|(_, line)| is(line, victim));
            met = true;
        }
        if !all.is_empty() {
            let (pid, _) = all[random(u32::try_from(all.len()).unwrap()) as usize];
            // It may be gone by now.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if random(2) == 0 {
            let _ = run.kill();
        }
        // Whatever goes on can be ended by its name, whatever does not is cleared away.
        home.output(&["rm", "-f", &name]);
        let _ = run.kill();
        run.wait().unwrap();
        home.wait_until(40, "end of its processes", || {
            home.output(&["rm", "-f", &name]);
            processes(home).is_empty()
        });
        home.does(&["system", "prune"]);
        let left = home.does(&["ps", "-a"]);
        let made: Vec<_> = left
            .lines()
            .skip(1)
            .filter(|l| !l.contains("created"))
            .collect();
        assert!(made.is_empty(), "{round}: {left}");
        home.output(&["rm", "-f", &name]);
        assert_eq!(folders(home), Vec::<String>::new(), "{round}");
    }
    assert!(met, "no {victim} was there to be killed");
}

/// A registry on this host that has one image, and can be told to stop in the middle of a layer.
struct Registry {
    image: String,
    state: Arc<RegistryState>,
}

struct RegistryState {
    /// An OCI layout, and the digest of its manifest.
    layout: PathBuf,
    manifest: String,
    stops: AtomicBool,
    /// For each layer that was asked for the byte from which on.
    begun_at: Mutex<Vec<usize>>,
}

/// What is smaller is no layer.
const LAYER_BYTES: usize = 100_000;

impl Registry {
    fn new(home: &Home) -> Self {
        let dir = home.dir.path();
        let at = |name: &str| dir.join(name);
        let (tar, archive, layout) = (at("files.tar"), at("thing.tar"), at("layout"));
        fs::create_dir(&layout).unwrap();
        assert!(tool(
            "tar",
            &["-C", path(&home.files), "-cf", path(&tar), "."]
        ));
        home.does(&["image", "import", path(&tar), "thing"]);
        home.does(&["image", "export", "thing", "--output", path(&archive)]);
        home.does(&["image", "rm", "thing"]);
        home.does(&["image", "prune"]);
        assert!(tool("tar", &["-C", path(&layout), "-xf", path(&archive)]));
        let index = fs::read(layout.join("index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        let manifest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(RegistryState {
            layout,
            manifest,
            stops: AtomicBool::new(false),
            begun_at: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // Whoever goes away is told nothing.
                std::thread::spawn(move || state.serve(stream));
            }
        });
        let image = format!("{address}/me/thing:1");
        Self { image, state }
    }

    fn begun_at(&self) -> Vec<usize> {
        std::mem::take(&mut *self.state.begun_at.lock().unwrap())
    }
}

impl RegistryState {
    /// One answer (OCI distribution specification 1.1, pulling).
    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).ok()?;
            asked.push(byte[0]);
            // TLS is not spoken here.
            if !b"GH".contains(&asked[0]) {
                return None;
            }
        }
        let asked = String::from_utf8(asked).ok()?.to_lowercase();
        let what = asked.split(' ').nth(1)?;
        let digest = match what.rsplit('/').next()? {
            digest if what.contains("/blobs/") => digest,
            _ if what.contains("/manifests/") => &self.manifest,
            _ => "",
        };
        let content = match digest.strip_prefix("sha256:") {
            Some(hex) => fs::read(self.layout.join("blobs/sha256").join(hex)).ok()?,
            None => b"{}".to_vec(),
        };
        let from = asked.split("range: bytes=").nth(1);
        let from = from.and_then(|range| range.split('-').next()?.parse().ok());
        let (status, body) = match from {
            Some(from) => ("206 Partial Content", content.get(from..)?),
            None => ("200 OK", &content[..]),
        };
        let (whole, kind) = (content.len(), "application/vnd.oci.image.manifest.v1+json");
        let range = from.map(|f| format!("content-range: bytes {f}-{}/{whole}\r\n", whole - 1));
        let head = format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n{}\r\n",
            body.len(),
            range.unwrap_or_default()
        );
        stream.write_all(head.as_bytes()).ok()?;
        if asked.starts_with("head") {
            return None;
        }
        let is_layer = whole > LAYER_BYTES;
        if is_layer {
            self.begun_at.lock().unwrap().push(from.unwrap_or(0));
        }
        if is_layer && self.stops.load(Ordering::Relaxed) {
            stream.write_all(&body[..body.len() / 2]).ok()?;
            // Until the other side goes away.
            let _ = stream.read(&mut [0]);
            return None;
        }
        stream.write_all(body).ok()
    }
}

#[test]
fn ctrl_c_while_an_image_is_pulled_leaves_nothing_half_made() {
    const MOMENTS: u32 = 8;
    let Some(home) = Home::new() else { return };
    let registry = Registry::new(&home);
    let store = home.dir.path().join("home/data/images");
    let count = |name: &str| fs::read_dir(store.join(name)).unwrap().count();
    let partial = || -> u64 {
        let files = fs::read_dir(store.join("partial")).unwrap().flatten();
        files.map(|file| file.metadata().unwrap().len()).sum()
    };
    let interrupted = |words: &[&str], after: &dyn Fn()| {
        let mut command = spawn(&home, words);
        after();
        killpg(Pid::from_raw(command.id().cast_signed()), Signal::SIGINT).unwrap();
        let status = command.wait().unwrap();
        home.wait_until(20, "end of its processes", || processes(&home).is_empty());
        status
    };
    let name = registry.image.as_str();
    let run = ["run", "--rm", "--net", "none", name, "echo", "pulled"];
    // In the middle of a layer: what came is kept for the next one, which goes on there, and there is no image and no VM.
    registry.state.stops.store(true, Ordering::Relaxed);
    let mut came = 0;
    for words in [&["image", "pull", name][..], &run] {
        let status = interrupted(words, &|| {
            home.wait_until(20, "half of a layer", || {
                partial() > came.max(LAYER_BYTES as u64)
            });
        });
        assert!(
            status.signal() == Some(2) || status.code() == Some(130),
            "{words:?}: {status:?}"
        );
        let begun_at = registry.begun_at();
        assert_eq!(begun_at, [usize::try_from(came).unwrap()], "{words:?}");
        came = partial();
        assert_eq!(home.does(&["image", "ls", "-q"]), "");
        assert_eq!(
            (count("partial"), count("disks"), count("names")),
            (1, 0, 0)
        );
        assert_eq!(folders(&home), Vec::<String>::new());
    }
    registry.state.stops.store(false, Ordering::Relaxed);
    assert_eq!(home.does(&run), "pulled");
    assert_eq!(registry.begun_at(), [usize::try_from(came).unwrap()]);
    assert_eq!((count("partial"), count("tmp")), (0, 0));
    // At whatever moment: the next one makes sense of it.
    let forget = || {
        home.output(&["image", "rm", name]);
        home.does(&["image", "prune"]);
    };
    forget();
    let begun = Instant::now();
    home.does(&["image", "pull", name]);
    let whole = begun.elapsed();
    for moment in 0..MOMENTS {
        forget();
        interrupted(&["image", "pull", name], &|| {
            std::thread::sleep(whole * moment / MOMENTS);
        });
        home.does(&["image", "pull", name]);
        assert_eq!(
            (count("partial"), count("tmp"), count("disks")),
            (0, 0, 1),
            "{moment} of {MOMENTS}"
        );
    }
    assert_eq!(home.does(&run), "pulled");
}
