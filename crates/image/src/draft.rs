//! Images in the making: a base, layers over it one after the other, a description, at last a name.
//!
//! A layer of copied files is the same bytes for the same files, and is known by them. What a command does can be known only by what it was
//! done to and how: the store keeps that as a step, by the digest of both.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use alveole_erofs::Metadata;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::Progress;
use crate::context::{Context, Item, ItemKind, exactly};
use crate::digest::{Digest, Hash};
use crate::error::{Doing, ImageError};
use crate::export::archive_of_disk;
use crate::limits::{Limits, MAX_LAYERS};
use crate::look::{Found, Look};
use crate::oci::{
    self, CONFIG, Configuration, Descriptor, LAYER, MANIFEST, Manifest, Platform, RootFs, RunConfig,
};
use crate::reference::Reference;
use crate::store::{Held, Image, Store, disk_id};
use crate::tarfile::{END, Kind, head, padding};
use crate::tree::{clean, parts};

/// Grows when the same words mean another step.
const STEP_FORMAT: u32 = 1;
/// The time of what is copied, and of an image in which no command ran: 1980-01-01T00:00:01Z, before which zip archives know no time.
const USUAL_TIME: u64 = 315_532_801;

/// An image in the making. While it is there, nothing is removed from the store.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    held: Held,
    limits: Limits,
    platform: Platform,
    /// How the image is run.
    pub config: RunConfig,
    layers: Vec<Made>,
    /// Of these, how many came with the base.
    base_layers: usize,
    /// Seconds since 1970 of the newest step.
    made: u64,
    /// The time of what is copied.
    time: u64,
    disk: Option<(Digest, NamedTempFile)>,
    look: Option<Look>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Made {
    layer: Descriptor,
    diff_id: Digest,
}

/// What is written down of a step.
#[derive(Serialize, Deserialize)]
struct StepRecord {
    #[serde(flatten)]
    made: Made,
    /// Seconds since 1970.
    at: u64,
}

/// A layer that has come and is not taken yet.
#[derive(Debug)]
pub struct Unchecked {
    file: NamedTempFile,
    digest: Digest,
    size: u64,
}

/// What is copied from a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyFiles {
    /// Paths and patterns below the context.
    pub sources: Vec<String>,
    /// Absolute; with a slash at its end it is a folder.
    pub to: String,
    /// User and group.
    pub owner: (u32, u32),
    /// Instead of the files' own.
    pub mode: Option<u16>,
    /// Archives are refused, as others would unpack them here.
    pub no_archives: bool,
}

/// An entry that is to be written.
struct Planned {
    /// Clean, without links in it.
    to: Vec<u8>,
    item: Item,
}

impl Store {
    /// Begins an image. `time` is that of what is copied (`SOURCE_DATE_EPOCH`), in seconds since 1970.
    ///
    /// # Errors
    /// The host's.
    pub fn draft(&self, limits: Limits, time: Option<u64>) -> Result<Draft, ImageError> {
        let time = time.unwrap_or(USUAL_TIME);
        Ok(Draft {
            store: self.clone(),
            held: self.hold()?,
            limits,
            platform: Platform::host(),
            config: RunConfig::default(),
            layers: Vec::new(),
            base_layers: 0,
            made: time,
            time,
            disk: None,
            look: None,
        })
    }

    fn step_path(&self, key: &Digest) -> PathBuf {
        self.root.join("steps").join(format!("{}.json", key.hex()))
    }

    fn steps(&self) -> Result<Vec<(PathBuf, Option<StepRecord>)>, ImageError> {
        let read = |path: &Path| serde_json::from_slice(&fs::read(path).ok()?).ok();
        let files = self.files_in("steps")?;
        Ok(files
            .into_iter()
            .map(|file| (file.path.clone(), read(&file.path)))
            .collect())
    }

    /// Layers that steps of builds have made.
    pub(crate) fn step_layers(&self) -> Result<Vec<PathBuf>, ImageError> {
        let steps = self.steps()?.into_iter().filter_map(|(_, step)| step);
        Ok(steps
            .map(|step| self.blob_path(&step.made.layer.digest))
            .collect())
    }

