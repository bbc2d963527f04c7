//! Layers into one root disk.
//!
//! Layers are read from the top down, and each file that is seen there for the first time streams into the disk at once; what upper layers
//! hide is passed over. Which files make the tree is then decided by the plain rules from the bottom up ([`crate::tree`]), over what was noted of the
//! entries. Passing over is therefore only a saving: where it was wrong, which takes a hard link into a lower layer or a parent that is a
//! symbolic link there, the layer is read once more.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, Read, Write};

use alveole_erofs::{Content, Inode, MAX_NAME, WriteOut, Writer};

use crate::Progress;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::limits::{Limits, MAX_DEPTH};
use crate::tarfile::{Entry, Kind, Piece, Tar, bad};
use crate::tree::{Event, Tree, What, clean, parts};
use crate::unpack::{in_thread, unpacked};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names of AUFS's own, which mean nothing.
const AUFS: &[u8] = b".wh..wh.";

type Opener<'a> = Box<dyn Fn() -> io::Result<Box<dyn Read + Send + 'a>> + 'a>;

/// A layer to apply.
pub struct Layer<'a> {
    /// What it is called in errors: its digest.
    pub name: String,
    /// Digest of what it unpacks to, if that is known: it is checked.
    pub diff_id: Option<Digest>,
    /// Bytes of it, for who watches.
    pub size_bytes: u64,
    /// Opens it: tar, plain or packed by gzip or zstd.
    pub open: Opener<'a>,
    /// An empty file that gets what it unpacks to, all that its digest is of.
    pub kept: Option<File>,
}

/// Why reading a layer ended.
enum Fail {
    Layer(io::Error),
    Image(ImageError),
}

impl From<io::Error> for Fail {
    fn from(error: io::Error) -> Self {
        Self::Layer(error)
    }
}

impl From<alveole_erofs::WriteError> for Fail {
    fn from(error: alveole_erofs::WriteError) -> Self {
        use alveole_erofs::WriteError as E;
        match error {
            E::Io(_) | E::TooLarge => Self::Image(error.into()),
            // The others are about what the layer wants.
            _ => Self::Layer(bad(error.to_string())),
        }
    }
}

/// Makes the root disk of `layers`, the lowest first, in an empty file. Gives the digests of what the layers unpack to. The same
/// layers give the same bytes.
///
/// # Errors
/// Layers that are damaged, impossible or beyond a limit, and the host's.
pub fn make_root_disk(
    layers: &[Layer<'_>],
    file: File,
    limits: &Limits,
    progress: &dyn Progress,
) -> Result<Vec<Digest>, ImageError> {
    let mut image = Writer::new(file)?;
    image.write_out_early();
    let mut disk = Making {
        image,
        limits: *limits,
        files: Vec::new(),
        entries: 0,
        devices: 0,
        cover: Cover::default(),
    };
    let mut read = Vec::new();
    for layer in layers.iter().rev() {
        let notes = disk.read(layer, None, progress)?;
        if read.len() + 1 < layers.len() {
            notes.events.iter().for_each(|event| disk.cover.add(event));
        }
        read.push(notes);
    }
    disk.cover = Cover::default();
    read.reverse();
    let mut tree = Tree::new(limits.entries);
    for (index, notes) in read.iter_mut().enumerate() {
        for event in std::mem::take(&mut notes.events) {
            tree.apply(index, &event).map_err(|why| ImageError::Layer {
                layer: layers[index].name.clone(),
                why,
            })?;
        }
    }
    let missing: HashSet<usize> = tree.files().filter(|n| disk.files[*n].is_none()).collect();
    for (layer, notes) in layers.iter().zip(&read) {
        let files = notes.first_file..notes.first_file + notes.file_count;
        if missing.iter().any(|number| files.contains(number)) {
            disk.read(layer, Some((notes.first_file, &missing)), progress)?;
        }
    }
    let Making { image, files, .. } = disk;
    let directories = tree.directories(|number| files[number]);
    let directories = directories
        .ok_or_else(|| ImageError::Format("a layer changed while it was read".into()))?;
    image.finish(&directories)?;
    Ok(read.into_iter().map(|notes| notes.diff_id).collect())
}

/// What is known of a layer once it was read.
struct Notes {
    events: Vec<Event>,
    /// Number of its first file; files are numbered as they come.
    first_file: usize,
    file_count: usize,
    diff_id: Digest,
}

struct Making {
    image: Writer,
    limits: Limits,
    /// Where files are, by their numbers; none for those that were passed over.
    files: Vec<Option<Inode>>,
    entries: u64,
    devices: u64,
    cover: Cover,
}

/// What a second reading is for: the number of the layer's first file, and the numbers of files that are missing.
type Again<'a> = Option<(usize, &'a HashSet<usize>)>;

