//! Images from files: OCI layouts and docker archives (tar, packed or not, or a folder), and root file systems (tar or a folder).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use tempfile::NamedTempFile;

use crate::Progress;
use crate::digest::Digest;
use crate::error::{Doing, ImageError};
use crate::layers::{Layer, make_root_disk};
use crate::limits::{Limits, MAX_JSON};
use crate::oci::{
    self, CONFIG, CONTAINERD_NAME, Configuration, Descriptor, Index, LAYER, MANIFEST, Manifest,
    Platform, REF_NAME,
};
use crate::reference::Reference;
use crate::store::{Held, Image, Store, disk_id};
use crate::tarfile::{Kind, Tar};
use crate::tree::clean;
use crate::unpack::{Packing, unpacked};

/// Files in an archive of images: some layers, and three for each image.
const MAX_MEMBERS: usize = 100_000;
/// Hops of links within an archive.
const MAX_LINKS: usize = 8;

/// What is imported, and how.
#[derive(Debug, Clone)]
pub struct Import {
    /// Name for the image; needed where the archive has none.
    pub name: Option<Reference>,
    /// Platform that is taken where there are several.
    pub platform: Platform,
    /// What it may cost.
    pub limits: Limits,
}

impl Store {
    /// Imports what lies at a path.
    ///
    /// # Errors
    /// What is no image, damaged or beyond a limit; a missing name; the host's.
    pub fn import(
        &self,
        from: &Path,
        how: &Import,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, ImageError> {
        let held = self.hold()?;
        let importing = Importing {
            store: self,
            held: &held,
            how,
            progress,
        };
        let doing = || format!("open {}", from.display());
        if fs::metadata(from).doing(doing)?.is_dir() {
            return importing.folder(from);
        }
        let file = File::open(from).doing(doing)?;
        if file.metadata().doing(doing)?.is_file() {
            importing.file(&from.display().to_string(), file)
        } else {
            importing.stream(&from.display().to_string(), file)
        }
    }

    /// Imports what a stream brings.
    ///
    /// # Errors
    /// As [`import`](Self::import).
    pub fn import_stream(
        &self,
        from: impl Read,
        how: &Import,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>, ImageError> {
        let held = self.hold()?;
        Importing {
            store: self,
            held: &held,
            how,
            progress,
        }
        .stream("the standard input", from)
    }

    /// Keeps a layer that is not packed, and makes the root disk of it alone: in one pass, which reads and hashes each byte
    /// once. Gives the layer's digest and length, and the disk in `tmp`.
    fn add_layer_and_disk(
        &self,
        what: &str,
        from: &File,
        limits: &Limits,
        progress: &dyn Progress,
    ) -> Result<(Digest, u64, NamedTempFile), ImageError> {
        let reading = || format!("read {what}");
        let blob = self.new_file()?;
        let disk = self.new_file()?;
        let layer = Layer {
            name: what.to_owned(),
            diff_id: None,
            size_bytes: from.metadata().doing(reading)?.len(),
            open: Box::new(|| {
                let mut from = from.try_clone()?;
                from.rewind()?;
                Ok(Box::new(from))
            }),
            kept: Some(blob.reopen().doing(|| "open the new layer".into())?),
        };
        let handle = disk.reopen().doing(|| "open the new root disk".into())?;
        let digests = make_root_disk(&[layer], handle, limits, progress)?;
        let [digest] = <[Digest; 1]>::try_from(digests)
            .map_err(|_| ImageError::Format(format!("{what} changed while it was read")))?;
        let len = blob.as_file().metadata().doing(reading)?.len();
        // The host writes both out at once. It tells a failure to whoever asks first, so each answer counts.
        let (kept, synced) = std::thread::scope(|scope| {
            let syncing = scope.spawn(|| disk.as_file().sync_data());
            (self.keep(blob, &self.blob_path(&digest)), syncing.join())
        });
        kept?;
        let synced = synced.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
        synced.doing(|| format!("write {}", disk.path().display()))?;
        Ok((digest, len, disk))
    }
}

struct Importing<'a> {
    store: &'a Store,
    held: &'a Held,
    how: &'a Import,
    progress: &'a dyn Progress,
}

/// An entry of docker's `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Importing<'_> {
    fn folder(&self, path: &Path) -> Result<Vec<Image>, ImageError> {
        let files = Files::Folder(path.to_owned());
        if path.join("oci-layout").exists() {
            return self.layout(&files);
        }
        if path.join("manifest.json").exists() && !path.join("etc").exists() {
            return self.docker(&files);
        }
        let name = self.wanted_name(&path.display().to_string())?;
        let mut file = self.store.new_file()?;
        crate::folder::write_tar(path, file.as_file_mut())?;
        let reopened = file.reopen().doing(|| "open a new layer".into())?;
        self.root_fs(&path.display().to_string(), reopened, &name)
    }

