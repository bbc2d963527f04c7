//! Reads tar as layers use it: ustar, GNU and PAX, with attributes and sparse files, each within a limit.
//!
//! The fields of a header are `tar::Header`'s to parse; the walk is ours, as the crate reads extended headers of any size into
//! memory and splits their records at line feeds, which occur in attributes.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};

use alveole_erofs::Metadata;
use tar::Header;

use crate::limits::{MAX_PATH, MAX_SPARSE_PARTS, MAX_TAR_EXTENSION};

const BLOCK: usize = 512;
const PIECE: usize = 64 << 10;

/// What an entry stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// Stretches of data: offset and length.
type Parts = Vec<(u64, u64)>;

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// As it is written: with `..`, slashes at either end and the like.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    pub(crate) metadata: Metadata,
    /// Of a regular file, holes included.
    pub(crate) size_bytes: u64,
    /// Stretches of data of a sparse file, in order: offset and length.
    parts: Option<Parts>,
}

/// A piece of a file, in order.
pub(crate) enum Piece<'a> {
    Data(&'a [u8]),
    Hole(u64),
}

pub(crate) struct Tar<R> {
    input: R,
    /// Bytes of the current entry that were not read, and what fills its last block.
    left: u64,
    padding: u64,
    ended: bool,
}

/// What extended headers say of the entry behind them.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    /// Records of PAX, but for attributes.
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// `GNU.sparse.offset` and `numbytes` of the oldest form, which repeat.
    sparse_pairs: Vec<u64>,
}

pub(crate) fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

impl<R: Read> Tar<R> {
    pub(crate) fn new(input: R) -> Self {
        Self {
            input,
            left: 0,
            padding: 0,
            ended: false,
        }
    }

