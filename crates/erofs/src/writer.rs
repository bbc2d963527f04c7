use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::content::{Child, Content, Directory};
use crate::encode::{Head, LINKS_OFFSET, directory_size, encode_directory, encode_xattrs};
use crate::error::WriteError;
use crate::format::{
    BLOCK, BLOCK_BITS, CHUNK_BASED, COMPAT_MTIME, COMPAT_SB_CHKSUM, EXTENDED_INODE, FLAT_INLINE,
    FLAT_PLAIN, INCOMPAT_CHUNKED_FILE, MAGIC, NULL_BLOCK, SLOT, SUPER_OFFSET, SUPER_SIZE, crc32c,
    encode_device,
};
use crate::write_out::WriteOut;
use crate::{Kind, MAX_NAME, MAX_TARGET, Metadata};

/// The root's number has 16 bits in the superblock, so its inode lies right behind that.
const ROOT_OFFSET: u64 = SUPER_OFFSET + SUPER_SIZE as u64;
/// Inodes gather in runs of so many bytes between the data, near the files that they describe.
const RUN: u64 = 16 * BLOCK;
/// Bytes that are gathered before the host is asked to write.
const GATHERED: usize = 1 << 20;
/// Files from this size on are looked through for zeros, which take no room.
const LOOK_FOR_HOLES: u64 = 64 << 10;
/// Smallest chunk of a file with holes.
const MIN_CHUNK_BITS: u32 = 16;
/// Largest that the format has.
const MAX_CHUNK_BITS: u32 = BLOCK_BITS as u32 + 31;
/// Larger chunks are taken rather than more of them; each takes 4 bytes.
const MOST_CHUNKS: u64 = 1 << 18;
/// A longer rest of a file gets a block of its own where it would waste as much of a block of inodes.
const LONG_TAIL: u64 = 2048;

/// A file that is in the image; enter it in one or more directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Inode {
    nid: u64,
    kind: Kind,
    /// Its place among the files of this writer.
    index: usize,
}

/// Writes one image. Regular files stream in, with their data where the image ends; inodes are gathered between them and hold
/// the rest of a file that fills no block. Directories come last, as only then all is known. Each byte is written
/// once; nothing that grows with the files is kept but eight bytes for each.
///
/// The same calls give the same bytes.
#[derive(Debug)]
pub struct Writer {
    file: File,
    /// Where the next block goes.
    end: u64,
    /// Bytes that are to be written from `gathered_at` on.
    gathered: Vec<u8>,
    gathered_at: u64,
    write_out: Option<WriteOut>,
    run: Run,
    /// Nids of all files but directories, in order.
    nids: Vec<u64>,
    chunked: bool,
    uuid: [u8; 16],
}

#[derive(Debug)]
struct Run {
    at: u64,
    used: usize,
    bytes: Vec<u8>,
}

impl Writer {
    /// Begins an image in an empty file, which must be open for reading and writing.
    ///
    /// # Errors
    /// The host's, when it is emptied.
    pub fn new(file: File) -> Result<Self, WriteError> {
        file.set_len(0)?;
        Ok(Self {
            file,
            end: BLOCK,
            gathered: Vec::new(),
            gathered_at: BLOCK,
            write_out: None,
            run: Run {
                at: 0,
                used: 0,
                bytes: Vec::new(),
            },
            nids: Vec::new(),
            chunked: false,
            uuid: [0; 16],
        })
    }

    /// Gives the image a name of its own; without one it is all zeros.
    pub fn set_uuid(&mut self, uuid: [u8; 16]) {
        self.uuid = uuid;
    }

    /// Has the host begin to write the image out as it grows: for one that is synced in the end.
    pub fn write_out_early(&mut self) {
        self.write_out = Some(WriteOut::default());
    }

