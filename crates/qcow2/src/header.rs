//! The header of an image (QEMU docs/interop/qcow2.txt, "Header"): every field checked once, here.

use crate::bytes::{field, index, u32_at, u64_at, wide};
use crate::error::{Act, OpenError};
use crate::file::ImageFile;
use crate::geometry::Geometry;

pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// Incompatible feature: reference counts may be stale.
pub(crate) const DIRTY: u64 = 1;
/// Incompatible feature: the image may only be read.
pub(crate) const CORRUPT: u64 = 1 << 1;
/// Incompatible feature: the compression type says something else than zlib.
pub(crate) const COMPRESSION: u64 = 1 << 3;
/// Compatible feature: reference counts may be written late.
pub(crate) const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear feature: the bitmaps are consistent.
pub(crate) const BITMAPS: u64 = 1;

pub(crate) const EXTENSION_END: u32 = 0;
pub(crate) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// Longest L1 table, as QEMU has it. A hostile image would otherwise choose how much memory it takes.
pub(crate) const MOST_L1_BYTES: u64 = 32 << 20;
/// Longest refcount table, as QEMU has it. For the same reason.
pub(crate) const MOST_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots, as QEMU has it.
pub(crate) const MOST_SNAPSHOTS: u32 = 65536;
/// Longest name of a backing file; the format's own limit.
pub(crate) const MOST_BACKING_NAME: u32 = 1023;
/// Longest name of a backing format. The format sets no limit; the longest in use has 10 letters.
const MOST_FORMAT_NAME: usize = 64;
/// How much of the first cluster is looked at for extensions, which a hostile image may fill.
const MOST_EXTENSION_BYTES: u64 = 64 << 10;
/// How many letters of feature names a message repeats after a hostile image.
const MOST_FEATURE_LETTERS: usize = 400;

const V2_BYTES: u64 = 72;
const V3_BYTES: u64 = 104;

/// Where an image looks for what it does not hold itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Path as written in the image. Nobody has looked at it: it may be absolute, relative to the image's
    /// folder, a cycle or a trap.
    pub path: String,
    /// Format of the backing file, if the image says so.
    pub format: Option<String>,
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Deflate without a zlib header.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// Where the bitmaps' directory lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bitmaps {
    pub(crate) count: u32,
    pub(crate) directory_offset: u64,
    pub(crate) directory_size: u64,
}

/// A header whose fields agree with each other and with the length of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) geometry: Geometry,
    pub(crate) size: u64,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_offset: u64,
    pub(crate) refcount_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<Backing>,
    pub(crate) bitmaps: Option<Bitmaps>,
    pub(crate) file_len: u64,
}

fn refuse<T>(field: &'static str, value: u64, rule: impl Into<String>) -> Result<T, OpenError> {
    Err(OpenError::Field {
        field,
        value,
        rule: rule.into(),
    })
}

impl Header {
    /// Reads and checks the header of `file`.
    pub(crate) fn read(file: &dyn ImageFile) -> Result<Self, OpenError> {
        let file_len = file.len().act_open("ask for the length of the image")?;
        let mut fixed = [0; 112];
        file.read_at(&mut fixed, 0)
            .act_open("read the header of the image")?;
        if file_len < 4 || u32_at(&fixed, 0) != MAGIC {
            let found = u32_at(&fixed, 0);
            return Err(OpenError::Magic { found });
        }
        let truncated = |needed_bytes| OpenError::Truncated {
            found_bytes: file_len,
            needed_bytes,
        };
        if file_len < V2_BYTES {
            return Err(truncated(V2_BYTES));
        }
        let version = u32_at(&fixed, 4);
        if !(2..=3).contains(&version) {
            return refuse("version", version.into(), "2 and 3 are supported");
        }
        if version >= 3 && file_len < V3_BYTES {
            return Err(truncated(V3_BYTES));
        }
        let geometry = read_geometry(&fixed, version)?;
        let header_length = read_header_length(&fixed, version, geometry)?;
        let mut header = Self {
            version,
            geometry,
            size: u64_at(&fixed, 24),
            l1_entries: u32_at(&fixed, 36),
            l1_offset: u64_at(&fixed, 40),
            refcount_offset: u64_at(&fixed, 48),
            refcount_clusters: u32_at(&fixed, 56),
            snapshots: u32_at(&fixed, 60),
            snapshots_offset: u64_at(&fixed, 64),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Zlib,
            backing: None,
            bitmaps: None,
            file_len,
        };
        if version >= 3 {
            header.incompatible = u64_at(&fixed, 72);
            header.compatible = u64_at(&fixed, 80);
            header.autoclear = u64_at(&fixed, 88);
        }
        header.read_extensions(file, &fixed, header_length)?;
        let method = u32_at(&fixed, 32);
        if method != 0 {
            let names = format!("encryption (crypt_method {method})");
            return Err(OpenError::Features { names });
        }
        header.read_compression(&fixed, header_length)?;
        header.check_tables()?;
        Ok(header)
    }

