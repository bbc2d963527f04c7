//! Random bytes for the kernel's pool.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use alveole_agent_protocol::MAX_ENTROPY_BYTES;
use rustix::ioctl::{NoArg, Opcode, Setter, opcode};

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` (linux/random.h). The size in the first one's number is that of the two counts alone.
const ADD_ENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 3);
const RESEED: Opcode = opcode::none(b'R', 7);

/// `struct rand_pool_info` with room for all that is taken.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size_bytes: i32,
    bytes: [u8; MAX_ENTROPY_BYTES],
}

/// Adds random bytes to the kernel's pool, and has its generators seeded anew from it at once. For root.
pub(crate) fn add(bytes: &[u8]) -> Result<(), String> {
    if bytes.len() > MAX_ENTROPY_BYTES {
        return Err(format!(
            "{} random bytes are given; at most {MAX_ENTROPY_BYTES} are taken at once",
            bytes.len()
        ));
    }
    let act = |e: &dyn std::fmt::Display| {
        format!("cannot give the kernel {} random bytes: {e}", bytes.len())
    };
    let pool = File::options()
        .write(true)
        .open("/dev/random")
        .map_err(|e| act(&e))?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "a few hundred"
    )]
    let mut info = PoolInfo {
        entropy_bits: bytes.len() as i32 * 8,
        size_bytes: bytes.len() as i32,
        bytes: [0; MAX_ENTROPY_BYTES],
    };
    info.bytes[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the call reads two counts and `size_bytes` bytes behind them, which `info` has.
    let added =
        unsafe { rustix::ioctl::ioctl(pool.as_fd(), Setter::<ADD_ENTROPY, PoolInfo>::new(info)) };
    added.map_err(|e| act(&io::Error::from(e)))?;
    // SAFETY: the call has no argument.
    let seeded = unsafe { rustix::ioctl::ioctl(pool.as_fd(), NoArg::<RESEED>::new()) };
    seeded.map_err(|e| {
        let e = io::Error::from(e);
        format!("the kernel does not seed its random numbers anew: {e}")
    })
}
