//! Puts the blocks of a role together and hands the filter to the kernel.
//!
//! Each block allows what its rules name and else runs on into the next one; after the last stands the
//! refusal. Deliberately does not know: roles, devices, what a block allows.

use std::io;

use libc::{c_int, c_ulong, sock_filter, sock_fprog};

use crate::filters::PID_MARKER;

/// What the kernel takes (`BPF_MAXINSNS`).
pub(crate) const MAX_INSTRUCTIONS: usize = 4096;

/// What the report finds beside a call that a filter of ours has refused (`SECCOMP_RET_DATA`): other filters have other data, as none.
pub(crate) const OURS: u16 = 0xa1fe;

const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const COMPARE_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const LOAD_DATA: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const LOAD_NUMBER: u16 = (libc::BPF_LD | libc::BPF_IMM) as u16;

/// Lets every call through.
pub(crate) const ALLOW: sock_filter = simple(RETURN, libc::SECCOMP_RET_ALLOW);

/// Before a filter of the user's: lets `seccomp` through, as one of ours, which refuses it from then on, is put on top. What follows
/// finds the registers as the kernel leaves them.
pub(crate) const PASS_SECCOMP: [sock_filter; 4] = [
    // The number of the call is the first field of `struct seccomp_data`.
    simple(LOAD_DATA, 0),
    sock_filter {
        code: COMPARE_EQUAL,
        jt: 0,
        jf: 1,
        k: libc::SYS_seccomp as u32,
    },
    ALLOW,
    simple(LOAD_NUMBER, 0),
];

const fn simple(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

/// `program` behind [`PASS_SECCOMP`].
pub(crate) fn after_seccomp(program: impl IntoIterator<Item = sock_filter>) -> Vec<sock_filter> {
    PASS_SECCOMP.into_iter().chain(program).collect()
}

/// One filter from `blocks`, for the process `pid`.
pub(crate) fn filter(blocks: &[&[sock_filter]], pid: u32) -> Vec<sock_filter> {
    let mut filter = blocks.concat();
    for instruction in &mut filter {
        // The build has checked that the marker stands nowhere else.
        if instruction.code == COMPARE_EQUAL && instruction.k == PID_MARKER {
            instruction.k = pid;
        }
    }
    filter.push(simple(RETURN, libc::SECCOMP_RET_TRAP | u32::from(OURS)));
    filter
}

/// No program that this thread may start gives it rights: without that, the kernel lets only root have filters. On failure names the
/// call.
pub(crate) fn forbid_new_rights() -> Result<(), (&'static str, io::Error)> {
    let one: c_ulong = 1;
    let none: c_ulong = 0;
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, none, none, none) } != 0 {
        return Err(("prctl(PR_SET_NO_NEW_PRIVS)", io::Error::last_os_error()));
    }
    Ok(())
}

/// Puts `filter`, of at most [`MAX_INSTRUCTIONS`], on the calling thread, which has seen to [`forbid_new_rights`]; makes no other
/// call. On failure names the call.
pub(crate) fn install(filter: &[sock_filter]) -> Result<(), (&'static str, io::Error)> {
    let program = sock_fprog {
        len: u16::try_from(filter.len()).unwrap_or(u16::MAX),
        filter: filter.as_ptr().cast_mut(),
    };
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