    fn read_compression(&mut self, fixed: &[u8], header_length: u64) -> Result<(), OpenError> {
        let kind = match header_length > 104 {
            true => u64::from(fixed.get(104).copied().unwrap_or_default()),
            false => 0,
        };
        self.compression = match (self.incompatible & COMPRESSION != 0, kind) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (false, _) => return refuse("compression_type", kind, "its feature bit is not set"),
            (true, 0) => return refuse("compression_type", kind, "its feature bit is set"),
            _ => {
                return refuse(
                    "compression_type",
                    kind,
                    "0 (zlib) and 1 (zstd) are supported",
                );
            }
        };
        Ok(())
    }

    /// Header extensions and the backing file's name: what lies in the first cluster after the header.
    fn read_extensions(
        &mut self,
        file: &dyn ImageFile,
        fixed: &[u8],
        header_length: u64,
    ) -> Result<(), OpenError> {
        let cluster = self.geometry.cluster_size();
        let name_offset = u64_at(fixed, 8);
        let name_len = u32_at(fixed, 16);
        let mut area_end = cluster.min(self.file_len);
        let mut format = None;
        if name_offset != 0 {
            if name_len > MOST_BACKING_NAME {
                let rule = format!("at most {MOST_BACKING_NAME} are allowed");
                return refuse("backing_file_size", name_len.into(), rule);
            }
            let end = name_offset.saturating_add(name_len.into());
            if name_offset < header_length || end > cluster || end > self.file_len {
                let rule = format!(
                    "the name ({name_len} bytes) must lie between the header ({header_length} bytes) and the end of the first cluster ({cluster})"
                );
                return refuse("backing_file_offset", name_offset, rule);
            }
            area_end = area_end.min(name_offset);
        }
        let area_end = area_end.min(MOST_EXTENSION_BYTES);
        let mut area = vec![0; index(area_end.saturating_sub(header_length))];
        file.read_at(&mut area, header_length)
            .act_open("read the header extensions of the image")?;
        let mut feature_names = Vec::new();
        for (kind, data) in extensions(&area)? {
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    if data.len() > MOST_FORMAT_NAME {
                        let rule = format!("at most {MOST_FORMAT_NAME} bytes are understood");
                        return refuse("length of the backing format", wide(data.len()), rule);
                    }
                    format = Some(text(data, "backing format")?);
                }
                EXTENSION_FEATURE_NAMES => feature_names = data.to_vec(),
                EXTENSION_BITMAPS if data.len() >= 24 => {
                    self.bitmaps = Some(Bitmaps {
                        count: u32_at(data, 0),
                        directory_size: u64_at(data, 8),
                        directory_offset: u64_at(data, 16),
                    });
                }
                _ => {}
            }
        }
        let unknown = self.incompatible & !(DIRTY | CORRUPT | COMPRESSION);
        if unknown != 0 {
            let names = name_features(unknown, &feature_names);
            return Err(OpenError::Features { names });
        }
        if name_offset != 0 && name_len != 0 {
            let mut name = vec![0; index(name_len.into())];
            file.read_at(&mut name, name_offset)
                .act_open("read the backing file's name")?;
            let path = text(&name, "name of the backing file")?;
            self.backing = Some(Backing { path, format });
        }
        Ok(())
    }

    fn check_tables(&self) -> Result<(), OpenError> {
        let needed = self.geometry.l1_entries(self.size);
        let l1_bytes = self.l1_bytes();
        if i64::try_from(self.size).is_err() {
            return refuse(
                "size",
                self.size,
                format!("at most {} is possible", i64::MAX),
            );
        }
        if l1_bytes > MOST_L1_BYTES {
            let rule = format!("at most {} are supported", MOST_L1_BYTES / 8);
            return refuse("l1_size", self.l1_entries.into(), rule);
        }
        if needed > u64::from(self.l1_entries) {
            let rule = format!("a disk of {} bytes needs {needed}", self.size);
            return refuse("l1_size", self.l1_entries.into(), rule);
        }
        let refcount_bytes = self.refcount_bytes();
        if self.refcount_clusters == 0 || refcount_bytes > MOST_REFCOUNT_TABLE_BYTES {
            let most = self.geometry.index(MOST_REFCOUNT_TABLE_BYTES);
            let rule = format!("between 1 and {most} are supported");
            return refuse(
                "refcount_table_clusters",
                self.refcount_clusters.into(),
                rule,
            );
        }
        if self.snapshots > MOST_SNAPSHOTS {
            let rule = format!("at most {MOST_SNAPSHOTS} are supported");
            return refuse("nb_snapshots", self.snapshots.into(), rule);
        }
        self.check_place("l1_table_offset", self.l1_offset, l1_bytes)?;
        self.check_place(
            "refcount_table_offset",
            self.refcount_offset,
            refcount_bytes,
        )?;
        if self.snapshots > 0 {
            // An entry has at least 40 bytes.
            let least = u64::from(self.snapshots).saturating_mul(40);
            self.check_place("snapshots_offset", self.snapshots_offset, least)?;
        }
        let l1_end = self.l1_offset.saturating_add(l1_bytes);
        let refcount_end = self.refcount_offset.saturating_add(refcount_bytes);
        if self.l1_offset < refcount_end && self.refcount_offset < l1_end {
            return Err(OpenError::Overlap {
                first: "L1 table",
                second: "refcount table",
            });
        }
        Ok(())
    }

    /// A table must lie on a cluster boundary, behind the header and within the file.
    fn check_place(&self, field: &'static str, offset: u64, bytes: u64) -> Result<(), OpenError> {
        if !self.geometry.is_aligned(offset) {
            return refuse(field, offset, "it must be a multiple of the cluster size");
        }
        if bytes == 0 {
            return Ok(());
        }
        if offset == 0 {
            return refuse(field, offset, "the header lies there");
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= self.file_len => Ok(()),
            _ => {
                let rule = format!(
                    "{bytes} bytes there pass the end of the file, {}",
                    self.file_len
                );
                refuse(field, offset, rule)
            }
        }
    }

    pub(crate) fn l1_bytes(&self) -> u64 {
        u64::from(self.l1_entries).saturating_mul(8)
    }

    pub(crate) fn refcount_bytes(&self) -> u64 {
        self.geometry.offset(self.refcount_clusters.into())
    }

    /// The bitmaps, if they may be trusted and their clusters are in use.
    pub(crate) fn live_bitmaps(&self) -> Option<Bitmaps> {
        self.bitmaps.filter(|_| self.autoclear & BITMAPS != 0)
    }
}

