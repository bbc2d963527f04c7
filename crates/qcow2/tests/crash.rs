//! Crashes at every point. A file that keeps a log of what was done to it is replayed: every prefix of the
//! log is what a killed process leaves; every choice of what was done since the last sync, in sectors, on
//! top of what came before it, is what a crashed host may leave.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::io;
use std::sync::{Arc, Mutex};

use alveole_qcow2::{Access, Backing, CreateOptions, Image, ImageFile, Repair, check, create};
use support::{Base, Memory, Random, guest_write, read_all};

#[derive(Clone)]
enum Done {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Punch(u64, u64),
    Sync,
}

/// A file in memory that keeps a log.
#[derive(Default)]
struct Logged {
    bytes: Mutex<Vec<u8>>,
    log: Mutex<Vec<Done>>,
}

impl Logged {
    fn note(&self, done: Done) {
        self.log.lock().unwrap().push(done);
    }

    fn at(&self) -> usize {
        self.log.lock().unwrap().len()
    }
}

impl ImageFile for Logged {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_at(into, offset)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.note(Done::Write(offset, from.to_vec()));
        self.bytes.write_at(from, offset)
    }

    fn len(&self) -> io::Result<u64> {
        self.bytes.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(Done::SetLen(len));
        self.bytes.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.note(Done::Sync);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.note(Done::Punch(offset, len));
        self.bytes.punch_hole(offset, len)
    }
}

fn redo(bytes: &Mutex<Vec<u8>>, done: &Done) {
    match done {
        Done::Write(at, data) => bytes.write_at(data, *at).unwrap(),
        Done::SetLen(len) => bytes.set_len(*len).unwrap(),
        Done::Punch(at, len) => drop(bytes.punch_hole(*at, *len).unwrap()),
        Done::Sync => {}
    }
}

/// A story: what was done to the file, and what the guest may see when.
struct Story {
    start: Vec<u8>,
    log: Vec<Done>,
    /// For each request: the length of the log before and after it, and the disk afterwards.
    requests: Vec<(usize, usize, Vec<u8>)>,
    /// The requests that are flushes: everything before them is durable after them.
    flushes: Vec<usize>,
    first: Vec<u8>,
    base: Base,
    version: u32,
}

const SIZE: usize = 150 * 512;

