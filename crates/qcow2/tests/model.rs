//! Random requests against an image and a plain vector, which must stay the same.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::sync::Arc;

use alveole_qcow2::{
    Access, Backing, CreateOptions, Extent, Image, ImageFile, NoBacking, Repair, WriteExtent,
    check, create,
};
use proptest::prelude::*;
use support::{Base, Memory, differ, guest_write, memory, open, read_all};

#[derive(Debug, Clone)]
enum Op {
    Write { at: u64, len: u64, with: u8 },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Flush,
    Reopen,
    Abandon,
    Resize { to: u64 },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => (any::<u64>(), 1..20_000_u64, any::<u8>()).prop_map(|(at, len, with)| Op::Write { at, len, with }),
        2 => (any::<u64>(), 1..30_000_u64, any::<bool>()).prop_map(|(at, len, unmap)| Op::Zero { at, len, unmap }),
        2 => (any::<u64>(), 1..30_000_u64).prop_map(|(at, len)| Op::Discard { at, len }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::Abandon),
        1 => (1..400_u64).prop_map(|n| Op::Resize { to: n * 512 }),
    ];
    proptest::collection::vec(op, 1..50)
}

struct Rig {
    file: Memory,
    image: Option<Image>,
    model: Vec<u8>,
    base: Base,
    cluster: u64,
    version: u32,
}

impl Rig {
    fn image(&self) -> &Image {
        self.image.as_ref().unwrap()
    }

    fn clamp(&self, at: u64, len: u64) -> Option<(u64, u64)> {
        let size = self.model.len() as u64;
        (size > 0).then(|| (at % size, len.min(size - at % size)))
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Write { at, len, with } => {
                let Some((at, len)) = self.clamp(at, len) else {
                    return;
                };
                let data: Vec<u8> = (0..len)
                    .map(|n| with.wrapping_add((n / 64) as u8))
                    .collect();
                guest_write(self.image(), &self.file, at, &data, &self.base).unwrap();
                self.model[at as usize..(at + len) as usize].copy_from_slice(&data);
            }
            Op::Zero { at, len, unmap } => {
                let Some((at, len)) = self.clamp(at, len) else {
                    return;
                };
                self.image()
                    .write_zeroes(at, len, unmap, &self.base)
                    .unwrap();
                self.model[at as usize..(at + len) as usize].fill(0);
            }
            Op::Discard { at, len } => {
                let Some((at, len)) = self.clamp(at, len) else {
                    return;
                };
                self.image().discard(at, len).unwrap();
                let from = at.next_multiple_of(self.cluster);
                let end = at + len;
                let to = match end == self.model.len() as u64 {
                    true => end,
                    false => end / self.cluster * self.cluster,
                };
                if self.version == 3 && from < to {
                    self.model[from as usize..to as usize].fill(0);
                }
            }
            Op::Flush => self.image().flush().unwrap(),
            Op::Reopen => {
                self.image.take().unwrap().close().unwrap();
                let report = check(&self.file, Repair::No).unwrap();
                assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
                self.image = Some(open(&self.file));
            }
            Op::Abandon => {
                // What a killed process leaves.
                let left = self.file.lock().unwrap().clone();
                drop(self.image.take());
                *self.file.lock().unwrap() = left;
                self.image = Some(open(&self.file));
            }
            Op::Resize { to } => {
                self.image().resize(to, &self.base).unwrap();
                self.model.resize(to as usize, 0);
            }
        }
    }

    /// Look-ups say the same whatever is asked for at once.
    fn verify(&self) {
        let found = read_all(self.image(), &self.base);
        assert_eq!(differ(&found, &self.model), None);
    }
}

