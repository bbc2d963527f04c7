//! Descriptors that the jailer was started with.

use std::collections::BTreeSet;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use crate::failure::{Failure, OrFail};

/// Standard input, output and error are always handed on.
const FIRST: u32 = 3;

/// Closes every descriptor but 0, 1, 2 and `keep`, and lets the program have those. To be called before anything
/// is opened.
///
/// # Errors
/// One to keep is not open.
pub(crate) fn keep_only(keep: &BTreeSet<RawFd>) -> Result<(), Failure> {
    for fd in keep {
        // SAFETY: it is used for two calls that harm no descriptor, whatever its number.
        let borrowed = unsafe { BorrowedFd::borrow_raw(*fd) };
        fcntl_getfd(borrowed)
            .and_then(|_| fcntl_setfd(borrowed, FdFlags::empty()))
            .or_fail(
                || format!("hand on descriptor {fd} (--pass-fd)"),
                &format!("start the jailer with it: in a shell, {fd}<>FILE behind the command"),
            )?;
    }
    for gap in gaps(keep) {
        // SAFETY: nothing in this process has opened any of these, and nobody holds them.
        let closed = unsafe { libc::close_range(*gap.start(), *gap.end(), 0) };
        if closed < 0 {
            return Err(Failure::new(
                "close inherited descriptors",
                io::Error::last_os_error(),
                "the host's kernel must be Linux 5.9 or newer",
            ));
        }
    }
    Ok(())
}

/// The numbers between those to keep.
fn gaps(keep: &BTreeSet<RawFd>) -> Vec<RangeInclusive<u32>> {
    let mut gaps = Vec::new();
    let mut next = FIRST;
    for fd in keep.iter().map(|fd| fd.cast_unsigned()) {
        if fd > next {
            gaps.push(next..=fd - 1);
        }
        next = fd + 1;
    }
    gaps.push(next..=u32::MAX);
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_others_are_in_a_gap() {
        let of = |keep: &[RawFd]| gaps(&keep.iter().copied().collect());
        let most = RawFd::MAX.cast_unsigned();
        assert_eq!(of(&[]), [3..=u32::MAX]);
        assert_eq!(of(&[3]), [4..=u32::MAX]);
        assert_eq!(of(&[7, 5, 8]), [3..=4, 6..=6, 9..=u32::MAX]);
        assert_eq!(of(&[RawFd::MAX]), [3..=most - 1, most + 1..=u32::MAX]);
    }
}
