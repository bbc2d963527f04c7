use std::io;
use std::path::PathBuf;

/// Why something about a kernel was not done.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file cannot be used.
    #[error("cannot {act} '{}': {source}{cure}", path.display())]
    File {
        /// What was tried.
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
        /// What to do, after a `; `; or nothing.
        cure: &'static str,
    },
    /// A module is needed that is not there.
    #[error("the kernel's modules in '{}' have no '{name}', and it is not built in: is that a kernel for virtual machines (Debian: linux-image-cloud-amd64 or linux-image-amd64)?", tree.display())]
    NoModule {
        /// The module.
        name: String,
        /// Where it was looked for.
        tree: PathBuf,
    },
    /// A folder is no tree of modules.
    #[error("'{}' is no tree of a kernel's modules: {why}", path.display())]
    NoTree {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        why: &'static str,
    },
    /// Modules are those of another kernel, which would load none of them.
    #[error("the kernel '{}' is {release}, and the modules in '{}' are those of another one, {others}: give it its own lib/modules/{release}", kernel.display(), tree.display())]
    OtherKernels {
        /// The kernel.
        kernel: PathBuf,
        /// Its release.
        release: String,
        /// The modules.
        tree: PathBuf,
        /// The release that they are for.
        others: String,
    },
    /// A package has no kernel in it.
    #[error("the package '{}' {why}", path.display())]
    Package {
        /// The package.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A file is no kernel.
    #[error("'{}' is no kernel for this processor: {why}", path.display())]
    NoKernel {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        why: &'static str,
    },
    /// No such kernel.
    #[error("there is no kernel '{name}'{}; `alveole kernel ls` shows them, `alveole kernel add` gets more", list(.known))]
    Unknown {
        /// The name that was asked for.
        name: String,
        /// Those that are there.
        known: Vec<String>,
    },
    /// No kernel at all.
    #[error(
        "there is no kernel for guests yet; get one: `alveole kernel add --host` takes this machine's own, `alveole kernel add PACKAGE.deb` a distribution's, `alveole kernel add VMLINUZ --modules DIR` any"
    )]
    None,
    /// A name that is not to be used for a folder.
    #[error(
        "'{0}' cannot be a kernel's name: use 1 to 100 letters, digits, `.`, `_`, `+`, `~` and `-`, and begin with a letter or digit"
    )]
    Name(String),
    /// It is there already.
    #[error(
        "there is a kernel '{0}' already: remove it first (alveole kernel rm), or give another --name"
    )]
    Exists(String),
    /// Its modules cannot be made a disk.
    #[error("cannot make a disk of the kernel's modules: {0}")]
    Pack(#[from] alveole_erofs::PackError),
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return String::new();
    }
    format!(" (there are: {})", names.join(", "))
}

impl KernelError {
    pub(crate) fn file(
        act: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            act,
            path,
            source,
            cure: "",
        }
    }
}