    /// Length of the image so far, in bytes, holes included.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.end
    }

    /// Begins a regular file of `size_bytes`. One at a time: finish it by [`FileWriter::end`].
    pub fn begin(&mut self, size_bytes: u64) -> FileWriter<'_> {
        let mut chunk_bits = MIN_CHUNK_BITS;
        while size_bytes >> chunk_bits >= MOST_CHUNKS && chunk_bits < MAX_CHUNK_BITS {
            chunk_bits += 1;
        }
        FileWriter {
            full_blocks: size_bytes / BLOCK,
            size_bytes,
            given: 0,
            looks: size_bytes >= LOOK_FOR_HOLES,
            chunk_bits,
            chunks: Vec::new(),
            block: Vec::new(),
            image: self,
        }
    }

    /// Adds a file that is neither regular nor a directory.
    ///
    /// # Errors
    /// An impossible link or attribute, or the host's.
    pub fn special(&mut self, metadata: &Metadata, content: &Content) -> Result<Inode, WriteError> {
        let (kind, union) = match content {
            Content::Symlink(target) => {
                if target.is_empty() || target.len() > MAX_TARGET {
                    return Err(WriteError::Target(target.len()));
                }
                return self.flat(metadata, Kind::Symlink, target.len() as u64, None, target);
            }
            Content::CharDevice(major, minor) => (Kind::CharDevice, encode_device(*major, *minor)),
            Content::BlockDevice(major, minor) => {
                (Kind::BlockDevice, encode_device(*major, *minor))
            }
            Content::Fifo => (Kind::Fifo, 0),
            Content::Socket => (Kind::Socket, 0),
        };
        let xattrs = encode_xattrs(&metadata.xattrs)?;
        let at = self.place(EXTENDED_INODE + xattrs.len() as u64)?;
        let inode = self.number(at, kind);
        let head = Head {
            layout: FLAT_PLAIN,
            kind,
            size_bytes: 0,
            union,
            links: 1,
        };
        self.put(
            at,
            &[
                &head.encode(metadata, xattrs.len(), inode.index + 1),
                &xattrs,
            ],
        );
        Ok(inode)
    }

    /// Writes directories, the first of which is the root, and the superblock.
    ///
    /// # Errors
    /// Impossible names, attributes or trees, or the host's. The file is then of no use.
    pub fn finish(mut self, directories: &[Directory]) -> Result<File, WriteError> {
        let plan = self.plan(directories)?;
        let mut links = vec![0u32; self.nids.len()];
        for (index, directory) in directories.iter().enumerate() {
            self.directory(directories, &plan, index)?;
            for (_, child) in &directory.entries {
                if let Child::Inode(inode) = child {
                    links[inode.index] = links[inode.index].saturating_add(1);
                }
            }
        }
        let nids = std::mem::take(&mut self.nids);
        self.flush_run()?;
        self.flush()?;
        let mut used = directories.len() as u64;
        for (nid, links) in nids.iter().zip(&links) {
            used += u64::from(*links > 0);
            // Inodes were written with one link.
            if *links > 1 {
                let at = nid * SLOT + LINKS_OFFSET;
                self.file.write_all_at(&links.to_le_bytes(), at)?;
            }
        }
        self.file.set_len(self.end)?;
        self.superblock(used)?;
        Ok(self.file)
    }

    // Directories ------------------------------------------------------------------------------

    /// Gives each directory its place.
    fn plan(&mut self, directories: &[Directory]) -> Result<Plan, WriteError> {
        let mut parents = vec![None; directories.len()];
        let mut subdirectories = vec![0u32; directories.len()];
        for (index, directory) in directories.iter().enumerate() {
            for (name, child) in &directory.entries {
                if name.is_empty()
                    || name.len() > MAX_NAME
                    || name.contains(&b'/')
                    || name.contains(&0)
                    || matches!(&name[..], b"." | b"..")
                {
                    return Err(WriteError::Name(name.len()));
                }
                if let Child::Directory(child) = *child {
                    match parents.get_mut(child) {
                        Some(parent @ None) if child != 0 => *parent = Some(index),
                        _ => return Err(WriteError::Tree(child)),
                    }
                    subdirectories[index] += 1;
                }
            }
        }
        if directories.is_empty() {
            return Err(WriteError::Tree(0));
        }
        parents[0] = Some(0);
        let mut nids = Vec::with_capacity(directories.len());
        for (index, directory) in directories.iter().enumerate() {
            if parents[index].is_none() {
                return Err(WriteError::Tree(index));
            }
            let xattrs = encode_xattrs(&directory.metadata.xattrs)?.len() as u64;
            let head = EXTENDED_INODE + xattrs;
            if index == 0 {
                let most = (BLOCK - ROOT_OFFSET - EXTENDED_INODE) as usize;
                if xattrs as usize > most {
                    let size = xattrs as usize;
                    return Err(WriteError::Xattrs { size, most });
                }
                nids.push(ROOT_OFFSET / SLOT);
                continue;
            }
            let mut names: Vec<&[u8]> = directory.entries.iter().map(|(n, _)| &n[..]).collect();
            names.extend([&b"."[..], b".."]);
            names.sort_unstable();
            let size = directory_size(names.iter().map(|name| name.len()));
            let tail = size % BLOCK;
            let inline = tail > 0 && head + tail <= BLOCK;
            nids.push(self.place(head + if inline { tail } else { 0 })? / SLOT);
        }
        let parents = parents.into_iter().flatten().collect();
        Ok(Plan {
            parents,
            nids,
            subdirectories,
        })
    }

    fn directory(
        &mut self,
        directories: &[Directory],
        plan: &Plan,
        index: usize,
    ) -> Result<(), WriteError> {
        let directory = &directories[index];
        let mut entries: Vec<(&[u8], u64, Kind)> = directory
            .entries
            .iter()
            .map(|(name, child)| match *child {
                Child::Inode(inode) => (&name[..], inode.nid, inode.kind),
                Child::Directory(child) => (&name[..], plan.nids[child], Kind::Directory),
            })
            .collect();
        entries.push((b".", plan.nids[index], Kind::Directory));
        entries.push((b"..", plan.nids[plan.parents[index]], Kind::Directory));
        entries.sort_unstable_by_key(|e| e.0);
        if let Some(pair) = entries.windows(2).find(|p| p[0].0 == p[1].0) {
            let name = String::from_utf8_lossy(pair[0].0).into_owned();
            return Err(WriteError::Twice(name));
        }
        let data = encode_directory(&entries);
        let xattrs = encode_xattrs(&directory.metadata.xattrs)?;
        let at = plan.nids[index] * SLOT;
        let head_len = EXTENDED_INODE + xattrs.len() as u64;
        let room = if index == 0 { BLOCK - at } else { BLOCK };
        let tail = data.len() as u64 % BLOCK;
        let inline = tail > 0 && head_len + tail <= room;
        let kept = if inline {
            data.len() - tail as usize
        } else {
            data.len()
        };
        let start = self.append_blocks(&data[..kept])?;
        let head = Head {
            layout: if inline { FLAT_INLINE } else { FLAT_PLAIN },
            kind: Kind::Directory,
            size_bytes: data.len() as u64,
            union: start,
            links: plan.subdirectories[index].saturating_add(2),
        };
        let number = self.nids.len() + index + 1;
        let head = head.encode(&directory.metadata, xattrs.len(), number);
        if index == 0 {
            let bytes = [&head[..], &xattrs, &data[kept..]].concat();
            self.file.write_all_at(&bytes, at)?;
        } else {
            self.put_anywhere(at, &[&head, &xattrs, &data[kept..]])?;
        }
        Ok(())
    }

    fn superblock(&self, inodes: u64) -> Result<(), WriteError> {
        let blocks = u32::try_from(self.end / BLOCK).map_err(|_| WriteError::TooLarge)?;
        let mut block = vec![0; (BLOCK - SUPER_OFFSET) as usize];
        self.file.read_exact_at(&mut block, SUPER_OFFSET)?;
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &((ROOT_OFFSET / SLOT) as u16).to_le_bytes());
        put(16, &inodes.to_le_bytes());
        put(36, &blocks.to_le_bytes());
        put(48, &self.uuid);
        if self.chunked {
            put(80, &INCOMPAT_CHUNKED_FILE.to_le_bytes());
        }
        // It covers the rest of the first block, with itself as zero.
        let checksum = crc32c(!0, &block);
        block[4..8].copy_from_slice(&checksum.to_le_bytes());
        self.file.write_all_at(&block, SUPER_OFFSET)?;
        Ok(())
    }

    // Files ------------------------------------------------------------------------------------

    fn number(&mut self, at: u64, kind: Kind) -> Inode {
        let index = self.nids.len();
        let nid = at / SLOT;
        self.nids.push(nid);
        Inode { nid, kind, index }
    }

    /// Adds an inode whose data lie in one piece from block `start` on, but for `tail`, less than a block.
    fn flat(
        &mut self,
        metadata: &Metadata,
        kind: Kind,
        size_bytes: u64,
        start: Option<u32>,
        tail: &[u8],
    ) -> Result<Inode, WriteError> {
        let xattrs = encode_xattrs(&metadata.xattrs)?;
        let head_len = EXTENDED_INODE + xattrs.len() as u64;
        let len = head_len + tail.len() as u64;
        let left = BLOCK - self.run.used.next_multiple_of(SLOT as usize) as u64 % BLOCK;
        let inline =
            !tail.is_empty() && len <= BLOCK && (len <= left || (tail.len() as u64) < LONG_TAIL);
        let mut union = start.unwrap_or(0);
        if !tail.is_empty() && !inline {
            let at = self.append_blocks(tail)?;
            union = start.unwrap_or(at);
        }
        let at = self.place(if inline { len } else { head_len })?;
        let inode = self.number(at, kind);
        let head = Head {
            layout: if inline { FLAT_INLINE } else { FLAT_PLAIN },
            kind,
            size_bytes,
            union,
            links: 1,
        };
        let head = head.encode(metadata, xattrs.len(), inode.index + 1);
        self.put(at, &[&head, &xattrs, if inline { tail } else { &[] }]);
        Ok(inode)
    }

    // Room -------------------------------------------------------------------------------------

    /// Finds room for an inode and what follows it: within one block if it fits into one, else from the start of a
    /// block on, in one piece.
    fn place(&mut self, len: u64) -> Result<u64, WriteError> {
        let mut used = (self.run.used as u64).next_multiple_of(SLOT);
        if used % BLOCK + len > BLOCK {
            used = used.next_multiple_of(BLOCK);
        }
        if used + len > self.run.bytes.len() as u64 {
            self.flush_run()?;
            let size = len.next_multiple_of(BLOCK).max(RUN);
            self.run.at = self.claim(size)?;
            self.run.bytes = vec![0; size as usize];
            used = 0;
        }
        self.run.used = (used + len) as usize;
        Ok(self.run.at + used)
    }

    /// Fills room that was just found.
    fn put(&mut self, at: u64, parts: &[&[u8]]) {
        let mut from = (at - self.run.at) as usize;
        for part in parts {
            self.run.bytes[from..from + part.len()].copy_from_slice(part);
            from += part.len();
        }
    }

    /// Fills room that was found at some time.
    fn put_anywhere(&mut self, at: u64, parts: &[&[u8]]) -> Result<(), WriteError> {
        if at >= self.run.at && at < self.run.at + self.run.bytes.len() as u64 {
            self.put(at, parts);
        } else {
            self.file.write_all_at(&parts.concat(), at)?;
        }
        Ok(())
    }

    fn flush_run(&mut self) -> Result<(), WriteError> {
        let bytes = std::mem::take(&mut self.run.bytes);
        if !bytes.is_empty() {
            self.file.write_all_at(&bytes, self.run.at)?;
        }
        self.run.used = 0;
        Ok(())
    }

    /// Takes whole blocks at the end.
    fn claim(&mut self, size_bytes: u64) -> Result<u64, WriteError> {
        let at = self.end;
        let end = at.checked_add(size_bytes).ok_or(WriteError::TooLarge)?;
        if end / BLOCK >= u64::from(NULL_BLOCK) {
            return Err(WriteError::TooLarge);
        }
        self.end = end;
        Ok(at)
    }

    /// Writes data into claimed blocks; those not written stay zero.
    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), WriteError> {
        if at != self.gathered_at + self.gathered.len() as u64 || self.gathered.len() >= GATHERED {
            self.flush()?;
            self.gathered_at = at;
        }
        self.gathered.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), WriteError> {
        self.file.write_all_at(&self.gathered, self.gathered_at)?;
        let end = self.gathered_at + self.gathered.len() as u64;
        if let Some(write_out) = &mut self.write_out {
            write_out.written(&self.file, end);
        }
        self.gathered.clear();
        Ok(())
    }

    /// Writes data into blocks of their own, and gives the first one's number.
    fn append_blocks(&mut self, bytes: &[u8]) -> Result<u32, WriteError> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let at = self.claim((bytes.len() as u64).next_multiple_of(BLOCK))?;
        self.write(at, bytes)?;
        // `claim` sees that it fits.
        Ok((at / BLOCK) as u32)
    }
}