    /// Something that cannot be read twice: it is kept first, as a layer if it is one.
    fn stream(&self, what: &str, mut from: impl Read) -> Result<Vec<Image>, ImageError> {
        let mut file = self.store.new_file()?;
        io::copy(&mut from, file.as_file_mut())
            .doing(|| format!("copy {what} into {}", self.store.path().display()))?;
        let reopened = file.reopen().doing(|| format!("read {what} again"))?;
        self.file(what, reopened)
    }

    fn file(&self, what: &str, mut file: File) -> Result<Vec<Image>, ImageError> {
        let doing = || format!("read {what}");
        let (packing, input) = unpacked(&file, &self.how.limits).doing(doing)?;
        let first = Tar::new(input).next_entry().map_err(|e| {
            ImageError::Format(format!(
                "{what} is no image: {e}; OCI layouts, docker archives and tar files of a root are"
            ))
        })?;
        let Some(first) = first else {
            return Err(ImageError::Format(format!(
                "{what} is no image: it is empty"
            )));
        };
        file.rewind().doing(doing)?;
        if !is_of_an_archive(&clean(&first.path)) {
            let name = self.wanted_name(what)?;
            return self.root_fs(what, file, &name);
        }
        let file = if packing == Packing::Plain {
            file
        } else {
            self.plain(what, &file)?
        };
        let files = Files::Archive {
            members: members(what, &file)?,
            file,
        };
        if files.has("manifest.json") && !files.has("oci-layout") {
            return self.docker(&files);
        }
        // What docker saves since version 25 is both; its names are complete only in its own manifest.
        let named = files.has("manifest.json") && self.docker_names(&files).is_ok_and(|n| n > 0);
        if named {
            self.docker(&files)
        } else {
            self.layout(&files)
        }
    }

    /// An archive unpacked: its parts are looked for by their places.
    fn plain(&self, what: &str, packed: &File) -> Result<File, ImageError> {
        let mut plain = self.store.new_file()?;
        let (_, mut input) = unpacked(packed, &self.how.limits).doing(|| format!("read {what}"))?;
        io::copy(&mut input, plain.as_file_mut())
            .doing(|| format!("unpack {what} into {}", self.store.path().display()))?;
        plain.reopen().doing(|| format!("read {what}"))
    }

    fn wanted_name(&self, what: &str) -> Result<Reference, ImageError> {
        let missing = || {
            ImageError::Format(format!(
                "{what} does not say what the image is called: name it, `alveole image import FILE NAME`"
            ))
        };
        self.how.name.clone().ok_or_else(missing)
    }

    // A root file system -----------------------------------------------------------------------

