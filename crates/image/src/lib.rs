//! Container images without a daemon and without root: pulled from registries, imported from archives, kept by content, and made into one
//! read-only root disk each.
//!
//! Deliberately does not know: machines and how they run, what an image's command is for, how EROFS lies on a disk (`alveole-erofs` does).

mod context;
mod credentials;
mod digest;
mod draft;
mod error;
mod export;
mod folder;
mod import;
mod layers;
mod limits;
mod look;
mod oci;
mod plan;
mod pull;
mod recipe;
mod reference;
mod registry;
mod store;
mod tarfile;
mod tree;
mod unpack;
mod words;

pub use context::Context;
pub use digest::Digest;
pub use draft::{Draft, Unchecked};
pub use error::ImageError;
pub use export::Format;
pub use import::Import;
#[doc(hidden)]
pub use layers::fuzz_layer;
pub use layers::{Layer, make_root_disk};
pub use limits::Limits;
pub use oci::{Descriptor, Platform, RunConfig};
pub use plan::CopyFiles;
pub use recipe::{Act, Base, Command, MAX_RECIPE, Recipe, RecipeError, Step};
pub use reference::{DEFAULT_REGISTRY, Reference};
pub use registry::{log_in, log_out};
pub use store::{Image, Store, Usage, Usages};
pub use words::Word;

/// Who watches something that takes time.
pub trait Progress: Sync {
    /// Something begins, of so many bytes if that is known. Gives its number.
    fn start(&self, what: &str, total_bytes: Option<u64>) -> usize;
    /// So many bytes more are done.
    fn advance(&self, number: usize, bytes: u64);
    /// It is done, or has failed.
    fn done(&self, number: usize);
}

/// Nobody watches.
#[derive(Debug, Clone, Copy)]
pub struct Quiet;

impl Progress for Quiet {
    fn start(&self, _what: &str, _total_bytes: Option<u64>) -> usize {
        0
    }

    fn advance(&self, _number: usize, _bytes: u64) {}

    fn done(&self, _number: usize) {}
}
