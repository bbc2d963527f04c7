//! Images on this host: content by its digest, root disks by that of their layers, names.
//!
//! ```text
//! blobs/sha256/HEX   manifests, configurations, layers as they came
//! disks/HEX.erofs    root disks; HEX is that of the format's version and the layers' diff ids
//! names/HEX.json     what a name stands for; HEX is that of the name
//! partial/HEX        downloads that can be resumed
//! steps/HEX.json     layers that steps of builds have made; HEX is the digest of what was done to what
//! tmp/               what is being made; locked by whoever makes it
//! lock               shared while something is added, exclusive while something is removed
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use alveole_erofs::WriteOut;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::Progress;
use crate::digest::{Digest, Hash, Hashing};
use crate::error::{Doing, ImageError};
use crate::layers::{Layer, make_root_disk};
use crate::limits::{Limits, MAX_JSON, MAX_LAYERS};
use crate::oci::{
    self, CONFIG, Configuration, Descriptor, MANIFEST, Manifest, Platform, RunConfig,
};
use crate::reference::Reference;

/// Grows when the same layers give other bytes.
const DISK_FORMAT: u32 = 1;
/// Shortest beginning of an id that is looked for.
const MIN_ID: usize = 4;

/// Where images are kept. Any number of processes may use it at once.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) root: PathBuf,
}

/// What a name stands for.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    name: String,
    manifest: Descriptor,
    disk: Digest,
    /// Seconds since 1970.
    added: u64,
}

/// An image that is ready to run.
#[derive(Debug, Clone, Serialize)]
pub struct Image {
    /// Digest of its configuration.
    pub id: Digest,
    /// All its names here, complete.
    pub names: Vec<String>,
    /// Its manifest, by which registries know it.
    pub manifest: Digest,
    /// For which machine it is.
    pub platform: Platform,
    /// When it was made, as it says itself (RFC 3339).
    pub created: Option<String>,
    /// When it came here: seconds since 1970.
    pub added: u64,
    /// How it is run.
    pub config: RunConfig,
    /// Its layers as they came, the lowest first.
    pub layers: Vec<Digest>,
    /// What they unpack to.
    pub diff_ids: Vec<Digest>,
    /// Bytes of the layers.
    pub layers_bytes: u64,
    /// The read-only EROFS file with its root; shared by all images with the same layers.
    pub root_disk: PathBuf,
    /// Bytes of that on this host.
    pub root_disk_bytes: u64,
}

/// What something takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// How many.
    pub count: u64,
    /// Bytes on this host.
    pub bytes: u64,
    /// Bytes of those that no image needs.
    pub unused_bytes: u64,
}

/// What the store takes, for `system df`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usages {
    /// Layers and documents.
    pub blobs: Usage,
    /// Root disks.
    pub disks: Usage,
    /// Downloads that were not finished, and what was left by processes that were killed.
    pub unfinished: Usage,
}