    /// Forgets steps whose layers are gone.
    pub(crate) fn forget_steps(&self) -> Result<(), ImageError> {
        for (path, step) in self.steps()? {
            if !step.is_some_and(|step| self.has_blob(&step.made.layer.digest)) {
                fs::remove_file(&path).doing(|| format!("remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

impl Draft {
    /// Begins with an image, and its description.
    ///
    /// # Errors
    /// A damaged store.
    pub fn over(&mut self, image: &Image) -> Result<(), ImageError> {
        let descriptor = Descriptor::new(MANIFEST, image.manifest.clone(), 0);
        let manifest = self.store.manifest(&descriptor)?;
        let made = manifest.layers.into_iter().zip(&image.diff_ids);
        self.layers = made
            .map(|(layer, diff_id)| Made {
                layer,
                diff_id: diff_id.clone(),
            })
            .collect();
        self.base_layers = self.layers.len();
        self.config = image.config.clone();
        self.platform = image.platform.clone();
        Ok(())
    }

    /// Begins with the files of a root disk, whose layers are not here.
    ///
    /// # Errors
    /// It is no EROFS of ours, or the host's.
    pub fn over_disk(&mut self, disk: &Path) -> Result<(), ImageError> {
        let made = self.written(|to| archive_of_disk(disk, to))?;
        self.push(made)
    }

    // Steps ------------------------------------------------------------------------------------

    /// By what a step is known that does this to what there is so far.
    #[must_use]
    pub fn key(&self, words: &[&str]) -> Digest {
        let mut text = format!("alveole step {STEP_FORMAT}\n{}\n", self.tree_id());
        for word in words {
            text.push_str(&format!("{} {word}\n", word.len()));
        }
        Digest::of(text.as_bytes())
    }

    /// Takes the layer of a step that was done before; says whether there is one.
    ///
    /// # Errors
    /// Too many layers.
    pub fn again(&mut self, key: &Digest) -> Result<bool, ImageError> {
        let record = fs::read(self.store.step_path(key)).ok();
        let record = record.and_then(|bytes| serde_json::from_slice::<StepRecord>(&bytes).ok());
        let Some(record) = record.filter(|r| self.store.has_blob(&r.made.layer.digest)) else {
            return Ok(false);
        };
        self.made = self.made.max(record.at);
        self.push(record.made)?;
        Ok(true)
    }

    /// Writes down that the last layer is what the step of this key makes.
    ///
    /// # Errors
    /// The host's.
    pub fn remember(&mut self, key: &Digest) -> Result<(), ImageError> {
        let now = self.is_of_now();
        let Some(made) = self.layers.last().cloned() else {
            return Ok(());
        };
        let mut file = self.store.new_file()?;
        let path = self.store.step_path(key);
        file.write_all(&oci::write(&StepRecord { made, at: now })?)
            .doing(|| format!("write {}", path.display()))?;
        self.store.keep(file, &path)
    }

    /// Has the image say that it was made now. Gives that time, in seconds since 1970.
    pub fn is_of_now(&mut self) -> u64 {
        let now = UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs());
        self.made = self.made.max(now);
        now
    }

    /// Receives a layer from somebody who is not trusted, of at most so many bytes.
    ///
    /// # Errors
    /// More bytes, or the host's.
    pub fn receive(&self, mut from: impl Read, most: u64) -> Result<Unchecked, ImageError> {
        let mut file = self.store.new_file()?;
        let (mut hash, mut size) = (Hash::default(), 0);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e).doing(|| "read a layer".into()),
            };
            size += n as u64;
            if size > most {
                return Err(ImageError::Format(format!(
                    "the layer that came has more than {most} bytes, which cannot be"
                )));
            }
            hash.update(&buffer[..n]);
            file.write_all(&buffer[..n])
                .doing(|| format!("write a layer into {}", self.store.path().display()))?;
        }
        Ok(Unchecked {
            file,
            digest: hash.digest(),
            size,
        })
    }

    /// Takes a layer that was received, if it is one.
    ///
    /// # Errors
    /// It is no archive, or the host's. What is impossible in other ways is refused with the root disk.
    pub fn take(&mut self, received: Unchecked) -> Result<(), ImageError> {
        let made = self.keep_layer(received)?;
        self.look()?;
        self.push(made)
    }

    fn keep_layer(&self, received: Unchecked) -> Result<Made, ImageError> {
        let Unchecked { file, digest, size } = received;
        self.store.keep(file, &self.store.blob_path(&digest))?;
        Ok(Made {
            layer: Descriptor::new(LAYER, digest.clone(), size),
            diff_id: digest,
        })
    }

    fn push(&mut self, made: Made) -> Result<(), ImageError> {
        if let Some(look) = &mut self.look {
            look.add(&self.store.blob_path(&made.layer.digest))?;
        }
        self.layers.push(made);
        Ok(())
    }

    /// A layer that is written: known by its bytes, so that one which is here is not written again.
    fn written(
        &self,
        write: impl Fn(&mut dyn Write) -> Result<(), ImageError>,
    ) -> Result<Made, ImageError> {
        let mut counted = Counted::default();
        write(&mut counted)?;
        let (digest, size) = (counted.hash.digest(), counted.size);
        if !self.store.has_blob(&digest) {
            let mut file = self.store.new_file()?;
            let found = {
                let buffered = BufWriter::with_capacity(1 << 20, file.as_file_mut());
                let mut to = Both {
                    counted: Counted::default(),
                    file: buffered,
                };
                write(&mut to)?;
                to.file.flush().doing(|| "write a layer".into())?;
                to.counted.hash.clone().digest()
            };
            if found != digest {
                return Err(ImageError::Format(
                    "what is copied changes while it is read: build when it rests".into(),
                ));
            }
            self.store.keep(file, &self.store.blob_path(&digest))?;
        }
        Ok(Made {
            layer: Descriptor::new(LAYER, digest.clone(), size),
            diff_id: digest,
        })
    }

    // Copies -----------------------------------------------------------------------------------

    fn look(&mut self) -> Result<&Look, ImageError> {
        if self.look.is_none() {
            let ids: Vec<Digest> = self.layers[..self.base_layers]
                .iter()
                .map(|made| made.diff_id.clone())
                .collect();
            let mut look = match self.base_layers {
                0 => Look::default(),
                _ => Look::over(&self.store.disk_path(&disk_id(&ids)))?,
            };
            for made in &self.layers[self.base_layers..] {
                look.add(&self.store.blob_path(&made.layer.digest))?;
            }
            self.look = Some(look);
        }
        self.look
            .as_ref()
            .ok_or_else(|| ImageError::Format("the image so far cannot be looked into".into()))
    }

    /// Numbers of `USER[:GROUP]`, by the image's own files.
    ///
    /// # Errors
    /// The image has no such user or group.
    pub fn owner(&mut self, text: &str) -> Result<(u32, u32), ImageError> {
        self.look()?.owner(text)
    }

    /// Copies files into a layer.
    ///
    /// # Errors
    /// They are not there, cannot be copied, or have no place in the image.
    pub fn copy(&mut self, context: &Context, what: &CopyFiles) -> Result<(), ImageError> {
        let mut found = Vec::new();
        for source in &what.sources {
            found.extend(context.find(source)?);
        }
        let (to, at) = self.look()?.follow(&clean(what.to.as_bytes()))?;
        let into = what.to.ends_with('/') || at == Found::Directory;
        let single = found.len() == 1 && what.sources.len() == 1;
        if !single && !what.to.ends_with('/') {
            return Err(ImageError::Format(format!(
                "several files cannot become {}: write {}/, with a slash at its end",
                what.to, what.to
            )));
        }
        let mut plan = Plan {
            look: self.look()?,
            entries: BTreeMap::new(),
            what,
        };
        for items in found {
            let Some(top) = items.first().cloned() else {
                continue;
            };
            if what.no_archives && context.is_archive(&top)? {
                return Err(ImageError::Format(format!(
                    "{} is an archive, which others would unpack here: COPY it, and RUN tar",
                    context.shown(&top.path)
                )));
            }
            if top.kind == ItemKind::Directory {
                plan.folder(&to)?;
                plan.below(&to, &top.path, &items[1..])?;
            } else if into {
                plan.folder(&to)?;
                // What a link is called, not what it leads to.
                let name = top.path.file_name().unwrap_or_default().as_bytes().to_vec();
                plan.add(&joined(&to, &name), top)?;
            } else {
                plan.add(&to, top)?;
            }
        }
        let planned: Vec<Planned> = plan
            .entries
            .into_iter()
            .map(|(to, item)| Planned { to, item })
            .collect();
        let made = self.written(|out| write_plan(context, &planned, what, self.time, out))?;
        self.push(made)
    }

    /// Makes a folder if it is not there.
    ///
    /// # Errors
    /// Something else is there.
    pub fn folder(&mut self, path: &str, owner: (u32, u32)) -> Result<(), ImageError> {
        let (to, at) = self.look()?.follow(&clean(path.as_bytes()))?;
        match at {
            Found::Directory => return Ok(()),
            Found::Nothing => {}
            _ => {
                return Err(ImageError::Format(format!(
                    "{path} is no folder in the image"
                )));
            }
        }
        let metadata = Metadata {
            mode: 0o755,
            uid: owner.0,
            gid: owner.1,
            mtime: self.time.cast_signed(),
            ..Metadata::default()
        };
        let made = self.written(|out| {
            let head =
                head(&to, &Kind::Directory, &metadata, 0).doing(|| "write a layer".into())?;
            out.write_all(&head)
                .and_then(|()| out.write_all(&END))
                .doing(|| "write a layer".into())
        })?;
        self.push(made)
    }

    // The whole --------------------------------------------------------------------------------

    fn diff_ids(&self) -> Vec<Digest> {
        self.layers
            .iter()
            .map(|made| made.diff_id.clone())
            .collect()
    }

    /// By what the tree so far is known.
    fn tree_id(&self) -> Digest {
        disk_id(&self.diff_ids())
    }

    /// A root disk of what there is so far, which is there as long as this is, or until another one is made.
    ///
    /// # Errors
    /// A layer is refused, or beyond a limit; the host's.
    pub fn root_disk(&mut self, progress: &dyn Progress) -> Result<PathBuf, ImageError> {
        let id = self.tree_id();
        let kept = self.store.disk_path(&id);
        if kept.exists() {
            return Ok(kept);
        }
        if let Some((_, file)) = self.disk.as_ref().filter(|(of, _)| *of == id) {
            return Ok(file.path().into());
        }
        if self.layers.len() > MAX_LAYERS {
            return Err(ImageError::Format(format!(
                "it has {} layers, {MAX_LAYERS} are the most: do more in one step",
                self.layers.len()
            )));
        }
        self.disk = None;
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|made| (made.layer.digest.clone(), Some(made.diff_id.clone())))
            .collect();
        let (file, _) = self.store.make_disk(&layers, &self.limits, progress)?;
        let path = file.path().to_owned();
        self.disk = Some((id, file));
        Ok(path)
    }

    /// Gives the image its name.
    ///
    /// # Errors
    /// As [`root_disk`](Self::root_disk).
    pub fn finish(
        mut self,
        name: &Reference,
        progress: &dyn Progress,
    ) -> Result<Image, ImageError> {
        self.root_disk(progress)?;
        let id = self.tree_id();
        if let Some((_, file)) = self.disk.take().filter(|(of, _)| *of == id) {
            self.store.keep(file, &self.store.disk_path(&id))?;
        }
        let created = UNIX_EPOCH + Duration::from_secs(self.made);
        let configuration = Configuration {
            created: Some(humantime::format_rfc3339_seconds(created).to_string()),
            architecture: self.platform.architecture.clone(),
            os: self.platform.os.clone(),
            variant: self.platform.variant.clone(),
            config: self.config.clone(),
            rootfs: RootFs {
                kind: "layers".into(),
                diff_ids: self.diff_ids(),
            },
        };
        let config = self
            .store
            .add_document(CONFIG, &oci::write(&configuration)?)?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MANIFEST.into()),
            config,
            layers: self.layers.iter().map(|made| made.layer.clone()).collect(),
        };
        let manifest = self.store.add_document(MANIFEST, &oci::write(&manifest)?)?;
        let image = self.store.name(name, manifest, id);
        drop(self.held);
        image
    }
}

