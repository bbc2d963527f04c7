//! Every virtio device on every transport: the suite that all of them pass.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::sync::Arc;

use alveole_block_store::RamStore;
use alveole_rate_limiter::Limits;
use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Access, Buffer, Driver, Stage, Subject, conformance};
use alveole_virtio_blk::{BlkConfig, VirtioBlk};
use alveole_virtio_rng::VirtioRng;

const DISK_BYTES: usize = 1 << 20;
const QUEUES: u16 = 2;

struct Disk;

impl Subject for Disk {
    fn device(&self) -> Box<dyn VirtioDevice> {
        let config = BlkConfig {
            queues: QUEUES,
            ..BlkConfig::new("disk")
        };
        Box::new(VirtioBlk::new(&config, Arc::new(RamStore::new(DISK_BYTES))).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        for queue in 0..QUEUES {
            let data = [queue as u8 + 1; 512];
            let header = |kind: u32| [kind.to_le_bytes(), [0; 4], [3, 0, 0, 0], [0; 4]].concat();
            let write = header(1);
            let used = driver.request(
                queue,
                &[Buffer::Out(&write), Buffer::Out(&data), Buffer::In(1)],
            );
            assert_eq!(used.bytes, [0], "the write's status");
            let read = header(0);
            let used = driver.request(queue, &[Buffer::Out(&read), Buffer::In(512), Buffer::In(1)]);
            assert_eq!((&used.bytes[..512], used.bytes[512]), (&data[..], 0));
        }
    }
}

struct Rng;

impl Subject for Rng {
    fn device(&self) -> Box<dyn VirtioDevice> {
        Box::new(VirtioRng::new(Limits::default()).unwrap())
    }

    fn exercise(&self, driver: &mut Driver) {
        let [a, b] = [0; 2].map(|_| driver.request(0, &[Buffer::In(32)]).bytes);
        assert_ne!(a, b);
    }
}

fn by_mmio(stage: &Stage, device: Box<dyn VirtioDevice>) -> Box<dyn Access> {
    alveole_virtio_mmio::testing::carry(stage, device)
}

fn by_pci(stage: &Stage, device: Box<dyn VirtioDevice>) -> Box<dyn Access> {
    alveole_virtio_pci::testing::carry(stage, device)
}

#[test]
fn a_disk_by_mmio() {
    conformance(&Disk, &by_mmio);
}

#[test]
fn a_disk_by_pci() {
    conformance(&Disk, &by_pci);
}

#[test]
fn entropy_by_mmio() {
    conformance(&Rng, &by_mmio);
}

#[test]
fn entropy_by_pci() {
    conformance(&Rng, &by_pci);
}