    /// The next entry; what was not read of the one before is passed over.
    pub(crate) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut extended = Extended::default();
        loop {
            let Some(header) = self.header()? else {
                return Ok(None);
            };
            let kind = header.entry_type().as_byte();
            let size = header.entry_size()?;
            match kind {
                b'L' => extended.path = Some(self.extension(size, "a long name")?),
                b'K' => extended.link = Some(self.extension(size, "a long link")?),
                b'x' | b'X' => {
                    let text = self.extension(size, "an extended header")?;
                    extended.read(&text)?;
                }
                // For all entries: comments of whoever made it.
                b'g' => {
                    self.extension(size, "a global extended header")?;
                }
                _ => return self.entry(&header, extended).map(Some),
            }
        }
    }

    /// Gives the content of the entry that was just found, piece by piece.
    pub(crate) fn content<E: From<io::Error>>(
        &mut self,
        entry: &Entry,
        mut take: impl FnMut(Piece<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = vec![0; PIECE.min(usize::try_from(self.left).unwrap_or(PIECE))];
        let whole = [(0, entry.size_bytes)];
        let parts = entry.parts.as_deref().unwrap_or(&whole);
        let mut at = 0;
        for (offset, len) in parts {
            if *offset > at {
                take(Piece::Hole(offset - at))?;
            }
            let mut left = *len;
            while left > 0 {
                let part = usize::try_from(left)
                    .unwrap_or(usize::MAX)
                    .min(buffer.len());
                self.data(&mut buffer[..part])?;
                take(Piece::Data(&buffer[..part]))?;
                left -= part as u64;
            }
            at = offset + len;
        }
        if entry.size_bytes > at {
            take(Piece::Hole(entry.size_bytes - at))?;
        }
        Ok(())
    }

    fn header(&mut self) -> io::Result<Option<Header>> {
        if self.ended {
            return Ok(None);
        }
        let skip = self.left.saturating_add(self.padding);
        if io::copy(&mut self.input.by_ref().take(skip), &mut io::sink())? != skip {
            return Err(cut_off());
        }
        (self.left, self.padding) = (0, 0);
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.input.read(&mut block[filled..])? {
                0 if filled == 0 => {
                    self.ended = true;
                    return Ok(None);
                }
                0 => return Err(cut_off()),
                n => filled += n,
            }
        }
        if block.iter().all(|b| *b == 0) {
            self.ended = true;
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(at, b)| {
                if (148..156).contains(&at) {
                    32
                } else {
                    u32::from(*b)
                }
            })
            .sum();
        if header.cksum().ok() != Some(sum) {
            return Err(bad(
                "it is no tar archive, or damaged: the checksum of a header is wrong",
            ));
        }
        Ok(Some(header))
    }

    fn expect(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    /// Reads bytes of the current entry.
    fn data(&mut self, into: &mut [u8]) -> io::Result<()> {
        if into.len() as u64 > self.left {
            return Err(bad("a sparse file has more data than its entry"));
        }
        self.input.read_exact(into).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => cut_off(),
            _ => e,
        })?;
        self.left -= into.len() as u64;
        Ok(())
    }

    fn extension(&mut self, size: u64, what: &str) -> io::Result<Vec<u8>> {
        if size > MAX_TAR_EXTENSION {
            return Err(bad(format!(
                "{what} has {size} bytes, {MAX_TAR_EXTENSION} are the most"
            )));
        }
        self.expect(size);
        let mut bytes = vec![0; size as usize];
        self.data(&mut bytes)?;
        // GNU tar ends names with a zero.
        while what.starts_with("a long") && bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(bytes)
    }

    fn entry(&mut self, header: &Header, extended: Extended) -> io::Result<Entry> {
        let number = |key: &str, plain: u64| match extended.records.get(key.as_bytes()) {
            Some(text) => decimal(text),
            None => Ok(plain),
        };
        let mut path = match (extended.records.get(&b"path"[..]), &extended.path) {
            (Some(path), _) | (None, Some(path)) => path.clone(),
            (None, None) => header.path_bytes().into_owned(),
        };
        let link = match (extended.records.get(&b"linkpath"[..]), &extended.link) {
            (Some(link), _) | (None, Some(link)) => link.clone(),
            (None, None) => header.link_name_bytes().unwrap_or_default().into_owned(),
        };
        let shown = || String::from_utf8_lossy(&path).into_owned();
        if path.len() > MAX_PATH || link.len() > MAX_PATH {
            return Err(bad(format!(
                "a path has more than {MAX_PATH} bytes: {:.60}...",
                shown()
            )));
        }
        if path.contains(&0) || link.contains(&0) {
            return Err(bad(format!("there is a zero byte in the path {}", shown())));
        }
        let kind_byte = header.entry_type().as_byte();
        let device = || -> io::Result<(u32, u32)> {
            let (major, minor) = (header.device_major()?, header.device_minor()?);
            Ok((major.unwrap_or(0), minor.unwrap_or(0)))
        };
        let kind = match kind_byte {
            // Older than the mark for directories.
            0 if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => device().map(|d| Kind::CharDevice(d.0, d.1))?,
            b'4' => device().map(|d| Kind::BlockDevice(d.0, d.1))?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(bad(format!(
                    "{} is of a type that is not known: {:?}",
                    shown(),
                    char::from(other)
                )));
            }
        };
        let owner = |key, plain: io::Result<u64>| -> io::Result<u32> {
            let number = number(key, plain?)?;
            u32::try_from(number).map_err(|_| {
                bad(format!(
                    "{} has the {key} {number}, more than Linux has",
                    shown()
                ))
            })
        };
        let mut metadata = Metadata {
            mode: (header.mode()? & 0o7777) as u16,
            uid: owner("uid", header.uid())?,
            gid: owner("gid", header.gid())?,
            mtime: header.mtime()?.cast_signed(),
            mtime_nsec: 0,
            xattrs: Vec::new(),
        };
        if let Some(time) = extended.records.get(&b"mtime"[..]) {
            (metadata.mtime, metadata.mtime_nsec) = pax_time(time)?;
        }
        let wire = match kind {
            Kind::File => number("size", header.entry_size()?)?,
            // Whatever their headers say.
            _ => 0,
        };
        let mut parts = None;
        let mut size_bytes = wire;
        if kind == Kind::File {
            (parts, size_bytes) = self.sparse(header, &extended, wire)?;
            if let Some(name) = extended.records.get(&b"GNU.sparse.name"[..]) {
                path.clone_from(name);
            }
        }
        metadata.xattrs = extended
            .xattrs
            .into_iter()
            .filter(|(name, _)| is_kept(name))
            .collect();
        Ok(Entry {
            path,
            kind,
            metadata,
            size_bytes,
            parts,
        })
    }

    /// The map and size of a sparse file, if it is one. Sets how much data follows.
    fn sparse(
        &mut self,
        header: &Header,
        extended: &Extended,
        wire: u64,
    ) -> io::Result<(Option<Parts>, u64)> {
        let record = |key: &str| extended.records.get(key.as_bytes());
        let mut numbers = Vec::new();
        let size;
        if header.entry_type().as_byte() == b'S' {
            let gnu = header
                .as_gnu()
                .ok_or_else(|| bad("a sparse file has no GNU header"))?;
            size = gnu.real_size()?;
            let mut more = gnu.is_extended();
            let mut take = |parts: &[tar::GnuSparseHeader]| -> io::Result<()> {
                for part in parts.iter().filter(|p| !p.is_empty()) {
                    numbers.extend([part.offset()?, part.length()?]);
                }
                within_parts(numbers.len() / 2)
            };
            take(&gnu.sparse)?;
            while more {
                let mut block = tar::GnuExtSparseHeader::new();
                self.input
                    .read_exact(block.as_mut_bytes())
                    .map_err(|_| cut_off())?;
                take(block.sparse())?;
                more = block.is_extended();
            }
            self.expect(wire);
        } else if record("GNU.sparse.major").is_some_and(|v| v == b"1") {
            let real = record("GNU.sparse.realsize");
            size = decimal(real.ok_or_else(|| bad("a sparse file does not say its size"))?)?;
            self.expect(wire);
            self.sparse_map(&mut numbers)?;
        } else if let Some(real) = record("GNU.sparse.size") {
            size = decimal(real)?;
            match record("GNU.sparse.map") {
                Some(map) if map.is_empty() => {}
                Some(map) => {
                    for number in map.split(|b| *b == b',') {
                        numbers.push(decimal(number)?);
                    }
                }
                None => numbers.clone_from(&extended.sparse_pairs),
            }
            self.expect(wire);
        } else {
            self.expect(wire);
            return Ok((None, wire));
        }
        within_parts(numbers.len() / 2)?;
        let (pairs, rest) = numbers.as_chunks::<2>();
        let (mut at, mut data) = (0, 0u64);
        for [offset, len] in pairs {
            let end = offset
                .checked_add(*len)
                .filter(|end| *end <= size && *offset >= at);
            at = end.ok_or_else(|| {
                bad("the map of a sparse file is not in order, or beyond its end")
            })?;
            data = data.saturating_add(*len);
        }
        if !rest.is_empty() || data > self.left {
            return Err(bad("the map of a sparse file does not fit its data"));
        }
        Ok((Some(pairs.iter().map(|[o, l]| (*o, *l)).collect()), size))
    }

    /// The map before the data of a sparse file of PAX 1.0: lines of decimal numbers, the first of which counts pairs.
    fn sparse_map(&mut self, numbers: &mut Vec<u64>) -> io::Result<()> {
        let mut wanted = None;
        let mut line = Vec::new();
        loop {
            let mut block = [0; BLOCK];
            self.data(&mut block)?;
            for byte in block {
                if byte != b'\n' {
                    line.push(byte);
                    if line.len() > 20 {
                        return Err(bad("the map of a sparse file has a line that is no number"));
                    }
                    continue;
                }
                let number = decimal(&line)?;
                line.clear();
                match wanted {
                    None => {
                        let pairs = usize::try_from(number).unwrap_or(usize::MAX);
                        within_parts(pairs)?;
                        wanted = Some(2 * pairs);
                    }
                    Some(_) => numbers.push(number),
                }
                if wanted == Some(numbers.len()) {
                    return Ok(());
                }
            }
        }
    }
}