fn read_geometry(fixed: &[u8], version: u32) -> Result<Geometry, OpenError> {
    let cluster_bits = u32_at(fixed, 20);
    if !(9..=21).contains(&cluster_bits) {
        return refuse("cluster_bits", cluster_bits.into(), "9 to 21 are supported");
    }
    let refcount_order = if version == 2 { 4 } else { u32_at(fixed, 96) };
    if refcount_order > 6 {
        return refuse(
            "refcount_order",
            refcount_order.into(),
            "at most 6 is allowed",
        );
    }
    Ok(Geometry {
        cluster_bits,
        refcount_order,
    })
}

fn read_header_length(fixed: &[u8], version: u32, geometry: Geometry) -> Result<u64, OpenError> {
    if version == 2 {
        return Ok(V2_BYTES);
    }
    let length = u64::from(u32_at(fixed, 100));
    if length < V3_BYTES || length > geometry.cluster_size() || length % 8 != 0 {
        let rule = format!(
            "a multiple of 8 between {V3_BYTES} and the cluster size, {}, is allowed",
            geometry.cluster_size()
        );
        return refuse("header_length", length, rule);
    }
    Ok(length)
}

fn text(bytes: &[u8], field: &'static str) -> Result<String, OpenError> {
    let text = std::str::from_utf8(bytes).map_err(|_| OpenError::NotText { field })?;
    Ok(text.to_owned())
}

/// Splits the extension area. It ends with an end mark, or where the area does.
fn extensions(area: &[u8]) -> Result<Vec<(u32, &[u8])>, OpenError> {
    let mut found = Vec::new();
    let mut rest = area;
    while rest.len() >= 8 {
        let kind = u32_at(rest, 0);
        if kind == EXTENSION_END {
            break;
        }
        let len = index(u32_at(rest, 4).into());
        let Some(data) = len.checked_add(8).and_then(|end| rest.get(8..end)) else {
            let rule = format!("only {} bytes follow", rest.len().saturating_sub(8));
            return refuse("length of a header extension", wide(len), rule);
        };
        found.push((kind, data));
        let next = len.div_ceil(8).saturating_mul(8).saturating_add(8);
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(found)
}

/// Names of incompatible features: the ones we know of, then what the image says, then the bit.
fn name_features(bits: u64, table: &[u8]) -> String {
    let mut names = Vec::new();
    for bit in 0..64_u8 {
        if bits & 1_u64.wrapping_shl(bit.into()) == 0 {
            continue;
        }
        let said = table
            .chunks_exact(48)
            .find(|entry| field::<2>(entry, 0) == [0, bit])
            .map(|entry| {
                let name = entry.get(2..).unwrap_or_default();
                let name = name.split(|b| *b == 0).next().unwrap_or_default();
                name.escape_ascii().to_string()
            })
            .filter(|name| !name.is_empty());
        names.push(match bit {
            2 => "an external data file".to_owned(),
            4 => "extended L2 entries".to_owned(),
            _ => match said {
                Some(name) => format!("\"{name}\" (incompatible feature bit {bit})"),
                None => format!("incompatible feature bit {bit}"),
            },
        });
    }
    let mut names = names.join(", ");
    if names.len() > MOST_FEATURE_LETTERS {
        // Names are escaped, hence ASCII.
        names.truncate(MOST_FEATURE_LETTERS);
        names.push_str(" ...");
    }
    names
}
