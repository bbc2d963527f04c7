//! New images.

use crate::bytes::{bytes_of, index, put, wide};
use crate::error::{Act, OpenError};
use crate::file::ImageFile;
use crate::geometry::Geometry;
use crate::header::{
    Backing, COMPRESSION, Compression, EXTENSION_BACKING_FORMAT, LAZY_REFCOUNTS, MAGIC,
    MOST_BACKING_NAME, MOST_L1_BYTES, MOST_REFCOUNT_TABLE_BYTES,
};
use crate::refcounts::write_count;

/// How a new image is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk: a multiple of 512.
    pub size_bytes: u64,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// log2 of the width of a reference count, at most 6; 4 in version 2.
    pub refcount_order: u32,
    /// What the image is laid over.
    pub backing: Option<Backing>,
    /// Tells other programs that they may write reference counts late, too.
    pub lazy_refcounts: bool,
    /// How others are to compress clusters.
    pub compression: Compression,
    /// Whether to wait until the image is durable.
    pub sync: bool,
}

impl CreateOptions {
    /// An empty disk as most want it: version 3, clusters of 64 KiB.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            cluster_bits: 16,
            version: 3,
            refcount_order: 4,
            backing: None,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            sync: false,
        }
    }

    /// A disk that is laid over another.
    #[must_use]
    pub fn overlay(size_bytes: u64, backing: Backing) -> Self {
        Self {
            backing: Some(backing),
            ..Self::new(size_bytes)
        }
    }
}

/// Header, refcount table, refcount blocks and L1 table in a row, in clusters.
struct Layout {
    geometry: Geometry,
    table: u64,
    blocks: u64,
    l1: u64,
}

impl Layout {
    fn of(geometry: Geometry, l1_entries: u64) -> Self {
        let l1 = geometry.clusters(l1_entries.saturating_mul(8)).max(1);
        let (mut table, mut blocks) = (1, 1);
        loop {
            let layout = Self {
                geometry,
                table,
                blocks,
                l1,
            };
            let needed = layout.end().div_ceil(geometry.block_entries().max(1));
            if needed <= blocks {
                return layout;
            }
            blocks = needed;
            table = geometry.clusters(blocks.saturating_mul(8));
        }
    }

    fn blocks_start(&self) -> u64 {
        self.table.saturating_add(1)
    }

    fn l1_start(&self) -> u64 {
        self.blocks_start().saturating_add(self.blocks)
    }

    fn end(&self) -> u64 {
        self.l1_start().saturating_add(self.l1)
    }
}

fn refuse<T>(field: &'static str, value: u64, rule: String) -> Result<T, OpenError> {
    Err(OpenError::Field { field, value, rule })
}

fn check(options: &CreateOptions) -> Result<(Geometry, u64), OpenError> {
    let bits = options.cluster_bits;
    if !(9..=21).contains(&bits) {
        return refuse("cluster_bits", bits.into(), "9 to 21 are possible".into());
    }
    let version = options.version;
    if !(2..=3).contains(&version) {
        return refuse("version", version.into(), "2 and 3 are possible".into());
    }
    let order = options.refcount_order;
    if order > 6 || version == 2 && order != 4 {
        let rule = "at most 6 is possible, and 4 in version 2".into();
        return refuse("refcount_order", order.into(), rule);
    }
    if version == 2 && (options.lazy_refcounts || options.compression != Compression::Zlib) {
        let rule = "lazy reference counts and zstd need version 3".into();
        return refuse("version", version.into(), rule);
    }
    let geometry = Geometry {
        cluster_bits: bits,
        refcount_order: order,
    };
    let l1_entries = geometry.l1_entries(options.size_bytes);
    let most = (MOST_L1_BYTES / 8)
        .saturating_mul(geometry.l2_entries())
        .saturating_mul(geometry.cluster_size());
    if l1_entries.saturating_mul(8) > MOST_L1_BYTES || i64::try_from(options.size_bytes).is_err() {
        let rule = format!("at most {most} bytes are possible in clusters of this size");
        return refuse("size", options.size_bytes, rule);
    }
    if !options.size_bytes.is_multiple_of(512) {
        return refuse(
            "size",
            options.size_bytes,
            "it must be a multiple of 512".into(),
        );
    }
    Ok((geometry, l1_entries))
}