impl Extended {
    /// Reads records: length, space, key, `=`, value, line feed.
    fn read(&mut self, mut text: &[u8]) -> io::Result<()> {
        let wrong = || bad("an extended header has a record that is none");
        while !text.is_empty() {
            let space = text
                .iter()
                .take(20)
                .position(|b| *b == b' ')
                .ok_or_else(wrong)?;
            let len = usize::try_from(decimal(&text[..space])?).map_err(|_| wrong())?;
            let record = text.get(space + 1..len).ok_or_else(wrong)?;
            text = &text[len..];
            let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(wrong)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                self.xattrs.insert(name.to_vec(), value.to_vec());
            } else if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                self.sparse_pairs.push(decimal(value)?);
            } else {
                self.records.insert(key.to_vec(), value.to_vec());
            }
        }
        Ok(())
    }
}

fn within_parts(parts: usize) -> io::Result<()> {
    if parts > MAX_SPARSE_PARTS {
        return Err(bad(format!(
            "a sparse file is in more than {MAX_SPARSE_PARTS} pieces"
        )));
    }
    Ok(())
}

fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it is cut off in the middle")
}

/// Attributes that EROFS can hold and that mean something on another machine.
fn is_kept(name: &[u8]) -> bool {
    let of = |prefix: &[u8]| name.len() > prefix.len() && name.starts_with(prefix);
    // Labels are of the policy of the machine where the layer was made.
    name != b"security.selinux" && (of(b"user.") || of(b"trusted.") || of(b"security."))
        || matches!(
            name,
            b"system.posix_acl_access" | b"system.posix_acl_default"
        )
}

