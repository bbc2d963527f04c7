//! Opening a store.

use std::path::Path;
use std::sync::Arc;

use crate::qcow2_store::Qcow2Store;
use crate::raw::RawStore;
use crate::uring::io_uring_available;
use crate::{BlockStore, Cache, Engine, Format, OpenError, OpenOptions};

/// Opens what lies at `path`, with everything that its use will ever need: the caller may enter a sandbox
/// afterwards.
///
/// # Errors
/// What keeps it from being used as `options` say, with what to do about it.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn BlockStore>, OpenError> {
    let uring = match options.engine {
        Engine::Sync => false,
        Engine::Auto => match io_uring_available() {
            Ok(()) => true,
            Err(reason) => {
                log::info!("{}: no io_uring: {reason}", path.display());
                false
            }
        },
        Engine::IoUring => {
            io_uring_available().map_err(|reason| OpenError::Engine { reason })?;
            true
        }
    };
    if options.cache == Cache::Unsafe {
        log::warn!(
            "{}: cache=unsafe: flushes are ignored, what the guest writes is lost if the host goes down",
            path.display()
        );
    }
    Ok(match options.format {
        Format::Raw => Arc::new(RawStore::open(path, options, uring)?),
        Format::Qcow2 => Arc::new(Qcow2Store::open(path, options, uring)?),
    })
}

/// Looks whether what lies at `path` can be opened as `options` say, and lets go of it again. Whether there is a ring is looked at
/// where one must be: making one takes longer than all the rest.
///
/// # Errors
/// As [`open`].
pub fn look(path: &Path, options: &OpenOptions) -> Result<(), OpenError> {
    let engine = match options.engine {
        Engine::Auto => Engine::Sync,
        named => named,
    };
    open(path, &OpenOptions { engine, ..*options }).map(drop)
}

/// The engine's name for people.
pub(crate) fn engine_name(uring: bool) -> &'static str {
    if uring { "io_uring" } else { "sync" }
}