/// The header with its extensions and the backing file's name.
fn header(options: &CreateOptions, layout: &Layout, l1_entries: u64) -> Result<Vec<u8>, OpenError> {
    let g = layout.geometry;
    let length = if options.version == 2 { 72 } else { 112 };
    let mut bytes = vec![0; length];
    put(&mut bytes, 0, &MAGIC.to_be_bytes());
    put(&mut bytes, 4, &options.version.to_be_bytes());
    put(&mut bytes, 20, &g.cluster_bits.to_be_bytes());
    put(&mut bytes, 24, &options.size_bytes.to_be_bytes());
    let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_be_bytes();
    put(&mut bytes, 36, &narrow(l1_entries));
    put(&mut bytes, 40, &g.offset(layout.l1_start()).to_be_bytes());
    put(&mut bytes, 48, &g.cluster_size().to_be_bytes());
    put(&mut bytes, 56, &narrow(layout.table));
    if options.version >= 3 {
        let zstd = options.compression == Compression::Zstd;
        let incompatible = if zstd { COMPRESSION } else { 0 };
        let compatible = if options.lazy_refcounts {
            LAZY_REFCOUNTS
        } else {
            0
        };
        put(&mut bytes, 72, &incompatible.to_be_bytes());
        put(&mut bytes, 80, &compatible.to_be_bytes());
        put(&mut bytes, 96, &g.refcount_order.to_be_bytes());
        put(&mut bytes, 100, &narrow(wide(length)));
        put(&mut bytes, 104, &[u8::from(zstd)]);
    }
    let Some(backing) = &options.backing else {
        return Ok(bytes);
    };
    if let Some(format) = &backing.format {
        bytes.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
        bytes.extend(narrow(wide(format.len())));
        bytes.extend(format.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes.extend([0; 8]);
    let (at, len) = (wide(bytes.len()), wide(backing.path.len()));
    if len > MOST_BACKING_NAME.into() || at.saturating_add(len) > g.cluster_size() || len == 0 {
        let room = g.cluster_size().saturating_sub(at);
        let rule = format!(
            "between 1 and {} are possible",
            room.min(MOST_BACKING_NAME.into())
        );
        return refuse("length of the backing file's name", len, rule);
    }
    put(&mut bytes, 8, &at.to_be_bytes());
    put(&mut bytes, 16, &narrow(len));
    bytes.extend(backing.path.as_bytes());
    Ok(bytes)
}

/// Makes an image in an empty file: a few small writes, whatever the size of the disk.
///
/// # Errors
/// The options cannot be, or the file failed.
pub fn create(file: &dyn ImageFile, options: &CreateOptions) -> Result<(), OpenError> {
    let (g, l1_entries) = check(options)?;
    let layout = Layout::of(g, l1_entries);
    if g.offset(layout.table) > MOST_REFCOUNT_TABLE_BYTES {
        let rule = "the refcount table would be too long".to_owned();
        return refuse("size", options.size_bytes, rule);
    }
    let header = header(options, &layout, l1_entries)?;
    let blocks = layout.blocks_start();
    let table: Vec<u64> = (blocks..layout.l1_start()).map(|b| g.offset(b)).collect();
    // All blocks in a row are one array of counts, of which only the part in use is written.
    let width = g
        .cluster_size()
        .saturating_mul(8)
        .checked_div(g.block_entries());
    let bits = layout.end().saturating_mul(width.unwrap_or(64));
    let mut counts = vec![0; index(bits.div_ceil(8))];
    for cluster in 0..layout.end() {
        write_count(&mut counts, cluster, g.refcount_order, 1);
    }
    file.set_len(g.offset(layout.end()))
        .act_open("give the image its length")?;
    file.write_at(&bytes_of(&table), g.cluster_size())
        .act_open("write the refcount table")?;
    file.write_at(&counts, g.offset(blocks))
        .act_open("write the refcount blocks")?;
    // The header comes last: before, this is no image.
    file.write_at(&header, 0).act_open("write the header")?;
    if options.sync {
        file.sync().act_open("make the image durable")?;
    }
    Ok(())
}
