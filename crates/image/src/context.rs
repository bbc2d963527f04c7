//! The folder that a recipe copies from. Nothing outside of it is read, wherever links in it lead: the kernel is told so (`openat2`,
//! RESOLVE_BENEATH).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat, openat2, readlinkat, statat,
};
use rustix::io::Errno;

use crate::error::{Doing, ImageError};

/// What is not to be copied, as docker has it.
const IGNORE_FILE: &str = ".dockerignore";
/// Most bytes of that file.
const MAX_IGNORE: u64 = 1 << 20;
/// `*` stops at a slash, and files that begin with a dot are like others.
const MATCHING: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

/// A context that is open.
#[derive(Debug)]
pub struct Context {
    root: OwnedFd,
    path: PathBuf,
    /// Patterns in their order; `true`: what fits is copied after all.
    ignored: Vec<(Pattern, bool)>,
}

/// Something in a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    /// Where, below the context.
    pub(crate) path: PathBuf,
    pub(crate) kind: ItemKind,
    pub(crate) mode: u16,
    /// Bytes of a file.
    pub(crate) size_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ItemKind {
    File,
    Directory,
    Symlink(Vec<u8>),
}

impl Context {
    /// Opens the folder at a path.
    ///
    /// # Errors
    /// It is none, or its ignore file cannot be understood.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let doing = || format!("use {} as the context of a build", path.display());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, path, flags, Mode::empty()).doing(doing)?;
        let mut context = Self {
            root,
            path: path.into(),
            ignored: Vec::new(),
        };
        let ignore = openat(
            &context.root,
            IGNORE_FILE,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        );
        match ignore {
            Err(Errno::NOENT) => {}
            file => {
                let doing = || format!("read {IGNORE_FILE} of {}", path.display());
                let mut text = String::new();
                File::from(file.doing(doing)?)
                    .take(MAX_IGNORE)
                    .read_to_string(&mut text)
                    .doing(doing)?;
                context.ignored = ignored(&text)?;
            }
        }
        Ok(context)
    }

    /// Whether a path is left out: the last pattern that fits it, or a folder that it is in, decides.
    fn is_ignored(&self, path: &Path) -> bool {
        let mut left_out = false;
        for (pattern, back) in &self.ignored {
            if left_out == *back {
                let fits =
                    |p: &Path| !p.as_os_str().is_empty() && pattern.matches_path_with(p, MATCHING);
                if path.ancestors().any(fits) {
                    left_out = !back;
                }
            }
        }
        left_out
    }

    /// What a source names, each with all that lies in it: a path below the context, maybe with `*`, `?` and `[...]`.
    ///
    /// # Errors
    /// It names nothing, leads out, or names what cannot be copied.
    pub(crate) fn find(&self, source: &str) -> Result<Vec<Vec<Item>>, ImageError> {
        let wanted = relative(source)?;
        let mut found = Vec::new();
        if source.contains(['*', '?', '[']) {
            let pattern = Pattern::new(&wanted.to_string_lossy())
                .map_err(|e| ImageError::Format(format!("{source:?} is no pattern: {e}")))?;
            let depth = wanted.components().count();
            self.fitting(Path::new(""), depth, &pattern, &mut found)?;
        } else {
            found.push(wanted);
        }
        let mut all = Vec::new();
        for path in found {
            if self.is_ignored(&path) && !self.ignored.iter().any(|(_, back)| *back) {
                return Err(ImageError::Format(format!(
                    "{source:?} is left out by {IGNORE_FILE}: remove it there, or add a line !{source}"
                )));
            }
            all.push(self.tree(&path, source)?);
        }
        if all.is_empty() {
            return Err(ImageError::Format(format!(
                "nothing in {} fits {source:?}",
                self.path.display()
            )));
        }
        Ok(all)
    }

    /// Paths so deep that fit a pattern.
    fn fitting(
        &self,
        folder: &Path,
        depth: usize,
        pattern: &Pattern,
        found: &mut Vec<PathBuf>,
    ) -> Result<(), ImageError> {
        for name in self.names(folder)? {
            let path = folder.join(name);
            if path.components().count() == depth {
                if pattern.matches_path_with(&path, MATCHING) && !self.is_ignored(&path) {
                    found.push(path);
                }
            } else if self.kind(&path)? == FileType::Directory {
                self.fitting(&path, depth, pattern, found)?;
            }
        }
        Ok(())
    }

    /// Something, links followed where they stay in the context, and all below it, where they are not.
    fn tree(&self, path: &Path, source: &str) -> Result<Vec<Item>, ImageError> {
        let doing = || format!("copy {source:?} from {}", self.path.display());
        let fd = self.beneath(path, OFlags::PATH).map_err(|e| match e {
            Errno::XDEV => ImageError::Format(format!(
                "{source:?} leads out of the context {}: copy it in first",
                self.path.display()
            )),
            e => ImageError::Io {
                what: doing(),
                source: e.into(),
            },
        })?;
        let found = rustix::fs::fstat(&fd).doing(doing)?;
        let mut items = Vec::new();
        let mut left = vec![self.item(path, &found, None)?];
        while let Some(item) = left.pop() {
            let is_directory = item.kind == ItemKind::Directory;
            let folder = item.path.clone();
            if folder == path || !self.is_ignored(&folder) {
                items.push(item);
            } else if !is_directory || !self.ignored.iter().any(|(_, back)| *back) {
                continue;
            }
            if !is_directory {
                continue;
            }
            let open = self.beneath(&folder, OFlags::RDONLY | OFlags::DIRECTORY);
            let open = open.doing(|| format!("read {}", self.path.join(&folder).display()))?;
            // The last is taken first.
            for name in self.names(&folder)?.into_iter().rev() {
                let path = folder.join(&name);
                let doing = || format!("read {}", self.path.join(&path).display());
                let found = statat(&open, &name, AtFlags::SYMLINK_NOFOLLOW).doing(doing)?;
                let target = match FileType::from_raw_mode(found.st_mode) {
                    FileType::Symlink => Some(
                        readlinkat(&open, &name, Vec::new())
                            .doing(doing)?
                            .into_bytes(),
                    ),
                    FileType::RegularFile | FileType::Directory => None,
                    _ if self.is_ignored(&path) => continue,
                    _ => None,
                };
                left.push(self.item(&path, &found, target)?);
            }
        }
        Ok(items)
    }

    fn item(
        &self,
        path: &Path,
        found: &rustix::fs::Stat,
        target: Option<Vec<u8>>,
    ) -> Result<Item, ImageError> {
        let kind = match (FileType::from_raw_mode(found.st_mode), target) {
            (FileType::RegularFile, _) => ItemKind::File,
            (FileType::Directory, _) => ItemKind::Directory,
            (FileType::Symlink, Some(target)) => ItemKind::Symlink(target),
            _ => {
                return Err(ImageError::Format(format!(
                    "{} is neither a file, a folder nor a link: leave it out by a line in {IGNORE_FILE}",
                    self.path.join(path).display()
                )));
            }
        };
        Ok(Item {
            path: path.into(),
            mode: (found.st_mode & 0o7777) as u16,
            size_bytes: if kind == ItemKind::File {
                found.st_size.unsigned_abs()
            } else {
                0
            },
            kind,
        })
    }

    fn kind(&self, path: &Path) -> Result<FileType, ImageError> {
        let found = statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW);
        Ok(FileType::from_raw_mode(
            found
                .doing(|| format!("read {}", self.path.join(path).display()))?
                .st_mode,
        ))
    }

    fn names(&self, folder: &Path) -> Result<Vec<PathBuf>, ImageError> {
        let doing = || format!("read {}", self.path.join(folder).display());
        let open = self
            .beneath(folder, OFlags::RDONLY | OFlags::DIRECTORY)
            .doing(doing)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(open).doing(doing)? {
            let entry = entry.doing(doing)?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.push(PathBuf::from(std::ffi::OsStr::from_bytes(name)));
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn beneath(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        openat2(
            &self.root,
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            how,
        )
    }

    /// Opens a file.
    pub(crate) fn file(&self, path: &Path) -> Result<File, ImageError> {
        // One that became a pipe meanwhile is not waited for.
        let open = self.beneath(path, OFlags::RDONLY | OFlags::NONBLOCK);
        open.map(File::from)
            .doing(|| format!("read {}", self.path.join(path).display()))
    }

    /// Whether a file is one that docker's `ADD` unpacks.
    pub(crate) fn is_archive(&self, item: &Item) -> Result<bool, ImageError> {
        if item.kind != ItemKind::File {
            return Ok(false);
        }
        let mut start = Vec::new();
        let doing = || format!("read {}", self.path.join(&item.path).display());
        self.file(&item.path)?
            .take(512)
            .read_to_end(&mut start)
            .doing(doing)?;
        // gzip, bzip2, xz, zstd, and tar's own mark.
        let packed: [&[u8]; 4] = [
            &[0x1f, 0x8b],
            b"BZh",
            &[0xfd, b'7', b'z', b'X', b'Z'],
            &[0x28, 0xb5, 0x2f, 0xfd],
        ];
        Ok(packed.iter().any(|mark| start.starts_with(mark))
            || start.get(257..262) == Some(b"ustar"))
    }

    pub(crate) fn shown(&self, path: &Path) -> String {
        self.path.join(path).display().to_string()
    }
}

/// A source's path below the context.
fn relative(source: &str) -> Result<PathBuf, ImageError> {
    let mut path = PathBuf::new();
    for part in Path::new(source).components() {
        match part {
            Component::Normal(name) => path.push(name),
            // It begins at the context.
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            Component::ParentDir => {
                if !path.pop() {
                    return Err(ImageError::Format(format!(
                        "{source:?} leads out of the context: only what lies in it is copied"
                    )));
                }
            }
        }
    }
    Ok(path)
}

fn ignored(text: &str) -> Result<Vec<(Pattern, bool)>, ImageError> {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (line, back) = match line.strip_prefix('!') {
            Some(rest) => (rest.trim(), true),
            None => (line, false),
        };
        let clean: Vec<&str> = line
            .split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .collect();
        // All of it.
        let clean = if clean.is_empty() {
            "**".into()
        } else {
            clean.join("/")
        };
        let pattern = Pattern::new(&clean).map_err(|e| {
            ImageError::Format(format!(
                "line {} of {IGNORE_FILE} is no pattern: {e}",
                index + 1
            ))
        })?;
        found.push((pattern, back));
    }
    Ok(found)
}

/// Copies exactly so many bytes.
pub(crate) fn exactly(from: impl Read, size: u64, to: &mut dyn io::Write) -> io::Result<()> {
    let copied = io::copy(&mut from.take(size), to)?;
    if copied == size {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "it became shorter while it was read",
    ))
}