impl Making {
    fn read(
        &mut self,
        layer: &Layer<'_>,
        again: Again<'_>,
        progress: &dyn Progress,
    ) -> Result<Notes, ImageError> {
        let refuse = |error: io::Error| ImageError::Layer {
            layer: layer.name.clone(),
            why: error.to_string(),
        };
        let bar = progress.start(&format!("unpacking {}", layer.name), Some(layer.size_bytes));
        let watched = Watched {
            inner: (layer.open)().map_err(refuse)?,
            progress,
            bar,
        };
        let (_, source) = unpacked(watched, &self.limits).map_err(refuse)?;
        let first_file = self.files.len();
        let kept = layer.kept.as_ref().filter(|_| again.is_none());
        let done = in_thread(source, |input| match kept {
            None => self.entries(input, again),
            Some(file) => {
                let mut input = Keeping {
                    input,
                    file,
                    len: 0,
                    write_out: WriteOut::default(),
                    failed: None,
                };
                let events = self.entries(&mut input, again).and_then(|events| {
                    // What follows the archive.
                    io::copy(&mut input, &mut io::sink())?;
                    Ok(events)
                });
                match input.failed {
                    Some(source) => Err(Fail::Image(ImageError::Io {
                        what: format!("keep the layer {}", layer.name),
                        source,
                    })),
                    None => events,
                }
            }
        });
        progress.done(bar);
        let (events, diff_id) = done.map_err(|fail| match fail {
            Fail::Layer(error) => refuse(error),
            Fail::Image(error) => error,
        })?;
        match &layer.diff_id {
            Some(expected) if *expected != diff_id => Err(ImageError::Digest {
                what: format!("what layer {} unpacks to", layer.name),
                expected: expected.to_string(),
                found: diff_id.to_string(),
            }),
            _ => Ok(Notes {
                events,
                first_file,
                file_count: self.files.len() - first_file,
                diff_id,
            }),
        }
    }

    fn entries(&mut self, input: &mut dyn Read, again: Again<'_>) -> Result<Vec<Event>, Fail> {
        let mut tar = Tar::new(input);
        let mut events = Vec::new();
        let mut number = again.map_or(self.files.len(), |(first, _)| first);
        while let Some(entry) = tar.next_entry()? {
            let Some((path, special)) = place_of(&entry)? else {
                continue;
            };
            if again.is_none() {
                self.count(&entry)?;
            }
            let what = match (special, &entry.kind) {
                (Some(special), _) => special,
                (None, Kind::Directory) => What::Directory(entry.metadata.clone()),
                (None, Kind::HardLink(target)) => What::Link(clean(target)),
                (None, kind) => {
                    let wanted = match again {
                        Some((_, missing)) => missing.contains(&number),
                        None => !self.cover.hides(&path),
                    };
                    let inode = if wanted {
                        Some(self.file(&mut tar, &entry)?)
                    } else {
                        None
                    };
                    match again {
                        None => self.files.push(inode),
                        Some(_) if wanted => self.files[number] = inode,
                        Some(_) => {}
                    }
                    number += 1;
                    let target = match kind {
                        Kind::Symlink(target) => Some(target.as_slice().into()),
                        _ => None,
                    };
                    What::File(number - 1, target)
                }
            };
            if again.is_none() {
                events.push(Event { path, what });
            }
        }
        Ok(events)
    }

