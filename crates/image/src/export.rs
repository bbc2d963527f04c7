//! Images as files for others: OCI layouts, docker archives, root file systems.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use alveole_erofs::{Info, Kind as FileKind, Metadata};

use crate::digest::Digest;
use crate::error::{Doing, ImageError};
use crate::oci::{self, CONTAINERD_NAME, Descriptor, Index, MANIFEST, REF_NAME};
use crate::reference::Reference;
use crate::store::{Image, Store};
use crate::tarfile::{END, Kind, head, padding};

/// What an image is written as; each is a tar stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An OCI layout: for `skopeo`, `podman`, containerd.
    Oci,
    /// What `docker load` takes.
    Docker,
    /// The files of its root.
    RootFs,
}

impl Store {
    /// Writes an image. The same image gives the same bytes.
    ///
    /// # Errors
    /// No such image, a damaged store, or the host's.
    pub fn export(&self, text: &str, format: Format, to: &mut dyn Write) -> Result<(), ImageError> {
        let held = self.hold()?;
        let image = self.resolve(text)?;
        let mut out = Out { to };
        match format {
            Format::Oci => self.layout(&image, text, &mut out)?,
            Format::Docker => self.docker(&image, text, &mut out)?,
            Format::RootFs => root_fs(&image.root_disk, &mut out)?,
        }
        drop(held);
        out.write(&END)?;
        out.to.flush().doing(|| "write the archive".into())
    }

    fn layout(&self, image: &Image, text: &str, out: &mut Out<'_>) -> Result<(), ImageError> {
        let document = self.document("a manifest", &image.manifest)?;
        let mut descriptor =
            Descriptor::new(MANIFEST, image.manifest.clone(), document.len() as u64);
        let manifest: oci::Manifest = oci::parse("a manifest", &document)?;
        if let Some(media_type) = manifest.media_type {
            descriptor.media_type = media_type;
        }
        let name = names_for(&image.names, text).first().cloned();
        if let Some(name) = name {
            let tag = name.parse::<Reference>()?.version();
            descriptor.annotations.insert(CONTAINERD_NAME.into(), name);
            descriptor.annotations.insert(REF_NAME.into(), tag);
        }
        let index = Index {
            schema_version: 2,
            media_type: Some(oci::INDEX.into()),
            manifests: vec![descriptor],
        };
        out.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        out.file("index.json", &oci::write(&index)?)?;
        let blobs: BTreeSet<&Digest> = image
            .layers
            .iter()
            .chain([&image.manifest, &image.id])
            .collect();
        for digest in blobs {
            self.blob(digest, &format!("blobs/sha256/{}", digest.hex()), out)?;
        }
        Ok(())
    }

    fn docker(&self, image: &Image, text: &str, out: &mut Out<'_>) -> Result<(), ImageError> {
        let layer = |digest: &Digest| format!("{}.tar", digest.hex());
        let names = names_for(&image.names, text);
        let tags = names
            .iter()
            .filter_map(|name| name.parse::<Reference>().ok());
        let saved = serde_json::json!([{
            "Config": format!("{}.json", image.id.hex()),
            "RepoTags": tags.filter(|n| n.digest().is_none()).map(|n| n.familiar()).collect::<Vec<_>>(),
            "Layers": image.layers.iter().map(layer).collect::<Vec<_>>(),
        }]);
        self.blob(&image.id, &format!("{}.json", image.id.hex()), out)?;
        for digest in image.layers.iter().collect::<BTreeSet<_>>() {
            self.blob(digest, &layer(digest), out)?;
        }
        out.file("manifest.json", &oci::write(&saved)?)
    }

    fn blob(&self, digest: &Digest, path: &str, out: &mut Out<'_>) -> Result<(), ImageError> {
        let from = self.blob_path(digest);
        let doing = || format!("read {}", from.display());
        let mut file = File::open(&from).doing(doing)?;
        let size = file.metadata().doing(doing)?.len();
        out.head(path.as_bytes(), &Kind::File, &plain(), size)?;
        io::copy(&mut file, out.to).doing(|| "write the archive".into())?;
        out.write(padding(size))
    }
}

