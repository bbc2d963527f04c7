//! The kernels that guests of this user boot, in a folder each.
//!
//! ```text
//! NAME/kernel.json   what it is
//! NAME/kernel        the kernel
//! NAME/modules/      the modules that a machine needs, uncompressed, and `order`
//! NAME/modules.erofs all modules as the distribution packs them, for programs of guests
//! NAME/initramfs     these with the agent; made anew when the agent is another one
//! default            the name of the one that is taken if none is named
//! ```
//!
//! A kernel is put together in a folder beside and renamed when it is whole, so that a command that is killed leaves none that is not;
//! what it leaves goes with the next one that is added.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::{KernelError, MACHINE, ModuleTree, package, write_initramfs};

/// Where a kernel comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file of a kernel (bzImage or ELF), and its tree of modules, if it does not have all built in.
    Files {
        /// The kernel.
        kernel: PathBuf,
        /// `lib/modules/RELEASE`.
        modules: Option<PathBuf>,
    },
    /// A distribution's package.
    Package(PathBuf),
    /// What this host runs.
    Host,
}

/// A kernel that guests can boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// What it is called here.
    pub name: String,
    /// Its release, as `uname -r` says it in a guest; empty if unknown.
    pub release: String,
    /// Where it came from.
    pub from: String,
    /// The size of kernel and modules, in bytes.
    pub size_bytes: u64,
    /// It is taken if none is named.
    #[serde(skip_deserializing)]
    pub default: bool,
    /// Its folder.
    #[serde(skip)]
    folder: PathBuf,
}

/// The kernels of one user.
#[derive(Debug)]
pub struct KernelStore {
    folder: PathBuf,
}

const JSON: &str = "kernel.json";
const KERNEL: &str = "kernel";
const MODULES: &str = "modules";
const MODULES_DISK: &str = "modules.erofs";
const ORDER: &str = "order";
const DEFAULT: &str = "default";
/// What is not whole begins with it, which no kernel's name does.
const UNFINISHED: &str = ".new-";

