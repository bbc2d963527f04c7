//! Where things are in the one BAR, and what the capabilities say of it.

/// Length of the BAR.
pub const BAR_BYTES: u64 = 0x8000;
/// Most queues of a device. Abused by nobody: devices have as many as the machine gives them.
pub const MAX_QUEUES: u16 = 511;
/// Most messages of a device: what the table has room for.
pub const MAX_VECTORS: usize = 512;

pub(crate) const COMMON: u64 = 0x0000;
pub(crate) const COMMON_BYTES: u64 = 0x40;
pub(crate) const ISR: u64 = 0x0800;
pub(crate) const ISR_BYTES: u64 = 1;
pub(crate) const DEVICE: u64 = 0x1000;
pub(crate) const DEVICE_BYTES: u64 = 0x1000;
pub(crate) const NOTIFY: u64 = 0x2000;
pub(crate) const NOTIFY_BYTES: u64 = 0x1000;
/// In pages of its own, as a hypervisor in the guest wants it.
pub(crate) const MSIX_TABLE: u64 = 0x4000;
pub(crate) const MSIX_TABLE_BYTES: u64 = 0x2000;
pub(crate) const MSIX_PENDING: u64 = 0x6000;
pub(crate) const MSIX_PENDING_BYTES: u64 = 0x40;

/// Bytes between the notify addresses of two queues.
pub(crate) const NOTIFY_MULTIPLIER: u32 = 4;

/// Where in the BAR a driver writes to ring the doorbell of `queue`.
#[must_use]
pub fn notify_offset(queue: u16) -> u64 {
    NOTIFY.saturating_add(u64::from(queue).saturating_mul(u64::from(NOTIFY_MULTIPLIER)))
}

/// A part of the BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

/// The part that an access lies in, and where in it; an access over an edge is nobody's.
pub(crate) fn part_at(offset: u64, len: usize) -> Option<(Part, u64)> {
    let end = offset.checked_add(u64::try_from(len).ok()?)?;
    [
        (Part::Common, COMMON, COMMON_BYTES),
        (Part::Isr, ISR, ISR_BYTES),
        (Part::Device, DEVICE, DEVICE_BYTES),
        (Part::Notify, NOTIFY, NOTIFY_BYTES),
        (Part::MsixTable, MSIX_TABLE, MSIX_TABLE_BYTES),
        (Part::MsixPending, MSIX_PENDING, MSIX_PENDING_BYTES),
    ]
    .into_iter()
    .find_map(|(part, start, bytes)| {
        let inside = start <= offset && end <= start.saturating_add(bytes);
        inside.then(|| (part, offset.saturating_sub(start)))
    })
}
