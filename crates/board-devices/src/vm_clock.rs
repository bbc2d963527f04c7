//! The page by which programs of a guest, too, see that time or the machine is another one: VMClock.
//!
//! Specification: Linux include/uapi/linux/vmclock-abi.h, version 1. Kernels show the page to programs as `/dev/vmclock0`. Of what it can say,
//! only that something happened is said: no relation of the processors' counter to real time (`counter_id` is invalid).

use alveole_guest_memory::{AccessError, GuestRam};

/// The page, as programs map it.
pub const VM_CLOCK_BYTES: u64 = 4096;

/// Length of version 1 of the structure; the rest of the page is zero.
const ABI_BYTES: usize = 112;
const MAGIC: u32 = 0x4b4c_4356;
const VERSION: u16 = 1;
const COUNTER_INVALID: u8 = 0xff;
const GENERATION_PRESENT: u64 = 1 << 8;
const NOTIFICATION_PRESENT: u64 = 1 << 9;

const COUNTER_ID_AT: usize = 10;
/// Odd while the rest is being changed.
const SEQUENCE_AT: usize = 12;
const DISRUPTION_AT: usize = 16;
const FLAGS_AT: usize = 24;
const GENERATION_AT: usize = 104;

/// Writes the page at `guest_addr` anew: `marker`, which must not have been there before, says that the counter jumped and that the machine is
/// another one. What the guest has written there is gone, but for the sequence that its readers compare.
pub(crate) fn renew(ram: &GuestRam, guest_addr: u64, marker: u64) -> Result<(), AccessError> {
    let sequence_addr = guest_addr.saturating_add(SEQUENCE_AT as u64);
    let mut sequence = [0; 4];
    ram.read(sequence_addr, &mut sequence)?;
    let odd = u32::from_le_bytes(sequence) | 1;
    ram.write(guest_addr, &abi(odd, marker))?;
    ram.write(sequence_addr, &odd.wrapping_add(1).to_le_bytes())
}

fn abi(sequence: u32, marker: u64) -> [u8; ABI_BYTES] {
    #[expect(clippy::cast_possible_truncation, reason = "a page")]
    let size = VM_CLOCK_BYTES as u32;
    let mut bytes = [0; ABI_BYTES];
    let mut put = |at: usize, field: &[u8]| {
        bytes[at..at + field.len()].copy_from_slice(field);
    };
    put(0, &MAGIC.to_le_bytes());
    put(4, &size.to_le_bytes());
    put(8, &VERSION.to_le_bytes());
    put(COUNTER_ID_AT, &[COUNTER_INVALID]);
    put(SEQUENCE_AT, &sequence.to_le_bytes());
    put(DISRUPTION_AT, &marker.to_le_bytes());
    put(
        FLAGS_AT,
        &(GENERATION_PRESENT | NOTIFICATION_PRESENT).to_le_bytes(),
    );
    put(GENERATION_AT, &marker.to_le_bytes());
    bytes
}