    fn root_fs(&self, what: &str, file: File, name: &Reference) -> Result<Vec<Image>, ImageError> {
        let mut start = [0; 4];
        let mut file = file;
        let n = file.read(&mut start).doing(|| format!("read {what}"))?;
        file.rewind().doing(|| format!("read {what}"))?;
        let media_type = match Packing::of(&start[..n]) {
            Packing::Plain => LAYER.to_owned(),
            Packing::Gzip => format!("{LAYER}+gzip"),
            Packing::Zstd => format!("{LAYER}+zstd"),
        };
        let limits = &self.how.limits;
        let (digest, size, disk, diff_ids) = if media_type == LAYER {
            let (digest, size, disk) =
                self.store
                    .add_layer_and_disk(what, &file, limits, self.progress)?;
            (digest.clone(), size, disk, vec![digest])
        } else {
            let (digest, size) = self.store.add_blob(what, file, None, self.progress)?;
            let layers = [(digest.clone(), None)];
            let (disk, diff_ids) = self.store.make_disk(&layers, limits, self.progress)?;
            (digest, size, disk, diff_ids)
        };
        let id = disk_id(&diff_ids);
        let path = self.store.disk_path(&id);
        if !path.exists() {
            self.store.keep(disk, &path)?;
        }
        let manifest = self.store.add_manifest(
            &Configuration::of(&self.how.platform, diff_ids),
            vec![Descriptor::new(&media_type, digest, size)],
        )?;
        Ok(vec![self.store.name(name, manifest, id)?])
    }

    // OCI layouts ------------------------------------------------------------------------------

    fn layout(&self, files: &Files) -> Result<Vec<Image>, ImageError> {
        let index: Index = oci::parse("index.json", &files.document("index.json")?)?;
        if index.manifests.is_empty() {
            return Err(ImageError::Format(
                "the layout has no image: its index is empty".into(),
            ));
        }
        let named = index
            .manifests
            .iter()
            .filter(|d| name_of(d).is_some())
            .count();
        if self.how.name.is_some() && named > 1 {
            let names: Vec<&str> = index.manifests.iter().filter_map(name_of).collect();
            return Err(ImageError::Format(format!(
                "the layout has several images ({}): import it without a name, or one of them alone",
                names.join(", ")
            )));
        }
        if named <= 1 {
            // One image, maybe for several platforms.
            let descriptor = match &index.manifests[..] {
                [only] => only,
                _ => index.choose("the layout", &self.how.platform)?,
            };
            let name = match (&self.how.name, name_of(descriptor)) {
                (Some(name), _) => name.clone(),
                (None, Some(name)) if name.contains(['/', ':']) => name.parse()?,
                // A tag alone is no name.
                (None, _) => self.wanted_name("the layout")?,
            };
            return Ok(vec![self.take(files, descriptor, &name)?]);
        }
        let mut images = Vec::new();
        for descriptor in &index.manifests {
            if let Some(name) = name_of(descriptor) {
                images.push(self.take(files, descriptor, &name.parse()?)?);
            }
        }
        Ok(images)
    }

    fn take(
        &self,
        files: &Files,
        descriptor: &Descriptor,
        name: &Reference,
    ) -> Result<Image, ImageError> {
        let blob = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
        let mut descriptor = descriptor.clone();
        // An index in an index, and no deeper.
        for _ in 0..2 {
            if descriptor.is_index() {
                let index: Index =
                    oci::parse("an index", &files.document(&blob(&descriptor.digest))?)?;
                descriptor = index.choose(&name.familiar(), &self.how.platform)?.clone();
            }
        }
        if !descriptor.is_manifest() {
            return Err(ImageError::Format(format!(
                "{} is no image: it is of the type {:?}",
                name.familiar(),
                descriptor.media_type
            )));
        }
        let add = |what: &str, digest: &Digest| {
            let from = files.open(&blob(digest))?;
            self.store.add_blob(
                &format!("{what} {digest}"),
                from,
                Some(digest),
                self.progress,
            )
        };
        add("manifest", &descriptor.digest)?;
        let manifest = self.store.manifest(&descriptor)?;
        add("configuration", &manifest.config.digest)?;
        let configuration = self.store.configuration(&manifest)?;
        check_platform(name, &configuration, &self.how.platform)?;
        for layer in &manifest.layers {
            layer.check_layer()?;
            add("layer", &layer.digest)?;
        }
        self.store
            .install(self.held, name, descriptor, &self.how.limits, self.progress)
    }