/// What a copy becomes.
struct Plan<'a> {
    look: &'a Look,
    /// By their places; one that comes later replaces one before.
    entries: BTreeMap<Vec<u8>, Item>,
    what: &'a CopyFiles,
}

impl Plan<'_> {
    /// A folder that is copied into: as it is if it is there, else made with those above it.
    fn folder(&mut self, to: &[u8]) -> Result<(), ImageError> {
        let mut at = Vec::new();
        for part in parts(to) {
            at = joined(&at, part);
            match self.look.follow(&at)?.1 {
                Found::Nothing => {
                    self.entries.entry(at.clone()).or_insert(Item {
                        path: PathBuf::new(),
                        kind: ItemKind::Directory,
                        mode: 0o755,
                        size_bytes: 0,
                    });
                }
                Found::Directory => {}
                _ => return Err(self.no_place(&at, "is no folder in the image")),
            }
        }
        Ok(())
    }

    /// All that lies in a folder of the context.
    fn below(&mut self, to: &[u8], top: &Path, items: &[Item]) -> Result<(), ImageError> {
        // Where folders of the context come to lie: links of the image are followed.
        let mut places: BTreeMap<PathBuf, Vec<u8>> =
            BTreeMap::from([(top.to_owned(), to.to_vec())]);
        for item in items {
            let parent = item.path.parent().unwrap_or(Path::new(""));
            let name = item.path.file_name().unwrap_or_default().as_bytes();
            let Some(place) = places.get(parent) else {
                // It is in a folder that is left out, and is not itself.
                self.folder_of(&mut places, top, parent)?;
                let place = places.get(parent).cloned().unwrap_or_default();
                self.one(&mut places, &joined(&place, name), item)?;
                continue;
            };
            let at = joined(place, name);
            self.one(&mut places, &at, item)?;
        }
        Ok(())
    }

    /// Places folders that are left out but for something in them.
    fn folder_of(
        &mut self,
        places: &mut BTreeMap<PathBuf, Vec<u8>>,
        top: &Path,
        folder: &Path,
    ) -> Result<(), ImageError> {
        let below: Vec<&Path> = folder.ancestors().take_while(|path| *path != top).collect();
        for path in below.into_iter().rev() {
            if !places.contains_key(path) {
                let parent = places
                    .get(path.parent().unwrap_or(Path::new("")))
                    .cloned()
                    .unwrap_or_default();
                let (at, _) = self.look.follow(&joined(
                    &parent,
                    path.file_name().unwrap_or_default().as_bytes(),
                ))?;
                self.folder(&at)?;
                places.insert(path.to_owned(), at.into());
            }
        }
        Ok(())
    }

    fn one(
        &mut self,
        places: &mut BTreeMap<PathBuf, Vec<u8>>,
        at: &[u8],
        item: &Item,
    ) -> Result<(), ImageError> {
        if item.kind != ItemKind::Directory {
            return self.add(at, item.clone());
        }
        let (real, found) = self.look.follow(at)?;
        match found {
            Found::Directory if *real != *at => {
                places.insert(item.path.clone(), real.into());
                return Ok(());
            }
            Found::Directory | Found::Nothing => {}
            _ => {
                return Err(self.no_place(at, "is no folder in the image, but one in the context"));
            }
        }
        places.insert(item.path.clone(), at.to_vec());
        self.add(at, item.clone())
    }

    fn add(&mut self, at: &[u8], item: Item) -> Result<(), ImageError> {
        if at.is_empty() {
            return Err(self.no_place(at, "is the root: write a name behind it"));
        }
        let name = at.rsplit(|b| *b == b'/').next().unwrap_or_default();
        if name.starts_with(b".wh.") {
            return Err(self.no_place(at, "cannot be in a layer, where names that begin with .wh. mean that something is gone"));
        }
        if item.kind != ItemKind::Directory {
            // Not through a link: that would be replaced, as with docker.
            let is_folder = self.look.follow(at)?;
            if is_folder.1 == Found::Directory && *is_folder.0 == *at {
                return Err(
                    self.no_place(at, "is a folder in the image, and a file in the context")
                );
            }
        }
        self.entries.insert(at.to_vec(), item);
        Ok(())
    }

    fn no_place(&self, at: &[u8], why: &str) -> ImageError {
        ImageError::Format(format!(
            "cannot copy to {}: /{} {why}",
            self.what.to,
            String::from_utf8_lossy(at)
        ))
    }
}

