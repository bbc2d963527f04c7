//! Wire types of a machine description: the JSON that Firecracker's `--config-file` takes.
//!
//! Reading is strict: an unknown field, a field given twice, or a device that this build does not have
//! is an error, never skipped in silence. Everything that is wrong with a description is listed at
//! once, each with its line, its column and what to do.
//!
//! Deliberately does not know: which values make sense together (`machine::validate` does), where the
//! text came from, what any of it is used for.

mod cpu;
mod error;
mod object;
mod read;
mod requests;
mod snapshots;
#[cfg(test)]
mod tests;
mod types;

pub use cpu::{
    Bitmap, CpuConfig, CpuConfigSource, CpuidLeafModifier, CpuidRegister, CpuidRegisterModifier,
    KvmCapability, MsrModifier, Register,
};
pub use error::{ConfigError, Problem, Problems};
pub use requests::{
    Action, Body, DriveUpdate, LinkState, MachineConfigUpdate, MmdsConfig, MmdsVersion,
    NetworkInterfaceUpdate, StateChange,
};
pub use snapshots::{
    DriveCopy, DriveOverride, MemoryBackend, MemoryBackendType, NetworkOverride, SnapshotCreate,
    SnapshotLoad, SnapshotType, VsockOverride, WORKING_SET_MS,
};
pub use types::{
    BackingPlace, BootSource, CacheType, CpuTemplate, DiskFormat, Drive, Egress, EgressDefault,
    Entropy, HugePages, IoEngine, LinkKind, LogLevel, Logger, MachineConfig, Metrics,
    NetworkInterface, RateLimiter, Serial, TokenBucket, VmConfig, Vsock,
};

/// The longest description that is read. A real one has a few kilobytes; a path given by mistake may
/// lead to a disk image.
pub const MAX_SIZE_BYTES: usize = 1 << 20;

/// Problems that are listed; of more, only their number is told. A file that is something else
/// altogether would fill the screen.
pub const MAX_PROBLEMS: usize = 32;

impl VmConfig {
    /// Reads a machine description. `file_name` is only used in messages.
    ///
    /// # Errors
    /// The text is too long, empty, no JSON, or not this JSON; then everything that is wrong with it is
    /// listed.
    pub fn from_json(text: &str, file_name: &str) -> Result<Self, ConfigError> {
        object::read_document(text, file_name, read::vm_config)
    }

    /// As [`VmConfig::from_json`], for bytes that may not be UTF-8.
    ///
    /// # Errors
    /// As [`VmConfig::from_json`]; or the bytes are not UTF-8.
    pub fn from_json_bytes(bytes: &[u8], file_name: &str) -> Result<Self, ConfigError> {
        let text = text_of(bytes, file_name)?;
        Self::from_json(text, file_name)
    }
}

/// The text that `bytes` are.
fn text_of<'a>(bytes: &'a [u8], file_name: &str) -> Result<&'a str, ConfigError> {
    object::check_size(bytes.len(), file_name)?;
    std::str::from_utf8(bytes).map_err(|e| {
        let valid = bytes.get(..e.valid_up_to()).unwrap_or_default();
        let (line, column) = object::position_after(&String::from_utf8_lossy(valid));
        ConfigError::NotUtf8 {
            file: file_name.to_owned(),
            line,
            column,
        }
    })
}