fn tell(version: u32, bits: u32, with_base: bool, start: Option<Vec<u8>>, seed: u64) -> Story {
    let mut random = Random(seed);
    let base = Base(match with_base {
        true => (0..SIZE - 5000)
            .map(|i| {
                if i / 4096 % 3 == 0 {
                    0
                } else {
                    (i / 11) as u8 | 1
                }
            })
            .collect(),
        false => Vec::new(),
    });
    let file = Arc::new(Logged::default());
    match start {
        Some(bytes) => *file.bytes.lock().unwrap() = bytes,
        None => {
            let mut options = CreateOptions::new(SIZE as u64);
            (options.version, options.cluster_bits) = (version, bits);
            options.backing = with_base.then(|| Backing {
                path: "base".into(),
                format: None,
            });
            create(&file.bytes, &options).unwrap();
        }
    }
    let start = file.bytes.lock().unwrap().clone();
    let image = Image::open(Box::new(Arc::clone(&file)), Access::ReadWrite).unwrap();
    let first = read_all(&image, &base);
    let mut model = first.clone();
    let (mut requests, mut flushes) = (Vec::new(), Vec::new());
    for number in 0..40 {
        let before = file.at();
        let at = random.below(SIZE as u64);
        let len = (1 + random.below(9000)).min(SIZE as u64 - at);
        match random.below(10) {
            0..6 => {
                let with = random.next() as u8;
                let data: Vec<u8> = (0..len)
                    .map(|n| with.wrapping_add((n / 512) as u8))
                    .collect();
                guest_write(&image, &*file, at, &data, &base).unwrap();
                model[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
            6 => {
                let unmap = random.below(2) == 0;
                image.write_zeroes(at, len, unmap, &base).unwrap();
                model[at as usize..(at + len) as usize].fill(0);
            }
            7 => {
                image.discard(at, len).unwrap();
                model = read_all(&image, &base);
            }
            _ => {
                image.flush().unwrap();
                flushes.push(number);
            }
        }
        requests.push((before, file.at(), model.clone()));
        assert!(read_all(&image, &base) == model, "request {number}");
    }
    let before = file.at();
    image.close().unwrap();
    flushes.push(requests.len());
    requests.push((before, file.at(), model));
    let log = file.log.lock().unwrap().clone();
    Story {
        start,
        log,
        requests,
        flushes,
        first,
        base,
        version,
    }
}

/// The disk must be what one of `allowed` says, byte by byte, and the image sound.
fn examine(story: &Story, bytes: &[u8], allowed: &[&Vec<u8>], what: &str) {
    let file: Memory = Arc::new(Mutex::new(bytes.to_vec()));
    let verify = |image: &Image, how: &str| {
        let found = read_all(image, &story.base);
        // By sectors first: all of this is done thousands of times.
        let wrong = found.chunks(512).enumerate().position(|(n, sector)| {
            let range = n * 512..n * 512 + sector.len();
            !allowed.iter().any(|a| a[range.clone()] == *sector)
                && !range
                    .clone()
                    .all(|i| allowed.iter().any(|a| a[i] == found[i]))
        });
        assert_eq!(wrong, None, "{what}, {how}");
    };
    let image = Image::open(Box::new(Arc::clone(&file)), Access::ReadOnly).unwrap();
    verify(&image, "read only");
    drop(image);
    // A tool repairs it ...
    let copy: Memory = Arc::new(Mutex::new(bytes.to_vec()));
    let report = check(&copy, Repair::All).unwrap();
    assert_eq!(
        (report.corruptions, report.leaks),
        (0, 0),
        "{what}: {report:?}"
    );
    let image = Image::open(Box::new(copy), Access::ReadOnly).unwrap();
    verify(&image, "repaired");
    // ... or the next start does.
    let image = support::open(&file);
    verify(&image, "opened again");
    // What is allocated now is nobody's.
    let mut model = read_all(&image, &story.base);
    for (n, at) in [0, 20_000, 40_000, 70_000].into_iter().enumerate() {
        let data = vec![n as u8 + 77; 3000];
        guest_write(&image, &file, at, &data, &story.base).unwrap();
        model[at as usize..][..3000].copy_from_slice(&data);
    }
    assert!(
        read_all(&image, &story.base) == model,
        "{what}: writes collide"
    );
    image.close().unwrap();
    let report = check(&file, Repair::No).unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {report:?}");
    assert!(
        report.leaks == 0 || story.version == 2,
        "{what}: {report:?}"
    );
}

/// `qemu-img` repairs it, too, and no data are lost by that.
fn examine_with_qemu(story: &Story, bytes: &[u8], allowed: &[&Vec<u8>], what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    std::fs::write(dir.path().join("base"), &story.base.0).unwrap();
    std::fs::write(&path, bytes).unwrap();
    for words in [["check", "-r", "all", "a"].as_slice(), &["check", "a"]] {
        let output = std::process::Command::new("qemu-img")
            .args(words)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{what}: {words:?}: {text}");
    }
    let file = std::fs::File::open(&path).unwrap();
    let image = Image::open(Box::new(file), Access::ReadOnly).unwrap();
    let found = read_all(&image, &story.base);
    let wrong = (0..SIZE).find(|i| !allowed.iter().any(|a| a[*i] == found[*i]));
    assert_eq!(wrong, None, "{what}, repaired by qemu-img");
}

#[test]
fn qemu_img_repairs_what_a_crash_leaves() {
    if support::skip("qemu_img_repairs_what_a_crash_leaves") {
        return;
    }
    for (version, bits, with_base) in [(3, 9, true), (3, 12, true), (2, 9, false), (2, 12, true)] {
        let story = tell(version, bits, with_base, None, 0xabcd + u64::from(bits));
        each_kill(&story, |cut, bytes, allowed| {
            if cut % 23 == 0 {
                examine_with_qemu(&story, bytes, allowed, &format!("killed after {cut}"));
            }
        });
        each_crash(&story, 17, |cut, bytes, allowed| {
            if cut % 17 == 0 {
                examine_with_qemu(&story, bytes, allowed, &format!("crashed after {cut}"));
            }
        });
    }
}

/// Hands out what a kill leaves, at each point, and what the disk may read then.
fn each_kill(story: &Story, mut look: impl FnMut(usize, &[u8], &[&Vec<u8>])) -> usize {
    let bytes = Mutex::new(story.start.clone());
    for cut in 0..=story.log.len() {
        let done = story.requests.iter().take_while(|r| r.1 <= cut).last();
        let mut allowed = vec![done.map_or(&story.first, |r| &r.2)];
        allowed.extend(
            story
                .requests
                .iter()
                .filter(|r| r.0 < cut && cut < r.1)
                .map(|r| &r.2),
        );
        let now = bytes.lock().unwrap().clone();
        look(cut, &now, &allowed);
        if let Some(done) = story.log.get(cut) {
            redo(&bytes, done);
        }
    }
    story.log.len()
}

fn killed(story: &Story) -> usize {
    each_kill(story, |cut, bytes, allowed| {
        examine(story, bytes, allowed, &format!("killed after {cut}"));
    })
}

/// Writes in sectors: what a disk does as a whole.
fn sectors(done: &Done) -> Vec<Done> {
    let Done::Write(at, data) = done else {
        return vec![done.clone()];
    };
    let (mut at, mut data, mut parts) = (*at, data.as_slice(), Vec::new());
    while !data.is_empty() {
        let n = data.len().min(512 - (at % 512) as usize);
        parts.push(Done::Write(at, data[..n].to_vec()));
        (at, data) = (at + n as u64, &data[n..]);
    }
    parts
}

fn crashed(story: &Story, seed: u64) -> usize {
    each_crash(story, seed, |cut, bytes, allowed| {
        examine(story, bytes, allowed, &format!("crashed after {cut}"));
    })
}

/// Hands out what a crash may leave, at each point, and what the disk may read then.
fn each_crash(story: &Story, seed: u64, mut look: impl FnMut(usize, &[u8], &[&Vec<u8>])) -> usize {
    let mut random = Random(seed);
    let mut cases = 0;
    let durable = Mutex::new(story.start.clone());
    let mut since = 0;
    for cut in 0..=story.log.len() {
        // The log up to `since` is durable.
        let flushed = story
            .flushes
            .iter()
            .rfind(|n| story.requests[**n].1 <= since + 1);
        let from = flushed.copied();
        let mut allowed = vec![from.map_or(&story.first, |n| &story.requests[n].2)];
        let later = &story.requests[from.map_or(0, |n| n + 1)..];
        allowed.extend(later.iter().filter(|r| r.0 < cut).map(|r| &r.2));
        for keep in [[0, 50], [30, 90]][cut % 2] {
            let bytes = Mutex::new(durable.lock().unwrap().clone());
            for part in story.log[since..cut].iter().flat_map(sectors) {
                if random.below(100) < keep {
                    redo(&bytes, &part);
                }
            }
            let now = bytes.into_inner().unwrap();
            look(cut, &now, &allowed);
            cases += 1;
        }
        if let Some(Done::Sync) = story.log.get(cut) {
            for done in &story.log[since..cut] {
                redo(&durable, done);
            }
            since = cut;
        }
    }
    cases
}

#[test]
fn a_killed_process_loses_nothing() {
    let mut cases = 0;
    for (version, bits, with_base) in [
        (3, 9, true),
        (3, 12, false),
        (3, 12, true),
        (2, 9, true),
        (2, 12, false),
    ] {
        let story = tell(
            version,
            bits,
            with_base,
            None,
            0x1234_5678 + u64::from(bits),
        );
        cases += killed(&story);
    }
    println!("{cases} cuts");
}

#[test]
fn a_crashed_host_loses_nothing_that_was_flushed() {
    let mut cases = 0;
    for (version, bits, with_base) in [
        (3, 9, true),
        (3, 12, false),
        (3, 12, true),
        (2, 9, true),
        (2, 12, true),
    ] {
        for seed in 1..3 {
            let story = tell(version, bits, with_base, None, seed * 0x9e37_79b9);
            cases += crashed(&story, seed);
        }
    }
    println!("{cases} crashes");
}

#[test]
fn a_second_life_is_as_safe_as_the_first() {
    // The image was killed before, so it has holes and stale clusters, and is opened dirty.
    for version in [2, 3] {
        let story = tell(version, 9, true, None, 99);
        let bytes = Mutex::new(story.start.clone());
        for done in &story.log[..story.log.len() / 2] {
            redo(&bytes, done);
        }
        let left = bytes.into_inner().unwrap();
        let second = tell(version, 9, true, Some(left), 100);
        killed(&second);
        crashed(&second, 101);
    }
}

/// A disk that others made: compressed, with a snapshot, or both.
fn made_elsewhere(compat: &str, compressed: bool, snapshot: bool) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..SIZE).map(|i| (i / 300) as u8 | 1).collect();
    std::fs::write(dir.path().join("raw"), content).unwrap();
    let qemu_img = |words: &str| {
        let status = std::process::Command::new("qemu-img")
            .args(words.split_whitespace())
            .current_dir(dir.path())
            .status();
        assert!(status.unwrap().success(), "{words}");
    };
    let compress = if compressed { "-c" } else { "" };
    qemu_img(&format!(
        "convert -f raw -O qcow2 {compress} -o compat={compat},cluster_size=4096 raw a"
    ));
    if snapshot {
        qemu_img("snapshot -c one a");
    }
    std::fs::read(dir.path().join("a")).unwrap()
}

#[test]
fn shared_and_compressed_clusters_are_given_back_late() {
    if support::skip("shared_and_compressed_clusters_are_given_back_late") {
        return;
    }
    for (compat, version) in [("0.10", 2), ("1.1", 3)] {
        for (compressed, snapshot) in [(true, false), (false, true), (true, true)] {
            let start = made_elsewhere(compat, compressed, snapshot);
            let story = tell(version, 12, false, Some(start), 5 + u64::from(snapshot));
            killed(&story);
            crashed(&story, 6);
        }
    }
}
