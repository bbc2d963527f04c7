//! A host that has no room, or fails, in the middle of anything: the request that meets it gets an error, nothing else is
//! harmed, and when there is room again everything works and nothing was lost on the way.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use alveole_qcow2::{
    Access, Backing, CreateOptions, Image, ImageError, ImageFile, NoBacking, Repair, check, create,
};
use support::{Base, Random, differ, guest_write, read_all};

const PAGE: u64 = 4096;

/// A file on a file system with little room: pages that were never written take none.
#[derive(Clone)]
struct Tight(Arc<Mutex<Inner>>);

struct Inner {
    bytes: Vec<u8>,
    pages: BTreeSet<u64>,
    /// Pages that may be there.
    room: usize,
    /// Writes until one fails as on a broken disk, having written nothing.
    until_broken: u64,
}

impl Tight {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Inner {
            bytes: Vec::new(),
            pages: BTreeSet::new(),
            room: usize::MAX,
            until_broken: u64::MAX,
        })))
    }

    fn give(&self, more: usize) {
        let mut inner = self.0.lock().unwrap();
        inner.room = inner.pages.len().saturating_add(more);
    }
}

impl ImageFile for Tight {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.0.lock().unwrap();
        let there = inner.bytes.get(offset as usize..).unwrap_or_default();
        let n = there.len().min(into.len());
        into[..n].copy_from_slice(&there[..n]);
        into[n..].fill(0);
        Ok(())
    }

    /// Page by page, as a file system does: what fitted stays written.
    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        if inner.until_broken == 0 {
            return Err(io::Error::from_raw_os_error(5));
        }
        inner.until_broken = inner.until_broken.saturating_sub(1);
        let (mut rest, mut at) = (from, offset);
        while !rest.is_empty() {
            let page = at / PAGE;
            if !inner.pages.contains(&page) && inner.pages.len() >= inner.room {
                return Err(io::ErrorKind::StorageFull.into());
            }
            inner.pages.insert(page);
            let len = rest.len().min((PAGE - at % PAGE) as usize);
            let end = at as usize + len;
            if inner.bytes.len() < end {
                inner.bytes.resize(end, 0);
            }
            inner.bytes[at as usize..end].copy_from_slice(&rest[..len]);
            rest = &rest[len..];
            at += len as u64;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.0.lock().unwrap();
        inner.pages.split_off(&len.div_ceil(PAGE));
        inner.bytes.resize(len as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        let mut inner = self.0.lock().unwrap();
        inner.bytes[offset as usize..(offset + len) as usize].fill(0);
        for page in offset.div_ceil(PAGE)..(offset + len) / PAGE {
            inner.pages.remove(&page);
        }
        Ok(true)
    }
}

fn open(file: &Tight) -> Image {
    Image::open(Box::new(file.clone()), Access::ReadWrite).unwrap()
}

