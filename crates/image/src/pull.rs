//! Images from registries: what is missing is downloaded, two layers at a time, and can be resumed.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use rustix::fs::FlockOperation;

use crate::Progress;
use crate::digest::Hash;
use crate::error::{Doing, ImageError};
use crate::import::{Import, check_platform};
use crate::limits::{MAX_JSON, MAX_LAYERS};
use crate::oci::{self, Descriptor, Index};
use crate::reference::Reference;
use crate::registry::Registry;
use crate::store::{Image, Store};

/// Layers that are downloaded at once.
const AT_ONCE: usize = 2;
/// How often a download that breaks off is taken up again.
const TRIES: u32 = 5;

impl Store {
    /// Gets an image from its registry. What is here already is not asked for again; what was begun is resumed; who else gets the same
    /// blob at the same time is waited for.
    ///
    /// # Errors
    /// The registry's words, damaged content, a limit, no variant for the platform, the host's.
    pub fn pull(
        &self,
        name: &Reference,
        how: &Import,
        progress: &dyn Progress,
    ) -> Result<Image, ImageError> {
        let held = self.hold()?;
        let registry = Registry::of(name)?;
        let (mut descriptor, mut bytes) = registry.manifest(&name.version())?;
        // An index in an index, and no deeper.
        for _ in 0..2 {
            if descriptor.is_index() {
                let index: Index = oci::parse("an index", &bytes)?;
                let chosen = index.choose(&name.familiar(), &how.platform)?;
                (descriptor, bytes) = registry.manifest(&chosen.digest.to_string())?;
            }
        }
        if !descriptor.is_manifest() {
            return Err(registry.refused(&name.familiar(), "its indexes lead to further indexes"));
        }
        self.add_blob(
            "a manifest",
            &bytes[..],
            Some(&descriptor.digest),
            &crate::Quiet,
        )?;
        let manifest = self.manifest(&descriptor)?;
        if manifest.layers.len() > MAX_LAYERS {
            return Err(ImageError::Format(format!(
                "{name} has {} layers, {MAX_LAYERS} are the most",
                manifest.layers.len()
            )));
        }
        if manifest.config.size > MAX_JSON {
            return Err(ImageError::Format(format!(
                "{name} has a configuration of {} bytes, {MAX_JSON} are the most",
                manifest.config.size
            )));
        }
        manifest
            .layers
            .iter()
            .try_for_each(Descriptor::check_layer)?;
        self.download(&registry, &manifest.config, &crate::Quiet)?;
        let configuration = self.configuration(&manifest)?;
        check_platform(name, &configuration, &how.platform)?;
        self.download_all(&registry, &manifest.layers, progress)?;
        self.install(&held, name, descriptor, &how.limits, progress)
    }

    fn download_all(
        &self,
        registry: &Registry,
        layers: &[Descriptor],
        progress: &dyn Progress,
    ) -> Result<(), ImageError> {
        let left = Mutex::new(layers.iter());
        let failed = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(layers.len()) {
                scope.spawn(|| {
                    loop {
                        let next = left.lock().unwrap_or_else(PoisonError::into_inner).next();
                        let is_over = failed
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .is_some();
                        let (Some(layer), false) = (next, is_over) else {
                            return;
                        };
                        if let Err(error) = self.download(registry, layer, progress) {
                            failed
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .get_or_insert(error);
                        }
                    }
                });
            }
        });
        failed
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    /// Gets one blob, unless it is here.
    fn download(
        &self,
        registry: &Registry,
        blob: &Descriptor,
        progress: &dyn Progress,
    ) -> Result<(), ImageError> {
        let path = self.partial_path(&blob.digest);
        let doing = || format!("write {}", path.display());
        let mut file = loop {
            if self.has_blob(&blob.digest) {
                return Ok(());
            }
            let file = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
                .doing(doing)?;
            // Whoever downloads the same is waited for.
            rustix::fs::flock(&file, FlockOperation::LockExclusive).doing(doing)?;
            let is_same = fs::metadata(&path)
                .is_ok_and(|there| file.metadata().is_ok_and(|m| m.ino() == there.ino()));
            if is_same && !self.has_blob(&blob.digest) {
                break file;
            }
        };
        let bar = progress.start(&format!("pulling {}", blob.digest), Some(blob.size));
        let done = self.fill(registry, blob, &mut file, &|n| progress.advance(bar, n));
        progress.done(bar);
        let hash = match done {
            Ok(hash) => hash,
            Err(error) => {
                // A disk that is full must not stay so; anything else can be taken up again.
                if let ImageError::Io { source, .. } = &error
                    && matches!(
                        source.kind(),
                        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                    )
                {
                    let _ = fs::remove_file(&path);
                }
                return Err(error);
            }
        };
        let found = hash.digest();
        if found != blob.digest {
            // Resuming it would give the same again.
            let _ = fs::remove_file(&path);
            return Err(ImageError::Digest {
                what: format!("a blob from {}", registry.name()),
                expected: blob.digest.to_string(),
                found: found.to_string(),
            });
        }
        file.sync_data().doing(doing)?;
        fs::rename(&path, self.blob_path(&blob.digest)).doing(doing)
    }

    /// Fills a file with a blob, from where it ends; gives the hash of all of it.
    fn fill(
        &self,
        registry: &Registry,
        blob: &Descriptor,
        file: &mut File,
        advance: &dyn Fn(u64),
    ) -> Result<Hash, ImageError> {
        let mut tries = 0;
        loop {
            let (mut hash, mut have) = hash_of(file, blob.size)
                .doing(|| format!("read what is here of {}", blob.digest))?;
            if have == blob.size {
                return Ok(hash);
            }
            let (resumed, mut body) = registry.blob(&blob.digest, have)?;
            if !resumed {
                (hash, have) = (Hash::default(), 0);
                file.set_len(0)
                    .and_then(|()| file.rewind())
                    .doing(|| "begin a download anew".into())?;
            }
            advance(have);
            let mut buffer = vec![0; 256 << 10];
            let broken = loop {
                let n = match body.read(&mut buffer) {
                    Ok(0) if have < blob.size => break "it ended early".to_owned(),
                    Ok(0) => return Ok(hash),
                    Ok(n) => n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(e) => break e.to_string(),
                };
                have += n as u64;
                if have > blob.size {
                    return Err(registry.refused(
                        &blob.digest.to_string(),
                        &format!(
                            "it gives more than the {} bytes that it had announced",
                            blob.size
                        ),
                    ));
                }
                hash.update(&buffer[..n]);
                file.write_all(&buffer[..n])
                    .doing(|| format!("write a download into {}", self.path().display()))?;
                advance(n as u64);
            };
            tries += 1;
            if tries == TRIES {
                let why = format!(
                    "the download broke off {TRIES} times ({broken}); the next pull goes on where it ended"
                );
                return Err(registry.refused(&blob.digest.to_string(), &why));
            }
            std::thread::sleep(Duration::from_millis(200 << tries));
        }
    }
}

/// The hash and length of what a file has, at most `most` bytes; writing goes on behind it.
fn hash_of(file: &mut File, most: u64) -> io::Result<(Hash, u64)> {
    if file.metadata()?.len() > most {
        file.set_len(0)?;
    }
    file.rewind()?;
    let mut hash = Hash::default();
    let mut len = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        len += n as u64;
    }
    file.seek(SeekFrom::Start(len))?;
    Ok((hash, len))
}