    // Docker archives --------------------------------------------------------------------------

    fn docker_names(&self, files: &Files) -> Result<usize, ImageError> {
        let saved: Vec<Saved> = oci::parse("manifest.json", &files.document("manifest.json")?)?;
        Ok(saved
            .iter()
            .map(|s| s.repo_tags.as_ref().map_or(0, Vec::len))
            .sum())
    }

    fn docker(&self, files: &Files) -> Result<Vec<Image>, ImageError> {
        let saved: Vec<Saved> = oci::parse("manifest.json", &files.document("manifest.json")?)?;
        if self.how.name.is_some() && saved.len() > 1 {
            let names: Vec<String> = saved
                .iter()
                .flat_map(|s| s.repo_tags.clone().unwrap_or_default())
                .collect();
            return Err(ImageError::Format(format!(
                "the archive has several images ({}): import it without a name",
                names.join(", ")
            )));
        }
        let mut images = Vec::new();
        for image in saved {
            let names: Vec<Reference> = match &self.how.name {
                Some(name) => vec![name.clone()],
                None => image
                    .repo_tags
                    .iter()
                    .flatten()
                    .map(|tag| tag.parse())
                    .collect::<Result<_, _>>()?,
            };
            let names = if names.is_empty() {
                vec![self.wanted_name("the archive")?]
            } else {
                names
            };
            let config = self
                .store
                .add_document(CONFIG, &files.document(&image.config)?)?;
            let mut layers = Vec::new();
            for path in &image.layers {
                let (digest, size) = self.store.add_blob(
                    &format!("layer {path}"),
                    files.open(path)?,
                    None,
                    self.progress,
                )?;
                let mut start = [0; 4];
                let mut file = File::open(self.store.blob_path(&digest))
                    .doing(|| format!("open layer {path}"))?;
                let n = file
                    .read(&mut start)
                    .doing(|| format!("read layer {path}"))?;
                let media_type = match Packing::of(&start[..n]) {
                    Packing::Plain => LAYER.to_owned(),
                    Packing::Gzip => format!("{LAYER}+gzip"),
                    Packing::Zstd => format!("{LAYER}+zstd"),
                };
                layers.push(Descriptor::new(&media_type, digest, size));
            }
            let manifest = Manifest {
                schema_version: 2,
                media_type: Some(MANIFEST.into()),
                config,
                layers,
            };
            check_platform(
                &names[0],
                &self.store.configuration(&manifest)?,
                &self.how.platform,
            )?;
            let descriptor = self.store.add_document(MANIFEST, &oci::write(&manifest)?)?;
            for name in &names {
                images.push(self.store.install(
                    self.held,
                    name,
                    descriptor.clone(),
                    &self.how.limits,
                    self.progress,
                )?);
            }
        }
        if images.is_empty() {
            return Err(ImageError::Format(
                "the archive has no image: its manifest.json is empty".into(),
            ));
        }
        Ok(images)
    }
}

/// Refuses programs for another machine.
pub(crate) fn check_platform(
    name: &Reference,
    configuration: &Configuration,
    wanted: &Platform,
) -> Result<(), ImageError> {
    let is = Platform {
        architecture: configuration.architecture.clone(),
        os: configuration.os.clone(),
        variant: configuration.variant.clone(),
    };
    // Old images say nothing.
    let says_nothing = is.architecture.is_empty() && is.os.is_empty();
    if says_nothing || is.serves(wanted) {
        return Ok(());
    }
    Err(ImageError::Platform {
        name: name.familiar(),
        wanted: wanted.to_string(),
        available: is.to_string(),
    })
}