fn is_full(e: &ImageError) -> bool {
    matches!(e, ImageError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
}

fn options(version: u32, cluster_bits: u32, size: u64, with_base: bool) -> CreateOptions {
    let mut options = CreateOptions::new(size);
    (options.version, options.cluster_bits) = (version, cluster_bits);
    options.backing = with_base.then(|| Backing {
        path: "base".into(),
        format: Some("raw".into()),
    });
    options
}

const KINDS: [(u32, u32, bool); 7] = [
    (3, 16, false),
    (3, 16, true),
    (3, 12, true),
    (3, 9, false),
    (3, 9, true),
    (2, 12, true),
    (2, 9, false),
];

#[test]
fn who_writes_to_a_full_host_over_and_over_takes_nothing_from_it() {
    for (version, bits, with_base) in KINDS {
        let what = format!("version {version}, {bits} bits, base {with_base}");
        let base = Base(if with_base { vec![7; 1 << 20] } else { vec![] });
        let file = Tight::new();
        create(&file, &options(version, bits, 64 << 20, with_base)).unwrap();
        let image = open(&file);
        // From no room at all to enough for the tables of one write but not for its data.
        for room in (0..20).step_by(3) {
            file.give(room);
            let mut len = None;
            for n in 0..200_u64 {
                let at = (n * 7 + room as u64) % 900 * 65536;
                if let Err(e) = image.write_allocating(at, &[9; 70_000], &base) {
                    assert!(is_full(&e), "{what}: {e}");
                }
                // What fits at first may make the file longer; then nothing does.
                if n == 100 {
                    len = Some(file.len().unwrap());
                }
            }
            assert_eq!(
                Some(file.len().unwrap()),
                len,
                "{what}: the file grew, room {room}"
            );
        }
        file.give(usize::MAX);
        image.write_allocating(0, &[3; 4 << 20], &base).unwrap();
        let mut back = vec![0; 4 << 20];
        image.read(0, &mut back, &base).unwrap();
        assert!(back.iter().all(|b| *b == 3), "{what}");
        image.close().unwrap();
        let report = check(&file, Repair::No).unwrap();
        assert_eq!(
            (report.corruptions, report.leaks),
            (0, 0),
            "{what}: {report:#?}"
        );
    }
}

/// As far as the file was written.
fn image_end(file: &Tight) -> u64 {
    let inner = file.0.lock().unwrap();
    inner.pages.last().map_or(0, |page| (page + 1) * PAGE)
}

/// Random requests while the host gives room and takes it away; each byte is old or new where one failed.
fn troubled(version: u32, bits: u32, with_base: bool, seed: u64, broken: bool) {
    let what = format!("version {version}, {bits} bits, base {with_base}, seed {seed}");
    let size = 1_000_448_u64;
    let base = Base(if with_base {
        support::content(500_224, seed)
    } else {
        vec![]
    });
    let file = Tight::new();
    create(&file, &options(version, bits, size, with_base)).unwrap();
    let mut image = open(&file);
    let mut model = base.0.clone();
    model.resize(size as usize, 0);
    let mut random = Random(seed | 1);
    let mut failed = 0;
    for round in 0..150_u64 {
        if random.below(4) == 0 {
            file.give(random.below(30) as usize);
        }
        if broken && random.below(3) == 0 {
            file.0.lock().unwrap().until_broken = random.below(12);
        }
        let at = random.below(size);
        let len = (1 + random.below(80_000)).min(size - at);
        let range = at as usize..(at + len) as usize;
        let mut new = vec![round as u8; len as usize];
        let done = match random.below(8) {
            0 => {
                new.fill(0);
                image.write_zeroes(at, len, random.below(2) == 0, &base)
            }
            1 => {
                new.fill(0);
                image.discard(at, len)
            }
            2 => {
                new.copy_from_slice(&model[range.clone()]);
                image.flush()
            }
            _ => {
                let in_place = Writes(&file);
                guest_write(&image, &in_place, at, &new, &base)
            }
        };
        let whole = done.is_ok();
        if let Err(e) = done {
            assert!(broken || is_full(&e), "{what}: {e}");
            failed += 1;
        }
        file.0.lock().unwrap().until_broken = u64::MAX;
        let now = read_all(&image, &base);
        // A discard promises nothing, and a failed write leaves any mixture.
        let all_new = now[range.clone()] == new;
        for (n, byte) in range.clone().zip(&new).filter(|_| !all_new) {
            let may_stay = !whole || version < 3 || *byte == 0;
            assert!(
                now[n] == *byte || (may_stay && now[n] == model[n]),
                "{what}, round {round}: byte {n}"
            );
        }
        model[range.clone()].copy_from_slice(&now[range]);
        assert_eq!(differ(&now, &model), None, "{what}, round {round}");
        if round % 50 == 49 {
            // As a kill leaves it, with room for what opening needs.
            file.give(usize::MAX);
            let left = file.0.lock().unwrap().bytes.clone();
            drop(image);
            let copy = Tight::new();
            copy.write_at(&left, 0).unwrap();
            let killed = open(&copy);
            assert_eq!(
                differ(&read_all(&killed, &base), &model),
                None,
                "{what}, killed"
            );
            killed.close().unwrap();
            let report = check(&copy, Repair::No).unwrap();
            assert_eq!(report.corruptions, 0, "{what}, killed: {report:#?}");
            image = open(&file);
        }
    }
    assert!(failed > 5, "{what}: only {failed} requests met a full host");
    file.give(usize::MAX);
    image.close().unwrap();
    let report = check(&file, Repair::No).unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {report:#?}");
    if !broken {
        assert_eq!(report.leaks, 0, "{what}: {report:#?}");
    }
}

/// The file as the guest's writes in place meet it, which do not fail in this test: a block device has other ways to.
struct Writes<'a>(&'a Tight);

impl ImageFile for Writes<'_> {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(into, offset)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        let (room, broken) = {
            let mut inner = self.0.0.lock().unwrap();
            (
                std::mem::replace(&mut inner.room, usize::MAX),
                std::mem::replace(&mut inner.until_broken, u64::MAX),
            )
        };
        let written = self.0.write_at(from, offset);
        let mut inner = self.0.0.lock().unwrap();
        (inner.room, inner.until_broken) = (room, broken);
        written
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.0.punch_hole(offset, len)
    }
}

#[test]
fn a_host_without_room_harms_nothing() {
    for (version, bits, with_base) in KINDS {
        for seed in 1..4 {
            troubled(version, bits, with_base, seed * 7919, false);
        }
    }
}

#[test]
fn a_host_that_fails_now_and_then_harms_nothing_else() {
    for (version, bits, with_base) in KINDS {
        for seed in 1..4 {
            troubled(version, bits, with_base, seed * 104_729, true);
        }
    }
}

#[test]
fn a_refcount_table_that_cannot_grow_stays_as_it_was() {
    // 64 entries of 256 counts each: the table is full at 8 MiB of file. Near to that first.
    let prepared = Tight::new();
    create(&prepared, &options(3, 9, 24 << 20, false)).unwrap();
    let image = open(&prepared);
    let mut at = 0;
    while image_end(&prepared) < (7 << 20) + (900 << 10) {
        image
            .write_allocating(at, &[1; 64 << 10], &NoBacking)
            .unwrap();
        at += 64 << 10;
    }
    image.close().unwrap();
    let prepared = prepared.0.lock().unwrap().bytes.clone();
    // Then one failure at each of the next writes.
    for until in 0.. {
        let file = Tight::new();
        file.write_at(&prepared, 0).unwrap();
        let image = open(&file);
        file.0.lock().unwrap().until_broken = until;
        let mut met = false;
        for n in 0..8_u64 {
            let there = at + (n << 16);
            if image
                .write_allocating(there, &[2; 64 << 10], &NoBacking)
                .is_err()
            {
                met = true;
                break;
            }
        }
        file.0.lock().unwrap().until_broken = u64::MAX;
        for n in 0..64_u64 {
            let there = at + (n << 16);
            image
                .write_allocating(there, &[3; 64 << 10], &NoBacking)
                .unwrap();
        }
        let now = read_all(&image, &NoBacking);
        let (old, rest) = now.split_at(at as usize);
        assert!(old.iter().all(|b| *b == 1), "failure at write {until}");
        assert!(
            rest[..4 << 20].iter().all(|b| *b == 3),
            "failure at write {until}"
        );
        image.close().unwrap();
        let report = check(&file, Repair::No).unwrap();
        assert_eq!(
            report.corruptions, 0,
            "failure at write {until}: {report:#?}"
        );
        if !met {
            assert!(until > 20, "nothing failed");
            break;
        }
    }
}
