//! The kernel command line: boot.rst, "The Kernel Command Line".

use crate::{LoadError, layout};

/// Checks that the kernel will see `cmdline` as it is: printable, and not so long that it is cut.
pub(crate) fn check(cmdline: &str, kernel_max: u64) -> Result<(), LoadError> {
    let printable = |byte: &u8| (b' '..=b'~').contains(byte);
    if let Some((position, byte)) = cmdline.bytes().enumerate().find(|(_, b)| !printable(b)) {
        return Err(LoadError::CmdlineByte { position, byte });
    }
    let limit = kernel_max.min(layout::CMDLINE_ROOM_BYTES - 1);
    if cmdline.len() as u64 > limit {
        return Err(LoadError::CmdlineLength {
            length: cmdline.len(),
            limit,
        });
    }
    Ok(())
}