fn name_of(descriptor: &Descriptor) -> Option<&str> {
    let name = |key: &str| descriptor.annotations.get(key).map(String::as_str);
    name(CONTAINERD_NAME).or_else(|| name(REF_NAME))
}

/// How archives of images begin; a root has none of these.
fn is_of_an_archive(first: &[u8]) -> bool {
    let first = first.split(|b| *b == b'/').next().unwrap_or_default();
    let stem = first
        .strip_suffix(b".json")
        .or_else(|| first.strip_suffix(b".tar"))
        .unwrap_or(first);
    matches!(
        first,
        b"blobs" | b"oci-layout" | b"index.json" | b"manifest.json" | b"repositories"
    ) || stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit)
}

/// The files of a layout or archive.
enum Files {
    Folder(PathBuf),
    Archive {
        file: File,
        members: BTreeMap<Box<[u8]>, Member>,
    },
}

enum Member {
    /// Offset and size.
    At(u64, u64),
    /// The same as another one.
    Link(Box<[u8]>),
}

impl Files {
    fn has(&self, path: &str) -> bool {
        match self {
            Self::Folder(root) => root.join(path).exists(),
            Self::Archive { members, .. } => members.contains_key(path.as_bytes()),
        }
    }

    fn open(&self, path: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        match self {
            Self::Folder(root) => {
                let relative = Path::new(path);
                if !relative
                    .components()
                    .all(|c| matches!(c, Component::Normal(_)))
                {
                    return Err(ImageError::Format(format!(
                        "{path:?} leads out of the image's folder"
                    )));
                }
                let path = root.join(relative);
                let file = File::open(&path).doing(|| format!("open {}", path.display()))?;
                Ok(Box::new(file))
            }
            Self::Archive { file, members } => {
                let mut at = clean(path.as_bytes());
                for _ in 0..MAX_LINKS {
                    match members.get(&at) {
                        Some(Member::Link(to)) => at.clone_from(to),
                        Some(Member::At(offset, size)) => {
                            let mut file = file.try_clone().doing(|| format!("read {path}"))?;
                            file.seek(SeekFrom::Start(*offset))
                                .doing(|| format!("read {path}"))?;
                            return Ok(Box::new(file.take(*size)));
                        }
                        None => break,
                    }
                }
                Err(ImageError::Format(format!(
                    "the archive is incomplete: {path} is not in it"
                )))
            }
        }
    }

    fn document(&self, path: &str) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let mut file = self.open(path)?.take(MAX_JSON + 1);
        file.read_to_end(&mut bytes)
            .doing(|| format!("read {path}"))?;
        if bytes.len() as u64 > MAX_JSON {
            return Err(ImageError::Format(format!(
                "{path} has more than {MAX_JSON} bytes"
            )));
        }
        Ok(bytes)
    }
}

/// Where the files of an archive lie.
fn members(what: &str, file: &File) -> Result<BTreeMap<Box<[u8]>, Member>, ImageError> {
    let wrong = |e: io::Error| ImageError::Format(format!("{what} cannot be read: {e}"));
    let mut members = BTreeMap::new();
    let mut tar = Tar::new(file);
    while let Some(entry) = tar.next_entry().map_err(wrong)? {
        let path = clean(&entry.path);
        let member = match &entry.kind {
            Kind::File => Member::At(tar.position().map_err(wrong)?, entry.size_bytes),
            Kind::HardLink(target) => Member::Link(clean(target)),
            Kind::Symlink(target) => {
                let folder = path
                    .iter()
                    .rposition(|b| *b == b'/')
                    .map_or(&[][..], |at| &path[..at]);
                Member::Link(clean(&[folder, b"/", target].concat()))
            }
            _ => continue,
        };
        members.insert(path, member);
        if members.len() > MAX_MEMBERS {
            return Err(ImageError::Format(format!(
                "{what} has more than {MAX_MEMBERS} files: it is no archive of images"
            )));
        }
        tar.pass_over().map_err(wrong)?;
    }
    Ok(members)
}
