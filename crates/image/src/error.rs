use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why something about images could not be done. Each text says what, why, and what to do where that is known.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The host could not do it.
    #[error("cannot {what}: {source}{}", cure(source))]
    Io {
        /// The failed act, with its file.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The name of an image is none.
    #[error("{name:?} names no image: {why}")]
    Reference {
        /// What was given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is no such image in the store.
    #[error(
        "there is no image {0}: `alveole image ls` shows what is there, `alveole image pull` gets one"
    )]
    NotFound(String),
    /// Some digits of an id fit several images.
    #[error("{0} fits several images: give more of its digits, or a name")]
    Ambiguous(String),
    /// More than an image may cost.
    #[error(
        "{what}: more than {limit} {unit} are not taken; for an image that you trust, {option} raises that"
    )]
    Limit {
        /// What it was about.
        what: String,
        /// How many are allowed.
        limit: u64,
        /// Of what.
        unit: &'static str,
        /// How to allow more.
        option: &'static str,
    },
    /// A layer contains what cannot be.
    #[error("layer {layer} is refused: {why}")]
    Layer {
        /// Its digest, or what stands for it.
        layer: String,
        /// What is wrong.
        why: String,
    },
    /// Content is not what its digest says.
    #[error("{what} is damaged or was exchanged: its digest is {found}, not {expected}")]
    Digest {
        /// What was read.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The image, archive or registry says what cannot be understood.
    #[error("{0}")]
    Format(String),
    /// No variant for this machine.
    #[error(
        "{name} has nothing for {wanted}: it is there for {available}; another machine's programs do not run here"
    )]
    Platform {
        /// Image.
        name: String,
        /// Platform that was looked for.
        wanted: String,
        /// What there is.
        available: String,
    },
    /// The registry said no, or nothing.
    #[error("cannot get {what} from {registry}: {why}")]
    Registry {
        /// Host, and port if it was said.
        registry: String,
        /// What was asked for.
        what: String,
        /// Its words, and a cure.
        why: String,
    },
    /// The root disk could not be written.
    #[error("cannot make the root disk: {0}")]
    Disk(#[source] alveole_erofs::WriteError),
    /// The root disk could not be read.
    #[error("cannot read the root disk {}: {source}; `alveole image rm` and a new pull or import make it anew", path.display())]
    ReadDisk {
        /// The file.
        path: PathBuf,
        /// Why.
        source: alveole_erofs::ReadError,
    },
}

impl From<alveole_erofs::WriteError> for ImageError {
    fn from(error: alveole_erofs::WriteError) -> Self {
        match error {
            // With a cure.
            alveole_erofs::WriteError::Io(source) => Self::Io {
                what: "write the root disk".into(),
                source,
            },
            other => Self::Disk(other),
        }
    }
}

fn cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; `alveole image prune` frees what no image needs"
        }
        io::ErrorKind::PermissionDenied => "; --store chooses another folder",
        _ => "",
    }
}

/// Adds the failed act to an error of the host.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, ImageError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::Io {
            what: what(),
            source: source.into(),
        })
    }
}
