//! Images in the making: a base, layers over it one after the other, a description, at last a name.
//!
//! A layer of copied files is the same bytes for the same files, and is known by them. What a command does can be known only by what it was
//! done to and how: the store keeps that as a step, by the digest of both.

use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use alveole_erofs::Metadata;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::Progress;
use crate::context::Context;
use crate::digest::{Digest, Hash};
use crate::error::{Doing, ImageError};
use crate::export::archive_of_disk;
use crate::limits::{Limits, MAX_LAYERS};
use crate::look::{Found, Look};
use crate::oci::{self, Configuration, Descriptor, LAYER, MANIFEST, Platform, RunConfig};
use crate::plan::{CopyFiles, plan, write_plan};
use crate::reference::Reference;
use crate::store::{Held, Image, Store, disk_id};
use crate::tarfile::{END, Kind, head};
use crate::tree::clean;

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
        let planned = plan(self.look()?, context, what, found)?;
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
            config: self.config.clone(),
            ..Configuration::of(&self.platform, self.diff_ids())
        };
        let layers = self.layers.iter().map(|made| made.layer.clone()).collect();
        let manifest = self.store.add_manifest(&configuration, layers)?;
        let image = self.store.name(name, manifest, id);
        drop(self.held);
        image
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Quiet;

    /// What a guest sends is taken for a stranger's: too much, no archive, or one that cannot be, ends in an error and leaves no image.
    #[test]
    fn layers_of_strangers_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let limits = Limits {
            entries: 3,
            ..Limits::default()
        };
        let name: Reference = "x".parse().unwrap();
        let draft = || store.draft(limits, None).unwrap();
        let error = draft().receive(io::repeat(0), 1 << 20).unwrap_err();
        assert!(
            error.to_string().contains("more than 1048576 bytes"),
            "{error}"
        );
        let mut lying = draft();
        let received = lying.receive(&[7; 4096][..], 1 << 20).unwrap();
        assert!(
            lying
                .take(received)
                .unwrap_err()
                .to_string()
                .contains("no tar archive")
        );
        let entries = |names: &[&str]| {
            let metadata = Metadata::default();
            let heads = names
                .iter()
                .map(|name| head(name.as_bytes(), &Kind::Fifo, &metadata, 0).unwrap());
            heads.chain([END.to_vec()]).flatten().collect::<Vec<u8>>()
        };
        let mut many = draft();
        let received = many
            .receive(&entries(&["a", "b", "c", "d"])[..], 1 << 20)
            .unwrap();
        many.take(received).unwrap();
        let error = many.finish(&name, &Quiet).unwrap_err();
        assert!(error.to_string().contains("--max-entries"), "{error}");
        let mut good = draft();
        let received = good
            .receive(&entries(&["../../a", "b"])[..], 1 << 20)
            .unwrap();
        good.take(received).unwrap();
        assert_eq!(store.images().unwrap().len(), 0);
        good.finish(&name, &Quiet).unwrap();
        assert_eq!(store.images().unwrap().len(), 1);
        assert_eq!(fs::read_dir(folder.path().join("tmp")).unwrap().count(), 0);
    }
}
