//! `alveole snapshot pack`, `unpack`: a snapshot whose memory is compressed.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use alveole_instance::{MEMORY, PACKED, Snapshot};
use alveole_page_server::{Memory, PackedMemory, SavedMemory, Sizes};
use anyhow::{Context, bail};

use crate::memory::{pack_file, unpack_file};

/// Packs a snapshot's memory, in a folder that takes the place of the snapshot's; nothing: it is packed already.
pub(crate) fn pack(snapshot: &Snapshot) -> anyhow::Result<Option<Sizes>> {
    if snapshot.is_packed() {
        return Ok(None);
    }
    let saved = saved(snapshot)?;
    if saved.layers.len() > 1 {
        bail!(
            "the snapshot '{}' has what changed since another one: make one of them first (alveole snapshot flatten {})",
            snapshot.name,
            snapshot.name
        );
    }
    let mut sizes = None;
    exchange(snapshot, MEMORY, |folder| {
        let packed = folder.join(PACKED);
        sizes = Some(pack_file(&snapshot.at(MEMORY), &packed)?);
        belongs(&saved, &packed)
    })?;
    Ok(sizes)
}

/// Unpacks a snapshot's memory again; false: it is not packed.
pub(crate) fn unpack(snapshot: &Snapshot) -> anyhow::Result<bool> {
    if !snapshot.is_packed() {
        return Ok(false);
    }
    let saved = saved(snapshot)?;
    exchange(snapshot, PACKED, |folder| {
        let plain = folder.join(MEMORY);
        unpack_file(&snapshot.at(PACKED), &plain)?;
        belongs(&saved, &plain)
    })?;
    Ok(true)
}

fn saved(snapshot: &Snapshot) -> anyhow::Result<SavedMemory> {
    Ok(SavedMemory::of_state(&snapshot.at("state"))?)
}

fn belongs(saved: &SavedMemory, memory: &Path) -> anyhow::Result<()> {
    let act = || format!("cannot use '{}'", memory.display());
    let mut memory = Memory::open(File::open(memory).with_context(act)?, 0).with_context(act)?;
    saved.check(&mut memory).with_context(act)
}

/// Has `make` make another form of the file `old`; all others stay.
fn exchange(
    snapshot: &Snapshot,
    old: &str,
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    snapshot.replace(|folder| {
        make(folder)?;
        let act = || format!("cannot read the folder '{}'", snapshot.folder().display());
        for entry in fs::read_dir(snapshot.folder()).with_context(act)? {
            let name = entry.with_context(act)?.file_name();
            if name == old || name == "snapshot.json" {
                continue;
            }
            let (from, to) = (snapshot.folder().join(&name), folder.join(&name));
            fs::hard_link(&from, &to).with_context(|| format!("cannot link '{}'", to.display()))?;
        }
        Ok(snapshot.record.clone())
    })
}

/// Unpacks all of a packed snapshot's memory, to see whether it is whole. What this gives stands in for it where the monitor looks at the rest of
/// the snapshot: a file of holes, of the same length and with the same mark. Nothing of a snapshot that is not packed.
pub(crate) fn verified(snapshot: &Snapshot) -> anyhow::Result<Option<tempfile::NamedTempFile>> {
    if !snapshot.is_packed() {
        return Ok(None);
    }
    let packed = snapshot.at(PACKED);
    let act = || format!("'{}'", packed.display());
    let open = || File::open(&packed).with_context(act);
    PackedMemory::open(open()?)
        .and_then(|packed| packed.verify())
        .with_context(act)?;
    let mut memory = Memory::open(open()?, 0).with_context(act)?;
    let tail = memory.tail().with_context(act)?;
    let act = "cannot make a temporary file";
    let mut file = tempfile::NamedTempFile::new().context(act)?;
    file.as_file()
        .write_all_at(&tail, memory.pages_bytes())
        .context(act)?;
    file.flush().context(act)?;
    Ok(Some(file))
}