fn run(version: u32, bits: u32, order: u32, base: Option<Vec<u8>>, size: u64, ops: &[Op]) {
    let file = memory();
    let mut options = CreateOptions::new(size);
    options.version = version;
    options.cluster_bits = bits;
    options.refcount_order = if version == 2 { 4 } else { order };
    options.backing = base.as_ref().map(|_| Backing {
        path: "base".into(),
        format: Some("raw".into()),
    });
    create(&file, &options).unwrap();
    let base = Base(base.unwrap_or_default());
    let mut model = base.0.clone();
    model.resize(size as usize, 0);
    let mut rig = Rig {
        image: Some(open(&file)),
        file,
        model,
        base,
        cluster: 1 << bits,
        version,
    };
    rig.verify();
    for op in ops {
        rig.apply(op);
        rig.verify();
    }
    let file = Arc::clone(&rig.file);
    rig.image.take().unwrap().close().unwrap();
    let report = check(&file, Repair::No).unwrap();
    let abandoned = ops.iter().any(|op| matches!(op, Op::Abandon));
    assert_eq!(report.corruptions, 0, "{report:?}");
    assert!(report.leaks == 0 || version == 2 && abandoned, "{report:?}");
    let read_only = Image::open(Box::new(file), Access::ReadOnly).unwrap();
    assert_eq!(differ(&read_all(&read_only, &rig.base), &rig.model), None);
    assert!(read_only.lookup_write(0, 0).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn an_image_is_a_vector(
        version in 2..=3_u32,
        bits in prop_oneof![Just(9_u32), Just(10), Just(12), Just(16)],
        order in 0..=6_u32,
        base in proptest::option::of(1..120_000_usize),
        sectors in 1..300_u64,
        ops in ops(),
    ) {
        // Half of the base is holes.
        let base = base.map(|n| (0..n).map(|i| if i / 8192 % 2 == 0 { (i / 7) as u8 | 1 } else { 0 }).collect());
        // A test that drops what a killed process of version 2 leaves cannot ask for no leaks.
        let ops: Vec<Op> = ops
            .into_iter()
            .filter(|op| version == 3 || !matches!(op, Op::Abandon))
            .collect();
        run(version, bits, order, base, sectors * 512, &ops);
    }
}

#[test]
fn neighbours_are_merged() {
    let file = memory();
    create(&file, &CreateOptions::new(64 << 20)).unwrap();
    let image = open(&file);
    image
        .write_allocating(0, &vec![1; 1 << 20], &NoBacking)
        .unwrap();
    let Extent::Data { file_offset, len } = image.lookup(100, 1 << 20).unwrap() else {
        panic!("data are not data")
    };
    assert_eq!(len, (1 << 20) - 100);
    let in_place = image.lookup_write(100, 4096).unwrap();
    assert_eq!(
        in_place,
        WriteExtent::InPlace {
            file_offset,
            len: 4096
        }
    );
    let rest = image.lookup(1 << 20, 63 << 20).unwrap();
    assert_eq!(rest, Extent::Backing { len: 63 << 20 });
}

#[test]
fn a_discarded_cluster_keeps_its_place() {
    let file = memory();
    create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let image = open(&file);
    image.write_allocating(0, &[1; 65536], &NoBacking).unwrap();
    let before = image.lookup_write(0, 65536).unwrap();
    image.discard(0, 65536).unwrap();
    assert_eq!(image.lookup(0, 65536).unwrap(), Extent::Zero { len: 65536 });
    let allocating = WriteExtent::Allocating { len: 65536 };
    assert_eq!(image.lookup_write(0, 65536).unwrap(), allocating);
    image.flush().unwrap();
    image
        .write_allocating(65536, &[2; 65536], &NoBacking)
        .unwrap();
    image.write_allocating(5, &[3], &NoBacking).unwrap();
    assert_eq!(image.lookup_write(0, 65536).unwrap(), before);
}

#[test]
fn many_threads_write_beside_each_other() {
    let file = memory();
    create(&file, &CreateOptions::new(8 << 20)).unwrap();
    let image = open(&file);
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let (image, file) = (&image, &file);
            scope.spawn(move || {
                for n in 0..512_u64 {
                    let at = (n * 4 + u64::from(thread)) * 4096;
                    guest_write(image, file, at, &[thread + 1; 4096], &NoBacking).unwrap();
                    let mut back = [0; 4096];
                    image.read(at, &mut back, &NoBacking).unwrap();
                    assert_eq!(back, [thread + 1; 4096]);
                    if n % 64 == 0 {
                        image.flush().unwrap();
                    }
                }
            });
        }
    });
    let all = read_all(&image, &NoBacking);
    assert!(
        all.chunks(4096)
            .enumerate()
            .all(|(n, c)| c == [n as u8 % 4 + 1; 4096])
    );
    image.close().unwrap();
    assert_eq!(check(&file, Repair::No).unwrap().leaks, 0);
}

#[test]
fn the_refcount_table_grows() {
    let file = memory();
    let mut options = CreateOptions::new(16 << 20);
    options.cluster_bits = 9;
    options.refcount_order = 6;
    create(&file, &options).unwrap();
    let image = open(&file);
    for n in 0..2048 {
        image
            .write_allocating(n * 8192, &vec![n as u8; 8192], &NoBacking)
            .unwrap();
    }
    image.close().unwrap();
    let report = check(&file, Repair::No).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    assert!(file.len().unwrap() > 16 << 20);
}