    fn count(&mut self, entry: &Entry) -> Result<(), Fail> {
        let over = |limit, unit, option| {
            let path = String::from_utf8_lossy(&entry.path).into_owned();
            Fail::Image(ImageError::Limit {
                what: format!("the image has too many {unit} (at {path:.100})"),
                limit,
                unit,
                option,
            })
        };
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(over(self.limits.entries, "entries", "--max-entries"));
        }
        if matches!(entry.kind, Kind::CharDevice(..) | Kind::BlockDevice(..)) {
            self.devices += 1;
            if self.devices > self.limits.devices {
                return Err(over(self.limits.devices, "device nodes", "--max-devices"));
            }
        }
        Ok(())
    }

    fn file<R: Read>(&mut self, tar: &mut Tar<R>, entry: &Entry) -> Result<Inode, Fail> {
        let most = self.limits.disk_bytes;
        let too_large = |len| {
            if len <= most {
                return Ok(());
            }
            Err(Fail::Image(ImageError::Limit {
                what: format!(
                    "the root disk becomes too large (at {:.100})",
                    String::from_utf8_lossy(&entry.path)
                ),
                limit: most,
                unit: "bytes",
                option: "--max-size",
            }))
        };
        let metadata = &entry.metadata;
        let content = match &entry.kind {
            Kind::Symlink(target) => Content::Symlink(target.clone()),
            Kind::CharDevice(major, minor) => Content::CharDevice(*major, *minor),
            Kind::BlockDevice(major, minor) => Content::BlockDevice(*major, *minor),
            Kind::Fifo => Content::Fifo,
            Kind::File | Kind::Directory | Kind::HardLink(_) => {
                let mut file = self.image.begin(entry.size_bytes);
                tar.content(entry, |piece| {
                    match piece {
                        Piece::Data(bytes) => file.data(bytes)?,
                        Piece::Hole(len) => file.hole(len)?,
                    }
                    too_large(file.image_len_bytes())
                })?;
                let inode = file.end(metadata)?;
                too_large(self.image.len_bytes())?;
                return Ok(inode);
            }
        };
        let inode = self.image.special(metadata, &content)?;
        too_large(self.image.len_bytes())?;
        Ok(inode)
    }
}

/// A clean path, and what happens there if the name alone says so.
pub(crate) type Place = (Box<[u8]>, Option<What>);

/// Where an entry goes, and what it does if its name has a meaning. Nothing for what is passed over.
pub(crate) fn place_of(entry: &Entry) -> io::Result<Option<Place>> {
    let path = clean(&entry.path);
    let shown = || String::from_utf8_lossy(&entry.path).into_owned();
    let mut depth = 0;
    for part in parts(&path) {
        depth += 1;
        if part.len() > MAX_NAME {
            return Err(bad(format!(
                "a name has {} bytes, {MAX_NAME} are the most: {:.60}...",
                part.len(),
                shown()
            )));
        }
        if part.starts_with(AUFS) && part != OPAQUE {
            return Ok(None);
        }
    }
    if depth > MAX_DEPTH {
        return Err(bad(format!(
            "a path has {depth} parts, {MAX_DEPTH} are the most: {:.60}...",
            shown()
        )));
    }
    let (parent, name) = match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], &path[..]),
    };
    if name == OPAQUE {
        return Ok(Some((parent.into(), Some(What::Opaque))));
    }
    let Some(hidden) = name.strip_prefix(WHITEOUT) else {
        return Ok(Some((path, None)));
    };
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(bad(format!("{} is a whiteout of nothing", shown())));
    }
    let path = if parent.is_empty() {
        hidden.into()
    } else {
        [parent, hidden].join(&b'/').into()
    };
    Ok(Some((path, Some(What::Whiteout))))
}

/// What upper layers cover, by path alone.
#[derive(Default)]
struct Cover {
    nodes: Vec<Covered>,
}

#[derive(Default)]
struct Covered {
    /// A file of a lower layer with this very path is hidden.
    itself: bool,
    /// And so is all below it.
    below: bool,
    children: HashMap<Box<[u8]>, usize>,
}

