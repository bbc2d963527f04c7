//! Devices on both transports, and the few requests that tests of both send.

use std::sync::Arc;

use alveole_block_store::BlockStore;
use alveole_virtio::VirtioDevice;
use alveole_virtio::testing::{Access, Buffer, Driver, Stage};
use alveole_virtio_blk::{BlkConfig, VirtioBlk};

/// VIRTIO_BLK_T_IN and its like (virtio 1.3, section 5.2.6).
pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_S_OK and its like.
pub(crate) const OK: u8 = 0;
pub(crate) const IO_ERROR: u8 = 1;

pub(crate) type Carry = fn(&Stage, Box<dyn VirtioDevice>) -> Box<dyn Access>;

/// Every transport, by name.
pub(crate) const TRANSPORTS: [(&str, Carry); 2] = [
    ("mmio", alveole_virtio_mmio::testing::carry),
    ("pci", alveole_virtio_pci::testing::carry),
];

/// A disk with so many queues.
pub(crate) fn disk(store: impl BlockStore + 'static, queues: u16) -> Box<dyn VirtioDevice> {
    let config = BlkConfig {
        queues,
        ..BlkConfig::new("disk")
    };
    Box::new(VirtioBlk::new(&config, Arc::new(store)).unwrap())
}

/// The header of a request to a disk.
pub(crate) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A range of a discard or write-zeroes request.
pub(crate) fn range(sector: u64, sectors: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes
}

/// One request to a disk: its status, and what was read.
pub(crate) fn ask(
    driver: &mut Driver,
    queue: u16,
    kind: u32,
    sector: u64,
    out: &[u8],
    room: u32,
) -> (u8, Vec<u8>) {
    let header = header(kind, sector);
    let mut buffers = vec![Buffer::Out(&header)];
    if !out.is_empty() {
        buffers.push(Buffer::Out(out));
    }
    if room > 0 {
        buffers.push(Buffer::In(room));
    }
    buffers.push(Buffer::In(1));
    let mut bytes = driver.request(queue, &buffers).bytes;
    let status = bytes.pop().unwrap();
    (status, bytes)
}