fn decimal(text: &[u8]) -> io::Result<u64> {
    let number = std::str::from_utf8(text).ok().and_then(|t| t.parse().ok());
    number.ok_or_else(|| bad(format!("{:?} is no number", String::from_utf8_lossy(text))))
}

/// Seconds and nanoseconds of `-1.5` (which is -2 and 500,000,000) and the like.
fn pax_time(text: &[u8]) -> io::Result<(i64, u32)> {
    let wrong = || bad(format!("{:?} is no time", String::from_utf8_lossy(text)));
    let shown = std::str::from_utf8(text).map_err(|_| wrong())?;
    let (whole, fraction) = shown.split_once('.').unwrap_or((shown, ""));
    let seconds: i64 = whole.parse().map_err(|_| wrong())?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let nanoseconds: u32 = format!("{fraction:0<9.9}").parse().map_err(|_| wrong())?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Ok((seconds.saturating_sub(1), 1_000_000_000 - nanoseconds));
    }
    Ok((seconds, nanoseconds))
}

impl<R: Read + Seek> Tar<R> {
    /// Where the content of the entry that was just found begins.
    pub(crate) fn position(&mut self) -> io::Result<u64> {
        self.input.stream_position()
    }

    /// Passes over the content without reading it.
    pub(crate) fn pass_over(&mut self) -> io::Result<()> {
        let skip = self
            .left
            .checked_add(self.padding)
            .and_then(|n| i64::try_from(n).ok());
        self.input
            .seek(SeekFrom::Current(skip.ok_or_else(cut_off)?))?;
        (self.left, self.padding) = (0, 0);
        Ok(())
    }
}

// Writing ------------------------------------------------------------------------------------------