impl Cover {
    fn add(&mut self, event: &Event) {
        if self.nodes.is_empty() {
            self.nodes.push(Covered::default());
        }
        let mut at = 0;
        for part in parts(&event.path) {
            let next = self.nodes[at].children.get(part).copied();
            at = next.unwrap_or_else(|| {
                self.nodes.push(Covered::default());
                let index = self.nodes.len() - 1;
                self.nodes[at].children.insert(part.into(), index);
                index
            });
        }
        let node = &mut self.nodes[at];
        match event.what {
            What::Directory(_) => node.itself = true,
            What::Opaque => node.below = true,
            What::File(..) | What::Link(_) | What::Whiteout => {
                (node.itself, node.below) = (true, true);
            }
        }
    }

    fn hides(&self, path: &[u8]) -> bool {
        let mut parts = parts(path).peekable();
        let Some(mut node) = self.nodes.first() else {
            return false;
        };
        while let Some(part) = parts.next() {
            if node.below {
                return true;
            }
            match node.children.get(part) {
                Some(index) => node = &self.nodes[*index],
                None => return false,
            }
            if parts.peek().is_none() && node.itself {
                return true;
            }
        }
        false
    }
}

/// Writes down what is read.
struct Keeping<'a, R> {
    input: R,
    file: &'a File,
    len: u64,
    write_out: WriteOut,
    /// It is the host's, and no fault of what is read.
    failed: Option<io::Error>,
}

impl<R: Read> Read for Keeping<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(into)?;
        if let Err(error) = self.file.write_all(&into[..n]) {
            self.failed = Some(error);
            return Err(bad("it cannot be kept"));
        }
        self.len += n as u64;
        self.write_out.written(self.file, self.len);
        Ok(n)
    }
}

struct Watched<'a, R> {
    inner: R,
    progress: &'a dyn Progress,
    bar: usize,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(into)?;
        self.progress.advance(self.bar, n as u64);
        Ok(n)
    }
}

/// What a fuzzer drives: any bytes as a layer over a small one that has a file, a directory and a link.
#[doc(hidden)]
pub fn fuzz_layer(bytes: &[u8]) {
    let Ok(file) = tempfile::tempfile() else {
        return;
    };
    let lower = lower_for_fuzzing().unwrap_or_default();
    let layer = |name: &str, bytes: Vec<u8>| Layer {
        name: name.into(),
        diff_id: None,
        size_bytes: 0,
        open: Box::new(move || Ok(Box::new(io::Cursor::new(bytes.clone())))),
        kept: None,
    };
    let limits = Limits {
        entries: 10_000,
        disk_bytes: 64 << 20,
        ratio: 100,
        devices: 100,
    };
    let layers = [layer("lower", lower), layer("upper", bytes.to_vec())];
    let Ok(reopened) = file.try_clone() else {
        return;
    };
    if make_root_disk(&layers, reopened, &limits, &crate::Quiet).is_ok() {
        // What was made can be read.
        let image = alveole_erofs::Image::open(file).expect("a disk was made that is none");
        let mut left = vec![image.root()];
        while let Some(nid) = left.pop() {
            let info = image.info(nid).expect("an inode was made that is none");
            if info.kind == alveole_erofs::Kind::Directory {
                let entries = image
                    .entries(&info)
                    .expect("a directory was made that is none");
                left.extend(entries.iter().map(|e| e.nid));
            }
        }
    }
}

fn lower_for_fuzzing() -> io::Result<Vec<u8>> {
    let metadata = alveole_erofs::Metadata::default();
    let mut bytes = Vec::new();
    for (path, kind) in [
        (&b"d"[..], Kind::Directory),
        (b"d/f", Kind::File),
        (b"l", Kind::Symlink(b"d".to_vec())),
        (b"h", Kind::HardLink(b"d/f".to_vec())),
    ] {
        bytes.extend(crate::tarfile::head(path, &kind, &metadata, 0)?);
    }
    Ok(bytes)
}