fn joined(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() {
        return name.to_vec();
    }
    [folder, b"/", name].concat()
}

fn write_plan(
    context: &Context,
    planned: &[Planned],
    what: &CopyFiles,
    time: u64,
    out: &mut dyn Write,
) -> Result<(), ImageError> {
    let writing = || "write a layer".to_owned();
    for Planned { to, item } in planned {
        let kind = match &item.kind {
            ItemKind::File => Kind::File,
            ItemKind::Directory => Kind::Directory,
            ItemKind::Symlink(target) => Kind::Symlink(target.clone()),
        };
        let is_link = matches!(kind, Kind::Symlink(_));
        // Folders that were made on the way are nobody's of the context.
        let is_ours = !item.path.as_os_str().is_empty();
        let metadata = Metadata {
            mode: what
                .mode
                .filter(|_| !is_link && is_ours)
                .unwrap_or(item.mode),
            uid: what.owner.0,
            gid: what.owner.1,
            mtime: time.cast_signed(),
            ..Metadata::default()
        };
        out.write_all(&head(to, &kind, &metadata, item.size_bytes).doing(writing)?)
            .doing(writing)?;
        if kind == Kind::File {
            let file = context.file(&item.path)?;
            exactly(file, item.size_bytes, out)
                .doing(|| format!("read {}", context.shown(&item.path)))?;
            out.write_all(padding(item.size_bytes)).doing(writing)?;
        }
    }
    out.write_all(&END).doing(writing)
}

#[derive(Default)]
struct Counted {
    hash: Hash,
    size: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Both<W> {
    counted: Counted,
    file: W,
}

impl<W: Write> Write for Both<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all(bytes)?;
        self.counted.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