struct Plan {
    parents: Vec<usize>,
    nids: Vec<u64>,
    subdirectories: Vec<u32>,
}

/// A regular file that is being written: call [`data`](Self::data) and [`hole`](Self::hole) in order, then [`end`](Self::end).
#[derive(Debug)]
pub struct FileWriter<'a> {
    image: &'a mut Writer,
    size_bytes: u64,
    given: u64,
    /// Blocks that are filled; the rest of the file is its tail.
    full_blocks: u64,
    /// Whether zeros are holes.
    looks: bool,
    chunk_bits: u32,
    /// Where chunks lie, as block numbers, as far as they are known; files that are not looked through have one entry.
    chunks: Vec<u32>,
    /// The start of a block that is not full yet.
    block: Vec<u8>,
}

impl FileWriter<'_> {
    /// Adds bytes.
    ///
    /// # Errors
    /// The file is longer than announced, the image too large, or the host's.
    pub fn data(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        self.count(bytes.len() as u64)?;
        if !self.block.is_empty() {
            let part = (BLOCK as usize - self.block.len()).min(bytes.len());
            self.block.extend_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            if self.block.len() as u64 == BLOCK {
                let mut block = std::mem::take(&mut self.block);
                let next = (self.given - bytes.len() as u64) / BLOCK - 1;
                self.full(next, &block)?;
                block.clear();
                self.block = block;
            }
        }
        let next = (self.given - bytes.len() as u64) / BLOCK;
        let (blocks, rest) = bytes.as_chunks::<{ BLOCK as usize }>();
        for (index, block) in (next..).zip(blocks) {
            self.full(index, block)?;
        }
        self.block.extend_from_slice(rest);
        Ok(())
    }

    /// Adds zeros, which take neither time nor room in large files.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    pub fn hole(&mut self, mut len: u64) -> Result<(), WriteError> {
        const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
        let fill = (BLOCK - self.given % BLOCK) % BLOCK;
        let first = fill.min(len);
        self.data(&ZEROS[..first as usize])?;
        len -= first;
        if self.looks {
            let skipped = len / BLOCK * BLOCK;
            self.count(skipped)?;
            len -= skipped;
        }
        while len > 0 {
            let part = len.min(BLOCK);
            self.data(&ZEROS[..part as usize])?;
            len -= part;
        }
        Ok(())
    }

    /// Length of the image so far, in bytes.
    #[must_use]
    pub fn image_len_bytes(&self) -> u64 {
        self.image.end
    }

    /// Ends the file and adds its inode.
    ///
    /// # Errors
    /// Less was given than announced, an impossible attribute, the image too large, or the host's.
    pub fn end(mut self, metadata: &Metadata) -> Result<Inode, WriteError> {
        if self.given != self.size_bytes {
            return Err(self.wrong_size());
        }
        let chunks = self.chunk_count(self.full_blocks * BLOCK);
        let whole = self.chunks.len() as u64 == chunks && !self.chunks.contains(&NULL_BLOCK);
        let tail = std::mem::take(&mut self.block);
        if !self.looks || whole {
            let start = self.chunks.first().copied();
            let size = self.size_bytes;
            return self.image.flat(metadata, Kind::File, size, start, &tail);
        }
        self.chunked_tail(&tail)?;
        self.chunked(metadata)
    }

    fn count(&mut self, len: u64) -> Result<(), WriteError> {
        self.given = self.given.saturating_add(len);
        if self.given > self.size_bytes {
            return Err(self.wrong_size());
        }
        Ok(())
    }

    fn wrong_size(&self) -> WriteError {
        WriteError::Size {
            announced: self.size_bytes,
            given: self.given,
        }
    }

    fn chunk_count(&self, size_bytes: u64) -> u64 {
        size_bytes.div_ceil(1 << self.chunk_bits)
    }

    /// Takes the full block `index` of the file.
    fn full(&mut self, index: u64, block: &[u8]) -> Result<(), WriteError> {
        if !self.looks {
            let at = self.image.claim(BLOCK)?;
            if self.chunks.is_empty() {
                self.chunks.push((at / BLOCK) as u32);
            }
            return self.image.write(at, block);
        }
        if is_zero(block) {
            return Ok(());
        }
        let per_chunk = 1 << (self.chunk_bits - u32::from(BLOCK_BITS));
        let chunk = index / per_chunk;
        let start = self.chunk(chunk, (self.full_blocks - chunk * per_chunk).min(per_chunk))?;
        let at = (u64::from(start) + index % per_chunk) * BLOCK;
        self.image.write(at, block)
    }

    /// Where a chunk lies; one that has no place gets `blocks` of them.
    fn chunk(&mut self, chunk: u64, blocks: u64) -> Result<u32, WriteError> {
        if self.chunks.len() as u64 <= chunk {
            self.chunks.resize(chunk as usize + 1, NULL_BLOCK);
        }
        let start = self.chunks[chunk as usize];
        if start != NULL_BLOCK {
            return Ok(start);
        }
        let start = (self.image.claim(blocks * BLOCK)? / BLOCK) as u32;
        self.chunks[chunk as usize] = start;
        Ok(start)
    }

    /// The tail of a file with holes is a block of its last chunk, and has room there even if it is zero.
    fn chunked_tail(&mut self, tail: &[u8]) -> Result<(), WriteError> {
        let per_chunk = 1 << (self.chunk_bits - u32::from(BLOCK_BITS));
        let chunk = self.full_blocks / per_chunk;
        let within = self.full_blocks % per_chunk;
        let placed = self.chunks.get(chunk as usize).copied();
        let zero = tail.iter().all(|b| *b == 0);
        let at = match placed {
            _ if tail.is_empty() => return Ok(()),
            // The last chunk is the last thing in the image: it can grow.
            Some(start) if start != NULL_BLOCK => self.image.claim(BLOCK)?,
            _ if zero => return Ok(()),
            _ => (u64::from(self.chunk(chunk, within + 1)?) + within) * BLOCK,
        };
        if zero {
            return Ok(());
        }
        self.image.write(at, tail)
    }

    fn chunked(self, metadata: &Metadata) -> Result<Inode, WriteError> {
        let Self {
            image,
            size_bytes,
            chunk_bits,
            mut chunks,
            ..
        } = self;
        let count = size_bytes.div_ceil(1 << chunk_bits) as usize;
        chunks.resize(count, NULL_BLOCK);
        let xattrs = encode_xattrs(&metadata.xattrs)?;
        let head_len = EXTENDED_INODE + xattrs.len() as u64;
        let table: Vec<u8> = chunks.iter().flat_map(|c| c.to_le_bytes()).collect();
        let at = image.place(head_len + table.len() as u64)?;
        let inode = image.number(at, Kind::File);
        let head = Head {
            layout: CHUNK_BASED,
            kind: Kind::File,
            size_bytes,
            union: chunk_bits - u32::from(BLOCK_BITS),
            links: 1,
        };
        let head = head.encode(metadata, xattrs.len(), inode.index + 1);
        image.put(at, &[&head, &xattrs, &table]);
        image.chunked = true;
        Ok(inode)
    }
}

fn is_zero(block: &[u8]) -> bool {
    // In words, of which the compiler makes vectors.
    let (words, rest) = block.as_chunks::<16>();
    block.first() == Some(&0)
        && words.iter().all(|w| u128::from_ne_bytes(*w) == 0)
        && rest.iter().all(|b| *b == 0)
}
