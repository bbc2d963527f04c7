//! A saved state into a machine that was just built.

use std::sync::PoisonError;

use alveole_hypervisor::{CpuState, PartitionState};
use alveole_saved_state::{RestoreError, SavedState, StateFile};

use crate::build::BuildError;
use crate::catalog::Devices;
use crate::snapshot::state;

/// Puts the state of every device into it.
pub(crate) fn restore_devices(devices: &Devices, file: &mut StateFile) -> Result<(), BuildError> {
    for part in &devices.parts {
        let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = part.save().kind;
        let saved = file.take(&kind)?;
        part.restore(&saved)
            .map_err(|e| BuildError::Restore(kind, e))?;
    }
    for (index, transport) in devices.transports.iter().enumerate() {
        let kind = state::device(index);
        let named = |e| BuildError::Restore(kind.clone(), e);
        let saved = file.take(&kind)?;
        let saved: SavedState = saved.unpack(&kind, state::DEVICE_VERSION).map_err(named)?;
        let mut transport = transport.lock().unwrap_or_else(PoisonError::into_inner);
        transport.restore(&saved).map_err(named)?;
    }
    Ok(())
}

/// The state of processor `index`.
pub(crate) fn cpu_state(file: &mut StateFile, index: u32) -> Result<CpuState, BuildError> {
    let kind = state::cpu(usize::try_from(index).unwrap_or(usize::MAX));
    take(file, &kind, state::CPU_VERSION)
}

/// The state of interrupt controllers and clock.
pub(crate) fn partition_state(file: &mut StateFile) -> Result<PartitionState, BuildError> {
    take(file, state::PARTITION, state::PARTITION_VERSION)
}

fn take<T: serde::de::DeserializeOwned>(
    file: &mut StateFile,
    kind: &str,
    version: u32,
) -> Result<T, BuildError> {
    let saved = file.take(kind)?;
    let unpacked: Result<T, RestoreError> = saved.unpack(kind, version);
    unpacked.map_err(|e| BuildError::Restore(kind.to_owned(), e))
}