/// The header blocks of an entry: PAX records where a field does not fit into ustar's.
pub(crate) fn head(
    path: &[u8],
    kind: &Kind,
    metadata: &Metadata,
    size_bytes: u64,
) -> io::Result<Vec<u8>> {
    let mut records = Vec::new();
    let mut header = Header::new_ustar();
    let mut name = path.to_vec();
    if *kind == Kind::Directory {
        name.push(b'/');
    }
    if name.len() <= 100 {
        header.as_mut_bytes()[..name.len()].copy_from_slice(&name);
    } else {
        record(&mut records, b"path", &name);
    }
    let (entry_type, link) = match kind {
        Kind::File => (b'0', None),
        Kind::Directory => (b'5', None),
        Kind::HardLink(target) => (b'1', Some(target)),
        Kind::Symlink(target) => (b'2', Some(target)),
        Kind::CharDevice(..) => (b'3', None),
        Kind::BlockDevice(..) => (b'4', None),
        Kind::Fifo => (b'6', None),
    };
    header.set_entry_type(tar::EntryType::new(entry_type));
    match link {
        Some(target) if target.len() > 100 => record(&mut records, b"linkpath", target),
        Some(target) => header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target),
        None => {}
    }
    if let Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) = kind {
        header.set_device_major(*major)?;
        header.set_device_minor(*minor)?;
    }
    header.set_mode(u32::from(metadata.mode));
    // From here on octal digits do not suffice.
    let fits = |number: u64, digits: u32| number < 8u64.pow(digits);
    let mut numeric = |key: &[u8], number: u64, digits: u32| {
        if fits(number, digits) {
            return number;
        }
        record(&mut records, key, number.to_string().as_bytes());
        0
    };
    header.set_uid(numeric(b"uid", u64::from(metadata.uid), 7));
    header.set_gid(numeric(b"gid", u64::from(metadata.gid), 7));
    header.set_size(numeric(b"size", size_bytes, 11));
    let seconds = u64::try_from(metadata.mtime).unwrap_or(0);
    header.set_mtime(if fits(seconds, 11) { seconds } else { 0 });
    if metadata.mtime_nsec > 0 || metadata.mtime < 0 || !fits(seconds, 11) {
        record(&mut records, b"mtime", time_text(metadata).as_bytes());
    }
    for (name, value) in &metadata.xattrs {
        record(&mut records, &[b"SCHILY.xattr.", &name[..]].concat(), value);
    }
    header.set_cksum();
    let mut bytes = Vec::new();
    if !records.is_empty() {
        let mut extended = Header::new_ustar();
        extended.as_mut_bytes()[..11].copy_from_slice(b"PaxHeaders/");
        extended.set_entry_type(tar::EntryType::XHeader);
        extended.set_size(records.len() as u64);
        extended.set_mode(0o644);
        extended.set_cksum();
        bytes.extend_from_slice(extended.as_bytes());
        bytes.extend_from_slice(&records);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    bytes.extend_from_slice(header.as_bytes());
    Ok(bytes)
}

/// Zeros that fill the last block of an entry of so many bytes.
pub(crate) fn padding(size_bytes: u64) -> &'static [u8] {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    let over = (size_bytes % BLOCK as u64) as usize;
    if over == 0 { &[] } else { &ZEROS[over..] }
}

/// What ends an archive.
pub(crate) const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

fn time_text(metadata: &Metadata) -> String {
    let (seconds, nanoseconds) = (metadata.mtime, metadata.mtime_nsec);
    if seconds < 0 && nanoseconds > 0 {
        let whole = seconds.saturating_add(1).unsigned_abs();
        return format!("-{whole}.{:09}", 1_000_000_000 - nanoseconds);
    }
    format!("{seconds}.{nanoseconds:09}")
}

/// A record counts its own length.
fn record(into: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    into.extend_from_slice(len.to_string().as_bytes());
    into.push(b' ');
    into.extend_from_slice(key);
    into.push(b'=');
    into.extend_from_slice(value);
    into.push(b'\n');
}

/// Whether an attribute of a file on this host goes into an archive.
pub(crate) fn is_written(name: &[u8]) -> bool {
    is_kept(name)
}
