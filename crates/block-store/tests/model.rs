//! Every engine and cache against a model, with random requests, many in flight.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::path::Path;
use std::sync::Arc;

use alveole_block_store::{
    BlockStore, Cache, Engine, OpenError, OpenOptions, Operation, RamStore, io_uring_available,
    open,
};
use proptest::prelude::*;
use support::{Rig, file, folder, one, one_of, pattern, skip};

const SIZE: usize = 1 << 20;
const SECTORS: u64 = SIZE as u64 / 512;

#[derive(Debug, Clone)]
struct Act {
    queue: usize,
    operation: Operation,
    sector: u64,
    sectors: u64,
    cut: u64,
    kick: bool,
}

fn act() -> impl Strategy<Value = Act> {
    let operation = prop_oneof![
        4 => Just(Operation::Read),
        4 => any::<bool>().prop_map(|durable| Operation::Write { durable }),
        1 => Just(Operation::Flush),
        1 => any::<bool>().prop_map(|may_unmap| Operation::WriteZeroes { may_unmap }),
    ];
    let sectors = prop_oneof![8 => 0_u64..40, 1 => 0_u64..1500];
    let cut = prop_oneof![3 => Just(0_u64), 1 => Just(7), 2 => 100_u64..6000, 1 => Just(512)];
    (
        0_usize..2,
        operation,
        0..SECTORS,
        sectors,
        cut,
        any::<bool>(),
    )
        .prop_map(|(queue, operation, sector, sectors, cut, kick)| {
            let sectors = sectors.min(SECTORS - sector);
            let flush = operation == Operation::Flush;
            Act {
                queue,
                operation,
                sector: if flush { 0 } else { sector },
                sectors: if flush { 0 } else { sectors },
                // Not thousands of pieces of 7 bytes.
                cut: if sectors > 40 && cut != 0 { 4099 } else { cut },
                kick,
            }
        })
}

fn play(rig: &mut Rig, acts: &[Act]) {
    for a in acts {
        rig.submit(a.queue, a.operation, a.sector * 512, a.sectors * 512, a.cut);
        if a.kick {
            rig.kick(a.queue);
        }
    }
    rig.settle();
    let all = rig.read_all();
    assert!(all == rig.model, "the store is not what was written");
}

fn against_model(test: &str, make: impl Fn(&Path) -> Result<Arc<dyn BlockStore>, OpenError>) {
    let folder = folder();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let model = pattern(SIZE, 1);
    // Not one after the other, since each is locked.
    let path = file(folder.path(), "disk", SIZE);
    if let Err(e @ (OpenError::Direct { .. } | OpenError::Engine { .. })) = make(&path) {
        skip(test, &e.to_string());
        return;
    }
    runner
        .run(&proptest::collection::vec(act(), 1..60), |acts| {
            std::fs::write(&path, &model).unwrap();
            let mut rig = Rig::new(make(&path).unwrap(), 2, 4, model.clone());
            play(&mut rig, &acts);
            drop(rig);
            Ok(())
        })
        .unwrap();
}

fn on_files(test: &str, engine: Engine, cache: Cache) {
    let options = OpenOptions {
        engine,
        cache,
        ..OpenOptions::default()
    };
    against_model(test, |path| open(path, &options));
}

#[test]
fn sync_writeback() {
    on_files("sync_writeback", Engine::Sync, Cache::Writeback);
}

#[test]
fn sync_direct() {
    on_files("sync_direct", Engine::Sync, Cache::Direct);
}

#[test]
fn sync_unsafe() {
    on_files("sync_unsafe", Engine::Sync, Cache::Unsafe);
}

#[test]
fn uring_writeback() {
    on_files("uring_writeback", Engine::IoUring, Cache::Writeback);
}

#[test]
fn uring_direct() {
    on_files("uring_direct", Engine::IoUring, Cache::Direct);
}

#[test]
fn uring_unsafe() {
    on_files("uring_unsafe", Engine::IoUring, Cache::Unsafe);
}

#[test]
fn ram() {
    against_model("ram", |_| {
        Ok(Arc::new(RamStore::from_bytes(pattern(SIZE, 1))))
    });
}

#[test]
fn the_engine_that_chooses_itself_is_io_uring_where_there_is_one() {
    let folder = folder();
    let path = file(folder.path(), "disk", 4096);
    let store = open(&path, &OpenOptions::default()).unwrap();
    let name = if io_uring_available().is_ok() {
        "io_uring"
    } else {
        "sync"
    };
    assert_eq!(store.engine_name(), name);
    let mut rig = Rig::new(store, 1, 1, pattern(4096, 1));
    let seen = rig.store.geometry();
    assert_eq!(rig.queues[0].geometry(), seen);
    let buffers = rig.buffers(4096, 0);
    let buffers = one(&mut *rig.queues[0], Operation::Read, 0, buffers).unwrap();
    one_of(&mut *rig.queues[0], Operation::Flush, 0, 0, buffers).unwrap();
}