/// Holds the store's lock.
#[derive(Debug)]
pub(crate) struct Held(#[expect(dead_code, reason = "the lock goes with the file")] File);

impl Store {
    /// Where images are kept if nobody says otherwise: `/var/lib/alveole/images` for root, else below `$XDG_DATA_HOME`
    /// (`~/.local/share`).
    #[must_use]
    pub fn usual_path() -> PathBuf {
        if rustix::process::geteuid().is_root() {
            return PathBuf::from("/var/lib/alveole/images");
        }
        let absolute = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .unwrap_or_else(|| {
                std::env::temp_dir()
                    .join(format!("alveole-{}", rustix::process::geteuid().as_raw()))
            })
            .join("alveole/images")
    }

    /// Opens the store at a path, and makes it if it is not there, for its owner alone.
    ///
    /// # Errors
    /// The host's.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        for folder in ["blobs/sha256", "disks", "names", "partial", "steps", "tmp"] {
            let folder = root.join(folder);
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .doing(|| format!("make {}", folder.display()))?;
        }
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The image that a name, or the beginning of an id, stands for.
    ///
    /// # Errors
    /// None or several such images, or a damaged store.
    pub fn resolve(&self, text: &str) -> Result<Image, ImageError> {
        let records = self.records()?;
        if let Ok(name) = text.parse::<Reference>() {
            let full = name.to_string();
            // A digest alone is enough to know an image that came by a tag.
            let by_digest = |r: &&Record| {
                let same = |other: Reference| {
                    other.registry() == name.registry() && other.repository() == name.repository()
                };
                name.digest() == Some(&r.manifest.digest) && r.name.parse().is_ok_and(same)
            };
            let found = records
                .iter()
                .find(|r| r.name == full)
                .or_else(|| records.iter().find(by_digest));
            if let Some(record) = found {
                return self.image(record, &records);
            }
        }
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let mut found: BTreeMap<Digest, Image> = BTreeMap::new();
        if digits.len() >= MIN_ID && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            for record in &records {
                let image = self.image(record, &records)?;
                if image.id.hex().starts_with(digits) {
                    found.insert(image.id.clone(), image);
                }
            }
        }
        if found.len() > 1 {
            return Err(ImageError::Ambiguous(text.into()));
        }
        let image = found.into_values().next();
        image.ok_or_else(|| ImageError::NotFound(text.into()))
    }

    /// All images, each once, sorted by name.
    ///
    /// # Errors
    /// A damaged store, or the host's.
    pub fn images(&self) -> Result<Vec<Image>, ImageError> {
        let records = self.records()?;
        let mut seen = BTreeSet::new();
        let mut images = Vec::new();
        for record in &records {
            if seen.insert(record.manifest.digest.clone()) {
                images.push(self.image(record, &records)?);
            }
        }
        Ok(images)
    }

    /// Takes a name, or all names of an image given by its id, away, and removes what no image needs any more. Gives the names.
    ///
    /// # Errors
    /// No such image, or the host's.
    pub fn remove(&self, text: &str, keep: &[PathBuf]) -> Result<Vec<String>, ImageError> {
        let lock = self.lock(FlockOperation::LockExclusive)?;
        let image = self.resolve(text)?;
        let named = text.parse::<Reference>().map(|name| name.to_string());
        let names = match named {
            Ok(name) if image.names.contains(&name) => vec![name],
            _ => image.names,
        };
        for name in &names {
            let path = self.record_path(name);
            fs::remove_file(&path).doing(|| format!("remove {}", path.display()))?;
        }
        self.sweep(&lock, keep, false)?;
        Ok(names)
    }

    /// Removes what no image needs: content, root disks except `keep`, unfinished downloads. With `all`, first all names
    /// whose root disks are not in `keep`. Gives the names, and the bytes that were freed.
    ///
    /// # Errors
    /// The host's.
    pub fn prune(&self, keep: &[PathBuf], all: bool) -> Result<(Vec<String>, u64), ImageError> {
        let lock = self.lock(FlockOperation::LockExclusive)?;
        let mut names = Vec::new();
        for record in self.records()?.into_iter().filter(|_| all) {
            if !keep.contains(&self.disk_path(&record.disk)) {
                let path = self.record_path(&record.name);
                fs::remove_file(&path).doing(|| format!("remove {}", path.display()))?;
                names.push(record.name);
            }
        }
        Ok((names, self.sweep(&lock, keep, true)?))
    }

    /// What the store takes.
    ///
    /// # Errors
    /// The host's.
    pub fn usage(&self) -> Result<Usages, ImageError> {
        let needed = self.needed(&self.records()?)?;
        let mut usages = Usages::default();
        for file in self.files()? {
            let of = match file.folder {
                "blobs/sha256" => &mut usages.blobs,
                "disks" => &mut usages.disks,
                _ => &mut usages.unfinished,
            };
            of.count += 1;
            of.bytes += file.bytes;
            of.unused_bytes += if needed.contains(&file.path) {
                0
            } else {
                file.bytes
            };
        }
        Ok(usages)
    }

    // Adding -----------------------------------------------------------------------------------

    /// Holds the store against removals while something is added, and clears away what killed processes have left.
    pub(crate) fn hold(&self) -> Result<Held, ImageError> {
        let held = self.lock(FlockOperation::LockShared)?;
        for file in self.files_in("tmp")? {
            // Whoever makes it holds its lock.
            if let Ok(open) = File::open(&file.path)
                && rustix::fs::flock(&open, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                // Another process may have been faster.
                let _ = fs::remove_file(&file.path);
            }
        }
        Ok(held)
    }

    pub(crate) fn lock(&self, how: FlockOperation) -> Result<Held, ImageError> {
        let path = self.root.join("lock");
        let doing = || format!("lock {}", path.display());
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .doing(doing)?;
        rustix::fs::flock(&file, how).doing(doing)?;
        Ok(Held(file))
    }

    /// A new file in `tmp`, which is gone unless it is kept.
    pub(crate) fn new_file(&self) -> Result<NamedTempFile, ImageError> {
        let folder = self.root.join("tmp");
        let doing = || format!("make a file in {}", folder.display());
        loop {
            let file = NamedTempFile::new_in(&folder).doing(doing)?;
            rustix::fs::flock(&file, FlockOperation::LockExclusive).doing(doing)?;
            // Before it was locked, another process may have taken it for what a killed one left.
            if file.path().exists() {
                return Ok(file);
            }
        }
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("partial").join(digest.hex())
    }

    pub(crate) fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).exists()
    }

    /// Adds content; if its digest is known, it is checked, and nothing done if it is there.
    pub(crate) fn add_blob(
        &self,
        what: &str,
        mut from: impl Read,
        expected: Option<&Digest>,
        progress: &dyn Progress,
    ) -> Result<(Digest, u64), ImageError> {
        if let Some(digest) = expected
            && let Ok(there) = fs::metadata(self.blob_path(digest))
        {
            return Ok((digest.clone(), there.len()));
        }
        let mut file = self.new_file()?;
        let bar = progress.start(&format!("copying {what}"), None);
        let mut buffer = vec![0; 1 << 20];
        let mut hash = Hash::default();
        let mut len = 0;
        let mut write_out = WriteOut::default();
        loop {
            let n = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e).doing(|| format!("read {what}")),
            };
            hash.update(&buffer[..n]);
            file.write_all(&buffer[..n])
                .doing(|| format!("write {} into {}", what, self.root.display()))?;
            len += n as u64;
            write_out.written(file.as_file(), len);
            progress.advance(bar, n as u64);
        }
        progress.done(bar);
        let digest = hash.digest();
        if let Some(expected) = expected
            && *expected != digest
        {
            return Err(ImageError::Digest {
                what: what.into(),
                expected: expected.to_string(),
                found: digest.to_string(),
            });
        }
        self.keep(file, &self.blob_path(&digest))?;
        Ok((digest, len))
    }

    pub(crate) fn add_document(
        &self,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<Descriptor, ImageError> {
        let (digest, size) = self.add_blob("a document", bytes, None, &crate::Quiet)?;
        Ok(Descriptor::new(media_type, digest, size))
    }

    /// Adds the documents of an image with these layers; gives that of its manifest.
    pub(crate) fn add_manifest(
        &self,
        configuration: &Configuration,
        layers: Vec<Descriptor>,
    ) -> Result<Descriptor, ImageError> {
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MANIFEST.into()),
            config: self.add_document(CONFIG, &oci::write(configuration)?)?,
            layers,
        };
        self.add_document(MANIFEST, &oci::write(&manifest)?)
    }

    /// Gives a file that is complete its place.
    pub(crate) fn keep(&self, file: NamedTempFile, to: &Path) -> Result<(), ImageError> {
        let doing = || format!("keep {}", to.display());
        // Else a loss of power could leave the name without the content.
        file.as_file().sync_data().doing(doing)?;
        file.persist(to).map_err(|e| e.error).doing(doing)?;
        Ok(())
    }

    /// A document, checked against its digest.
    pub(crate) fn document(&self, what: &str, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = self.blob_path(digest);
        let file = File::open(&path).doing(|| format!("open {what} {}", path.display()))?;
        let mut file = Hashing::new(file.take(MAX_JSON));
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .doing(|| format!("read {what} {}", path.display()))?;
        let found = file.hash.digest();
        if found != *digest {
            return Err(ImageError::Digest {
                what: format!("{what} {}", path.display()),
                expected: digest.to_string(),
                found: found.to_string(),
            });
        }
        Ok(bytes)
    }

    pub(crate) fn manifest(&self, descriptor: &Descriptor) -> Result<Manifest, ImageError> {
        oci::parse(
            "a manifest",
            &self.document("a manifest", &descriptor.digest)?,
        )
    }

    pub(crate) fn configuration(&self, manifest: &Manifest) -> Result<Configuration, ImageError> {
        oci::parse(
            "a configuration",
            &self.document("a configuration", &manifest.config.digest)?,
        )
    }

    /// Makes the root disk of an image whose content is all here, unless it is there, and gives the image a name.
    pub(crate) fn install(
        &self,
        _held: &Held,
        name: &Reference,
        descriptor: Descriptor,
        limits: &Limits,
        progress: &dyn Progress,
    ) -> Result<Image, ImageError> {
        let manifest = self.manifest(&descriptor)?;
        let diff_ids = self.configuration(&manifest)?.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(ImageError::Format(format!(
                "{name} contradicts itself: {} layers, but {} in its configuration",
                manifest.layers.len(),
                diff_ids.len()
            )));
        }
        let disk = disk_id(&diff_ids);
        let path = self.disk_path(&disk);
        if !path.exists() {
            let layers: Vec<_> = manifest
                .layers
                .iter()
                .zip(diff_ids)
                .map(|(l, id)| (l.digest.clone(), Some(id)))
                .collect();
            let (file, _) = self.make_disk(&layers, limits, progress)?;
            self.keep(file, &path)?;
        }
        self.name(name, descriptor, disk)
    }

    /// Makes a root disk in `tmp`.
    pub(crate) fn make_disk(
        &self,
        layers: &[(Digest, Option<Digest>)],
        limits: &Limits,
        progress: &dyn Progress,
    ) -> Result<(NamedTempFile, Vec<Digest>), ImageError> {
        if layers.len() > MAX_LAYERS {
            return Err(ImageError::Format(format!(
                "it has {} layers, {MAX_LAYERS} are the most",
                layers.len()
            )));
        }
        let sources: Vec<Layer<'_>> = layers
            .iter()
            .map(|(digest, diff_id)| {
                let path = self.blob_path(digest);
                Layer {
                    name: digest.to_string(),
                    diff_id: diff_id.clone(),
                    size_bytes: fs::metadata(&path).map_or(0, |m| m.len()),
                    open: Box::new(move || Ok(Box::new(File::open(&path)?))),
                    kept: None,
                }
            })
            .collect();
        let file = self.new_file()?;
        let handle = file.reopen().doing(|| "open the new root disk".into())?;
        let diff_ids = make_root_disk(&sources, handle, limits, progress)?;
        Ok((file, diff_ids))
    }

    pub(crate) fn disk_path(&self, id: &Digest) -> PathBuf {
        self.root.join("disks").join(format!("{}.erofs", id.hex()))
    }

    pub(crate) fn name(
        &self,
        name: &Reference,
        manifest: Descriptor,
        disk: Digest,
    ) -> Result<Image, ImageError> {
        let record = Record {
            name: name.to_string(),
            manifest: Descriptor::new(&manifest.media_type, manifest.digest, manifest.size),
            disk,
            added: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |d| d.as_secs()),
        };
        let mut file = self.new_file()?;
        let path = self.record_path(&record.name);
        file.write_all(&oci::write(&record)?)
            .doing(|| format!("write {}", path.display()))?;
        self.keep(file, &path)?;
        self.image(&record, &self.records()?)
    }

    // Looking ----------------------------------------------------------------------------------

    fn record_path(&self, name: &str) -> PathBuf {
        let file = format!("{}.json", Digest::of(name.as_bytes()).hex());
        self.root.join("names").join(file)
    }

    fn records(&self) -> Result<Vec<Record>, ImageError> {
        let mut records: Vec<Record> = Vec::new();
        for file in self.files_in("names")? {
            let bytes = match fs::read(&file.path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                bytes => bytes.doing(|| format!("read {}", file.path.display()))?,
            };
            records.push(oci::parse(&file.path.display().to_string(), &bytes)?);
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    fn image(&self, record: &Record, records: &[Record]) -> Result<Image, ImageError> {
        let manifest = self.manifest(&record.manifest)?;
        let configuration = self.configuration(&manifest)?;
        let same = |other: &&Record| other.manifest.digest == record.manifest.digest;
        let root_disk = self.disk_path(&record.disk);
        Ok(Image {
            id: manifest.config.digest,
            names: records
                .iter()
                .filter(same)
                .map(|r| r.name.clone())
                .collect(),
            manifest: record.manifest.digest.clone(),
            platform: Platform {
                architecture: configuration.architecture,
                os: configuration.os,
                variant: configuration.variant,
            },
            created: configuration.created,
            added: record.added,
            config: configuration.config,
            layers_bytes: manifest
                .layers
                .iter()
                .map(|l| l.size)
                .fold(0, u64::saturating_add),
            layers: manifest.layers.into_iter().map(|l| l.digest).collect(),
            diff_ids: configuration.rootfs.diff_ids,
            root_disk_bytes: fs::metadata(&root_disk).map_or(0, |m| m.blocks() * 512),
            root_disk,
        })
    }

    /// Everything that some name needs.
    fn needed(&self, records: &[Record]) -> Result<BTreeSet<PathBuf>, ImageError> {
        let mut needed = BTreeSet::new();
        for record in records {
            let manifest = self.manifest(&record.manifest)?;
            needed.insert(self.disk_path(&record.disk));
            needed.insert(self.blob_path(&record.manifest.digest));
            needed.insert(self.blob_path(&manifest.config.digest));
            needed.extend(manifest.layers.iter().map(|l| self.blob_path(&l.digest)));
        }
        Ok(needed)
    }

    /// Removes what no name needs. Gives the bytes.
    fn sweep(
        &self,
        _exclusive: &Held,
        keep: &[PathBuf],
        unfinished: bool,
    ) -> Result<u64, ImageError> {
        let mut needed = self.needed(&self.records()?)?;
        // What builds have made stays until somebody prunes.
        if !unfinished {
            needed.extend(self.step_layers()?);
        }
        let mut freed = 0;
        for file in self.files()? {
            let is_unfinished = matches!(file.folder, "tmp" | "partial");
            if needed.contains(&file.path)
                || keep.contains(&file.path)
                || is_unfinished && !unfinished
            {
                continue;
            }
            fs::remove_file(&file.path).doing(|| format!("remove {}", file.path.display()))?;
            freed += file.bytes;
        }
        self.forget_steps()?;
        Ok(freed)
    }

    fn files(&self) -> Result<Vec<Found>, ImageError> {
        let folders =
            ["blobs/sha256", "disks", "partial", "tmp"].map(|folder| self.files_in(folder));
        let found: Result<Vec<Vec<Found>>, ImageError> = folders.into_iter().collect();
        Ok(found?.into_iter().flatten().collect())
    }

    pub(crate) fn files_in(&self, folder: &'static str) -> Result<Vec<Found>, ImageError> {
        let path = self.root.join(folder);
        let doing = || format!("look into {}", path.display());
        let mut found = Vec::new();
        for entry in fs::read_dir(&path).doing(doing)? {
            let entry = entry.doing(doing)?;
            // Gone meanwhile: another process is at work.
            if let Ok(metadata) = entry.metadata() {
                found.push(Found {
                    folder,
                    path: entry.path(),
                    bytes: metadata.blocks() * 512,
                });
            }
        }
        Ok(found)
    }
}

pub(crate) struct Found {
    folder: &'static str,
    pub(crate) path: PathBuf,
    bytes: u64,
}

/// By what a root disk is known.
pub(crate) fn disk_id(diff_ids: &[Digest]) -> Digest {
    let ids: Vec<String> = diff_ids.iter().map(ToString::to_string).collect();
    Digest::of(format!("alveole root disk {DISK_FORMAT}\n{}\n", ids.join("\n")).as_bytes())
}