impl KernelStore {
    /// The store in this folder, which is made when the first kernel is added.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// Takes a kernel into the store. It is the default if it is the first. Without a name it is called by its release.
    ///
    /// # Errors
    ///
    /// It is none, its modules are another one's or lack one that a machine needs, it is there already, or something cannot be read or written.
    pub fn add(&self, source: &Source, name: Option<&str>) -> Result<Kernel, KernelError> {
        make_folder(&self.folder)?;
        let lock = self.lock()?;
        self.sweep();
        let building = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&self.folder)
            .map_err(KernelError::file("make a folder in", &self.folder))?;
        let (kernel, modules, from) = match source {
            Source::Files { kernel, modules } => (
                kernel.clone(),
                modules.clone(),
                kernel.display().to_string(),
            ),
            Source::Package(path) => {
                let unpacked = package::unpack(path, &building.path().join("package"))?;
                (
                    unpacked.kernel,
                    Some(unpacked.modules),
                    path.display().to_string(),
                )
            }
            Source::Host => {
                let release = rustix::system::uname()
                    .release()
                    .to_string_lossy()
                    .into_owned();
                let kernel = Path::new("/boot").join(format!("vmlinuz-{release}"));
                let modules = Path::new("/lib/modules").join(&release);
                (kernel, Some(modules), format!("this host ({release})"))
            }
        };
        let own = release_of(&kernel);
        let release = match (&modules, own) {
            (None, own) => own.unwrap_or_default(),
            (Some(tree), own) => {
                let others = ModuleTree::open(tree)?.release();
                if let Some(release) = own.filter(|own| *own != others) {
                    return Err(KernelError::OtherKernels {
                        kernel,
                        release,
                        tree: tree.clone(),
                        others,
                    });
                }
                others
            }
        };
        let name = match name {
            Some(name) => name,
            None if release.is_empty() => "kernel",
            None => &release.clone(),
        };
        check_name(name)?;
        let folder = self.folder.join(name);
        if folder.exists() {
            return Err(KernelError::Exists(name.into()));
        }
        let new = building.path().join("whole");
        let mut size_bytes = take_kernel(&kernel, &new)?;
        if let Some(tree) = &modules {
            size_bytes += take_modules(tree, &new)?;
            size_bytes += pack_modules(tree, &new)?;
        }
        let added = Kernel {
            name: name.into(),
            release,
            from,
            size_bytes,
            default: false,
            folder: folder.clone(),
        };
        let json = serde_json::to_vec_pretty(&added)
            .map_err(|e| KernelError::file("write", new.join(JSON))(e.into()))?;
        write(&new.join(JSON), &json)?;
        fs::rename(&new, &folder).map_err(KernelError::file("put in its place", &folder))?;
        if self.default_name().is_none() {
            self.write_default(name)?;
        }
        drop(lock);
        self.get(Some(name))
    }

    /// All kernels, by name.
    ///
    /// # Errors
    ///
    /// The folder cannot be read. One that is not there is empty.
    pub fn list(&self) -> Result<Vec<Kernel>, KernelError> {
        let entries = match fs::read_dir(&self.folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(KernelError::file("read", &self.folder))?,
        };
        let default = self.default_name();
        let mut all: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let folder = entry.path();
                let json = fs::read(folder.join(JSON)).ok()?;
                let mut kernel: Kernel = serde_json::from_slice(&json).ok()?;
                // The folder is what counts: somebody may have moved it.
                kernel.name = entry.file_name().into_string().ok()?;
                check_name(&kernel.name).ok()?;
                kernel.default = default.as_deref() == Some(&kernel.name);
                kernel.folder = folder;
                Some(kernel)
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// The kernel of this name, or the default one.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn get(&self, name: Option<&str>) -> Result<Kernel, KernelError> {
        let all = self.list()?;
        if all.is_empty() && name.is_none() {
            return Err(KernelError::None);
        }
        let known: Vec<_> = all.iter().map(|k| k.name.clone()).collect();
        let found = match name {
            Some(name) => all.into_iter().find(|k| k.name == name),
            None => all.into_iter().find(|k| k.default),
        };
        found.ok_or_else(|| KernelError::Unknown {
            name: name.unwrap_or("the default").into(),
            known,
        })
    }

    /// Makes a kernel the one that is taken if none is named.
    ///
    /// # Errors
    ///
    /// There is none of that name, or it cannot be written down.
    pub fn set_default(&self, name: &str) -> Result<(), KernelError> {
        let kernel = self.get(Some(name))?;
        let _lock = self.lock()?;
        self.write_default(&kernel.name)
    }

    /// Removes a kernel. Guests that run keep theirs.
    ///
    /// # Errors
    ///
    /// There is none of that name, or it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), KernelError> {
        let kernel = self.get(Some(name))?;
        let _lock = self.lock()?;
        // Away at once, so that nobody takes half of it.
        let gone = self.folder.join(format!("{UNFINISHED}removed-{name}"));
        fs::rename(&kernel.folder, &gone).map_err(KernelError::file("remove", &kernel.folder))?;
        fs::remove_dir_all(&gone).map_err(KernelError::file("remove", &gone))
    }

    fn default_name(&self) -> Option<String> {
        let text = fs::read_to_string(self.folder.join(DEFAULT)).ok()?;
        let name = text.trim_end().to_owned();
        self.folder.join(&name).join(JSON).exists().then_some(name)
    }

    fn write_default(&self, name: &str) -> Result<(), KernelError> {
        replace(&self.folder.join(DEFAULT), |file| writeln!(file, "{name}"))
    }

    fn lock(&self) -> Result<File, KernelError> {
        let path = self.folder.join("lock");
        let lock = || {
            let file = File::options().create(true).append(true).open(&path)?;
            rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        };
        lock().map_err(KernelError::file("lock", &path))
    }

    /// Removes what killed commands left. Only who has the lock makes such folders.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl Kernel {
    /// The kernel's file.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.folder.join(KERNEL)
    }

    /// The disk with all of its modules, if it has some: what is to lie at `/lib/modules/RELEASE` of a guest. It is only read.
    #[must_use]
    pub fn modules_disk(&self) -> Option<PathBuf> {
        let path = self.folder.join(MODULES_DISK);
        path.exists().then_some(path)
    }

    /// The initramfs with this agent: made if there is none yet, or if it has another agent.
    ///
    /// # Errors
    ///
    /// The agent or a module cannot be read, or the initramfs not be written.
    pub fn initramfs(&self, agent: &Path) -> Result<PathBuf, KernelError> {
        let metadata = fs::metadata(agent).map_err(KernelError::file("read the agent", agent))?;
        // As make(1) tells that a file is another one, and by its size.
        let is = format!(
            "initramfs-{:x}-{:x}-{:x}",
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec()
        );
        let path = self.folder.join(&is);
        if path.exists() {
            return Ok(path);
        }
        let program = fs::read(agent).map_err(KernelError::file("read the agent", agent))?;
        let modules = self.modules()?;
        replace(&path, |file| {
            let mut out = BufWriter::new(file);
            write_initramfs(&mut out, &program, &modules)
        })?;
        // A guest that just starts with an older one has it open.
        for entry in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("initramfs-") && *name != *is {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(path)
    }

    fn modules(&self) -> Result<Vec<(String, Vec<u8>)>, KernelError> {
        let folder = self.folder.join(MODULES);
        let order = fs::read_to_string(folder.join(ORDER)).unwrap_or_default();
        let read = |name: &str| {
            let path = folder.join(name);
            let bytes = fs::read(&path).map_err(KernelError::file("read the module", &path))?;
            Ok((name.to_owned(), bytes))
        };
        order.lines().map(read).collect()
    }
}