/// The name that was asked for, or all of them if that was an id.
fn names_for<'a>(names: &'a [String], text: &str) -> &'a [String] {
    let asked = text.parse::<Reference>().ok().map(|name| name.to_string());
    let found = names.iter().position(|name| Some(name) == asked.as_ref());
    found.map_or(names, |at| &names[at..=at])
}

struct Out<'a> {
    to: &'a mut dyn Write,
}

impl Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.to
            .write_all(bytes)
            .doing(|| "write the archive".into())
    }

    fn head(
        &mut self,
        path: &[u8],
        kind: &Kind,
        metadata: &Metadata,
        size: u64,
    ) -> Result<(), ImageError> {
        let head = head(path, kind, metadata, size).doing(|| "write the archive".into())?;
        self.write(&head)
    }

    fn file(&mut self, path: &str, bytes: &[u8]) -> Result<(), ImageError> {
        self.head(path.as_bytes(), &Kind::File, &plain(), bytes.len() as u64)?;
        self.write(bytes)?;
        self.write(padding(bytes.len() as u64))
    }
}

fn plain() -> Metadata {
    Metadata {
        mode: 0o644,
        ..Metadata::default()
    }
}

/// Writes the files of a root disk as a whole archive.
pub(crate) fn archive_of_disk(path: &Path, to: &mut dyn Write) -> Result<(), ImageError> {
    let mut out = Out { to };
    root_fs(path, &mut out)?;
    out.write(&END)?;
    out.to.flush().doing(|| "write the archive".into())
}

fn root_fs(path: &Path, out: &mut Out<'_>) -> Result<(), ImageError> {
    let file = File::open(path).doing(|| format!("open {}", path.display()))?;
    let wrong = |source| ImageError::ReadDisk {
        path: path.into(),
        source,
    };
    let disk = alveole_erofs::Image::open(file).map_err(wrong)?;
    let mut links: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut left = vec![(Vec::new(), disk.root())];
    while let Some((path, nid)) = left.pop() {
        let info = disk.info(nid).map_err(wrong)?;
        if info.kind == FileKind::Directory {
            for entry in disk.entries(&info).map_err(wrong)?.into_iter().rev() {
                let path = if path.is_empty() {
                    entry.name
                } else {
                    [&path[..], b"/", &entry.name].concat()
                };
                left.push((path, entry.nid));
            }
        } else if info.links > 1 {
            if let Some(first) = links.get(&nid) {
                out.head(&path, &Kind::HardLink(first.clone()), &info.metadata, 0)?;
                continue;
            }
            links.insert(nid, path.clone());
        }
        let path = if path.is_empty() { b".".to_vec() } else { path };
        one(&disk, &info, &path, out, &wrong)?;
    }
    Ok(())
}

fn one(
    disk: &alveole_erofs::Image,
    info: &Info,
    path: &[u8],
    out: &mut Out<'_>,
    wrong: &impl Fn(alveole_erofs::ReadError) -> ImageError,
) -> Result<(), ImageError> {
    let (major, minor) = info.device;
    let kind = match info.kind {
        FileKind::File => Kind::File,
        FileKind::Directory => Kind::Directory,
        FileKind::Symlink => Kind::Symlink(disk.target(info).map_err(wrong)?),
        FileKind::CharDevice => Kind::CharDevice(major, minor),
        FileKind::BlockDevice => Kind::BlockDevice(major, minor),
        FileKind::Fifo => Kind::Fifo,
        FileKind::Socket => return Ok(()),
    };
    if kind != Kind::File {
        return out.head(path, &kind, &info.metadata, 0);
    }
    out.head(path, &kind, &info.metadata, info.size_bytes)?;
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < info.size_bytes {
        let part = (info.size_bytes - at).min(buffer.len() as u64) as usize;
        disk.read_at(info, at, &mut buffer[..part]).map_err(wrong)?;
        out.write(&buffer[..part])?;
        at += part as u64;
    }
    out.write(padding(info.size_bytes))
}
