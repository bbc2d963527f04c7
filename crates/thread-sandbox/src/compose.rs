//! Puts the blocks of a role together and hands the filter to the kernel.
//!
//! Each block allows what its rules name and else runs on into the next one; after the last stands the
//! refusal. Deliberately does not know: roles, devices, what a block allows.

use std::io;

use libc::{c_int, c_ulong, sock_filter, sock_fprog};

use crate::filters::PID_MARKER;

/// What the kernel takes (`BPF_MAXINSNS`).
pub(crate) const MAX_INSTRUCTIONS: usize = 4096;

const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const COMPARE_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;

/// One filter from `blocks`, for the process `pid`.
pub(crate) fn filter(blocks: &[&[sock_filter]], pid: u32) -> Vec<sock_filter> {
    let mut filter = blocks.concat();
    for instruction in &mut filter {
        // The build has checked that the marker stands nowhere else.
        if instruction.code == COMPARE_EQUAL && instruction.k == PID_MARKER {
            instruction.k = pid;
        }
    }
    filter.push(sock_filter {
        code: RETURN,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_TRAP,
    });
    filter
}

/// Puts `filter`, of at most [`MAX_INSTRUCTIONS`], on the calling thread. On failure names the call.
pub(crate) fn install(filter: &[sock_filter]) -> Result<(), (&'static str, io::Error)> {
    let program = sock_fprog {
        len: u16::try_from(filter.len()).unwrap_or(u16::MAX),
        filter: filter.as_ptr().cast_mut(),
    };
    let one: c_ulong = 1;
    let none: c_ulong = 0;
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, none, none, none) } != 0 {
        return Err(("prctl(PR_SET_NO_NEW_PRIVS)", io::Error::last_os_error()));
    }
    let flags: c_int = 0;
    // SAFETY: `program` describes `filter`, which lives past the call; the kernel copies and checks it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    };
    if done != 0 {
        return Err((
            "seccomp(SECCOMP_SET_MODE_FILTER)",
            io::Error::last_os_error(),
        ));
    }
    Ok(())
}