fn check_name(name: &str) -> Result<(), KernelError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._+~-".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && name.len() <= 100 && name.chars().all(allowed) && name != DEFAULT && name != "lock"
    {
        return Ok(());
    }
    Err(KernelError::Name(name.into()))
}

fn make_folder(folder: &Path) -> Result<(), KernelError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(KernelError::file("make the folder", folder))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), KernelError> {
    fs::write(path, bytes).map_err(KernelError::file("write", path))
}

/// Replaces a file as a whole.
fn replace(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), KernelError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let replace = || {
        let mut file = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempfile_in(folder)?;
        fill(file.as_file_mut())?;
        file.persist(path).map_err(|e| e.error).map(drop)
    };
    replace().map_err(KernelError::file("write", path))
}

/// `HdrS`, at 0x202 of a bzImage (Linux, Documentation/arch/x86/boot.rst).
const BOOT_MAGIC: (&[u8; 4], u64) = (b"HdrS", 0x202);
const ELF_MAGIC: &[u8; 4] = b"\x7fELF";

fn take_kernel(from: &Path, into: &Path) -> Result<u64, KernelError> {
    let file = File::open(from).map_err(|source| KernelError::File {
        act: "open the kernel",
        path: from.into(),
        cure: match source.kind() {
            io::ErrorKind::PermissionDenied => {
                "; some distributions let only root read it: copy it with sudo, or take the kernel from a package"
            }
            _ => "",
        },
        source,
    })?;
    let mut magic = [0; 4];
    let mut is =
        |expected: &[u8; 4], at| file.read_exact_at(&mut magic, at).is_ok() && &magic == expected;
    if !is(BOOT_MAGIC.0, BOOT_MAGIC.1) && !is(ELF_MAGIC, 0) {
        return Err(KernelError::NoKernel {
            path: from.into(),
            why: "it is neither a bzImage (vmlinuz) nor an ELF file (vmlinux)",
        });
    }
    fs::create_dir_all(into).map_err(KernelError::file("make the folder", into))?;
    fs::copy(from, into.join(KERNEL)).map_err(KernelError::file("copy", from))
}

/// The release in a bzImage: a text at an offset that the boot header has at 0x20e.
fn release_of(kernel: &Path) -> Option<String> {
    let file = File::open(kernel).ok()?;
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, BOOT_MAGIC.1).ok()?;
    let mut offset = [0; 2];
    file.read_exact_at(&mut offset, 0x20e).ok()?;
    let at = u64::from(u16::from_le_bytes(offset)) + 0x200;
    let mut text = [0; 100];
    let count = file.read_at(&mut text, at).ok()?;
    let end = text[..count].iter().position(|b| *b == b' ' || *b == 0)?;
    let release = std::str::from_utf8(&text[..end]).ok()?;
    (&magic == BOOT_MAGIC.0 && check_name(release).is_ok()).then(|| release.to_owned())
}

fn pack_modules(tree: &Path, into: &Path) -> Result<u64, KernelError> {
    let path = into.join(MODULES_DISK);
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(KernelError::file("write", &path))?;
    alveole_erofs::pack(tree, file, [0; 16], None)?;
    let metadata = fs::metadata(&path).map_err(KernelError::file("read", &path))?;
    Ok(metadata.len())
}

fn take_modules(tree: &Path, into: &Path) -> Result<u64, KernelError> {
    let folder = into.join(MODULES);
    fs::create_dir_all(&folder).map_err(KernelError::file("make the folder", &folder))?;
    let mut size = 0;
    let mut order = String::new();
    for path in ModuleTree::open(tree)?.resolve(MACHINE)? {
        let (name, bytes) = ModuleTree::read(&path)?;
        write(&folder.join(&name), &bytes)?;
        size += bytes.len() as u64;
        order.push_str(&name);
        order.push('\n');
    }
    write(&folder.join(ORDER), order.as_bytes())?;
    Ok(size)
}
