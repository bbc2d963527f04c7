//! The file that holds saved states.

use crate::SavedState;

/// Length of the header, of the file and of each section.
pub const HEADER_BYTES: usize = 64;
/// Most sections of one file. Abused by a hostile file; a machine has one for each processor and device, and a few.
pub const MAX_SECTIONS: usize = 1024;
/// Longest file. Abused by a hostile file: it is read as a whole. 255 processors with the largest register file (AMX, 11 KiB) take
/// about 12 MiB.
pub const MAX_FILE_BYTES: usize = 64 << 20;

const MAGIC: [u8; 8] = *b"\x89ALVSNP\n";
const FORMAT: u32 = 1;
const WRITER_BYTES: usize = 24;
const KIND_BYTES: usize = 32;
const OPTIONAL: u32 = 1;
const ALIGN: usize = 8;

/// Number of the architecture that a state is of.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 1;

/// Why a file of saved states was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It begins otherwise.
    #[error(
        "it is no snapshot of this program: it does not begin as one; is it the memory file, or another program's?"
    )]
    Foreign,
    /// It ends too early, or goes on too long.
    #[error(
        "it has {have} bytes where {wanted} are needed: it was cut, or is not whole yet; copy it again"
    )]
    Length {
        /// What there is.
        have: u64,
        /// What there must be.
        wanted: u64,
    },
    /// It is larger than any snapshot.
    #[error("it has {0} bytes, more than any snapshot has ({MAX_FILE_BYTES})")]
    TooLarge(u64),
    /// A checksum does not fit.
    #[error(
        "{0} is damaged: its checksum does not fit; copy the file again, or take the snapshot again"
    )]
    Damaged(String),
    /// Written in a form that is not known.
    #[error(
        "it is written in version {found} of the form, by {writer}; this program knows up to {FORMAT}: load it with a program of that version or a later one"
    )]
    Newer {
        /// Of the file.
        found: u32,
        /// What wrote it.
        writer: String,
    },
    /// Of another processor architecture.
    #[error(
        "it is of a machine of another architecture (number {0}; this host is number {ARCHITECTURE})"
    )]
    Architecture(u32),
    /// Numbers in it that cannot be.
    #[error("{0}")]
    Impossible(String),
    /// A section that must not be left out, and that nobody took.
    #[error(
        "it has a section {kind:?}, version {version}, that this program does not know; load it with the version of the program that wrote it: {writer}"
    )]
    Leftover {
        /// The section.
        kind: String,
        /// Its version.
        version: u32,
        /// What wrote it.
        writer: String,
    },
    /// A section that is not there.
    #[error("it has no section {0:?}: it is not whole")]
    Missing(String),
}

/// What every version of this program can say of every file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Version of the form.
    pub format: u32,
    /// Program that wrote it, and its version.
    pub writer: String,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Number of sections.
    pub sections: u32,
    /// Number of the architecture.
    pub architecture: u32,
}

impl Header {
    /// Reads the header at the beginning of `bytes`, of any version of the form.
    ///
    /// # Errors
    /// It is no such file, or its header is damaged.
    pub fn read(bytes: &[u8]) -> Result<Self, FormatError> {
        let begins = bytes
            .iter()
            .zip(&MAGIC)
            .all(|(found, wanted)| found == wanted);
        if !begins || bytes.is_empty() {
            return Err(FormatError::Foreign);
        }
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(FormatError::Length {
                have: bytes.len() as u64,
                wanted: HEADER_BYTES as u64,
            });
        };
        check_sum(header, || "the header".into())?;
        Ok(Self {
            format: word(header, 8),
            file_bytes: long(header, 16),
            sections: word(header, 24),
            architecture: word(header, 28),
            writer: text(header, 32, WRITER_BYTES),
        })
    }
}

/// Saved states, and who wrote them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFile {
    /// Of the file that was read.
    pub header: Header,
    sections: Vec<(SavedState, bool)>,
}

impl StateFile {
    /// No states yet, written by `writer`: a name and a version, of which 24 bytes are kept.
    #[must_use]
    pub fn new(writer: &str) -> Self {
        Self {
            header: Header {
                format: FORMAT,
                writer: writer.to_owned(),
                file_bytes: 0,
                sections: 0,
                architecture: ARCHITECTURE,
            },
            sections: Vec::new(),
        }
    }

    /// Adds a state, which a reader must know.
    pub fn add(&mut self, state: SavedState) {
        self.sections.push((state, false));
    }

    /// Adds a state that a reader may leave out if it does not know its kind.
    pub fn add_optional(&mut self, state: SavedState) {
        self.sections.push((state, true));
    }

    /// The sections that have not been taken.
    pub fn sections(&self) -> impl Iterator<Item = &SavedState> {
        self.sections.iter().map(|(state, _)| state)
    }

    /// Takes the state of this kind out.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&mut self, kind: &str) -> Result<SavedState, FormatError> {
        self.take_if_any(kind)
            .ok_or_else(|| FormatError::Missing(kind.to_owned()))
    }

    /// Takes the state of this kind out, if there is one.
    pub fn take_if_any(&mut self, kind: &str) -> Option<SavedState> {
        let at = self
            .sections
            .iter()
            .position(|(state, _)| state.kind == kind)?;
        Some(self.sections.remove(at).0)
    }

    /// To be called when all that is known has been taken.
    ///
    /// # Errors
    /// A section is left that must not be left out.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.sections.into_iter().find(|(_, optional)| !optional) {
            None => Ok(()),
            Some((state, _)) => Err(FormatError::Leftover {
                kind: state.kind,
                version: state.version,
                writer: self.header.writer,
            }),
        }
    }

    /// The bytes of the file.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        for (state, optional) in &self.sections {
            let mut header = [0; HEADER_BYTES];
            put(&mut header, 0, truncated(&state.kind, KIND_BYTES));
            put(&mut header, 32, &state.version.to_le_bytes());
            let flags = if *optional { OPTIONAL } else { 0 };
            put(&mut header, 36, &flags.to_le_bytes());
            put(&mut header, 40, &(state.bytes.len() as u64).to_le_bytes());
            put(
                &mut header,
                48,
                &crc32fast::hash(&state.bytes).to_le_bytes(),
            );
            sign(&mut header);
            bytes.extend_from_slice(&header);
            bytes.extend_from_slice(&state.bytes);
            bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        }
        let mut header = [0; HEADER_BYTES];
        put(&mut header, 0, &MAGIC);
        put(&mut header, 8, &FORMAT.to_le_bytes());
        put(&mut header, 12, &64u32.to_le_bytes());
        put(&mut header, 16, &(bytes.len() as u64).to_le_bytes());
        let count = u32::try_from(self.sections.len()).unwrap_or(u32::MAX);
        put(&mut header, 24, &count.to_le_bytes());
        put(&mut header, 28, &ARCHITECTURE.to_le_bytes());
        put(
            &mut header,
            32,
            truncated(&self.header.writer, WRITER_BYTES),
        );
        sign(&mut header);
        for (place, byte) in bytes.iter_mut().zip(header) {
            *place = byte;
        }
        bytes
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// It is no such file, damaged, newer, or of another architecture: what and what to do.
    pub fn read(bytes: &[u8]) -> Result<Self, FormatError> {
        let header = Header::read(bytes)?;
        if bytes.len() > MAX_FILE_BYTES {
            return Err(FormatError::TooLarge(bytes.len() as u64));
        }
        if header.format != FORMAT {
            return Err(FormatError::Newer {
                found: header.format,
                writer: header.writer,
            });
        }
        if header.architecture != ARCHITECTURE {
            return Err(FormatError::Architecture(header.architecture));
        }
        if header.file_bytes != bytes.len() as u64 {
            return Err(FormatError::Length {
                have: bytes.len() as u64,
                wanted: header.file_bytes,
            });
        }
        if header.sections as usize > MAX_SECTIONS {
            return Err(FormatError::Impossible(format!(
                "it has {} sections, more than any snapshot ({MAX_SECTIONS})",
                header.sections
            )));
        }
        let mut sections: Vec<(SavedState, bool)> = Vec::new();
        let mut rest = bytes.get(HEADER_BYTES..).unwrap_or_default();
        for index in 0..header.sections {
            let (state, optional, after) = section(rest, index)?;
            if sections.iter().any(|(known, _)| known.kind == state.kind) {
                return Err(FormatError::Impossible(format!(
                    "it has two sections {:?}",
                    state.kind
                )));
            }
            sections.push((state, optional));
            rest = after;
        }
        if !rest.is_empty() {
            return Err(FormatError::Impossible(format!(
                "{} bytes follow its last section",
                rest.len()
            )));
        }
        Ok(Self { header, sections })
    }
}

/// The first section of `bytes`, whether it may be left out, and what follows.
fn section(bytes: &[u8], index: u32) -> Result<(SavedState, bool, &[u8]), FormatError> {
    let cut = |wanted: u64| FormatError::Length {
        have: bytes.len() as u64,
        wanted,
    };
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(cut(HEADER_BYTES as u64));
    };
    check_sum(header, || format!("the header of section {index}"))?;
    let kind = bytes_at::<KIND_BYTES>(header, 0);
    let Ok(kind) = str::from_utf8(&kind) else {
        return Err(FormatError::Impossible(format!(
            "the kind of section {index} is no text"
        )));
    };
    let kind = kind.trim_end_matches('\0').to_owned();
    let flags = word(header, 36);
    if flags & !OPTIONAL != 0 {
        return Err(FormatError::Impossible(format!(
            "section {kind:?} has flags {flags:#x}, which this program does not know"
        )));
    }
    let length = long(header, 40);
    let whole = usize::try_from(length)
        .ok()
        .and_then(|l| rest.split_at_checked(l));
    let Some((payload, rest)) = whole else {
        return Err(cut(length));
    };
    if crc32fast::hash(payload) != word(header, 48) {
        return Err(FormatError::Damaged(format!("section {kind:?}")));
    }
    let padding = payload
        .len()
        .next_multiple_of(ALIGN)
        .saturating_sub(payload.len());
    let Some((padding, rest)) = rest.split_at_checked(padding) else {
        return Err(cut(length));
    };
    if padding.iter().any(|byte| *byte != 0) {
        return Err(FormatError::Damaged(format!(
            "what follows section {kind:?}"
        )));
    }
    let state = SavedState {
        kind,
        version: word(header, 32),
        bytes: payload.to_vec(),
    };
    Ok((state, flags & OPTIONAL != 0, rest))
}

fn put(header: &mut [u8; HEADER_BYTES], at: usize, bytes: &[u8]) {
    for (place, byte) in header.iter_mut().skip(at).zip(bytes) {
        *place = *byte;
    }
}

/// Sets the checksum at the end.
fn sign(header: &mut [u8; HEADER_BYTES]) {
    let sum = sum_of(header).to_le_bytes();
    put(header, 60, &sum);
}

fn sum_of(header: &[u8; HEADER_BYTES]) -> u32 {
    crc32fast::hash(header.get(..60).unwrap_or_default())
}

fn check_sum(
    header: &[u8; HEADER_BYTES],
    name: impl FnOnce() -> String,
) -> Result<(), FormatError> {
    match sum_of(header) == word(header, 60) {
        true => Ok(()),
        false => Err(FormatError::Damaged(name())),
    }
}

fn bytes_at<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    for (place, byte) in bytes.iter_mut().zip(header.iter().skip(at)) {
        *place = *byte;
    }
    bytes
}

fn word(header: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(header, at))
}

fn long(header: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(header, at))
}

fn text(header: &[u8; HEADER_BYTES], at: usize, len: usize) -> String {
    let bytes: Vec<u8> = header.iter().skip(at).take(len).copied().collect();
    String::from_utf8_lossy(&bytes)
        .trim_end_matches('\0')
        .to_owned()
}

/// As many whole characters as fit.
fn truncated(text: &str, bytes: usize) -> &[u8] {
    let end = (0..=bytes.min(text.len()))
        .rev()
        .find(|at| text.is_char_boundary(*at));
    text.as_bytes().get(..end.unwrap_or(0)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> StateFile {
        let mut file = StateFile::new("alveole-vmm 9.9.9");
        file.add(SavedState::pack("one", 3, &[1, 2, 3]));
        file.add_optional(SavedState::pack("hint", 1, &"x"));
        file.add(SavedState {
            kind: "raw".into(),
            version: 7,
            bytes: vec![0; 4097],
        });
        file
    }

    #[test]
    fn what_was_written_is_read() {
        let mut read = StateFile::read(&sample().to_bytes()).unwrap();
        assert_eq!(read.header.writer, "alveole-vmm 9.9.9");
        assert_eq!(read.header.sections, 3);
        assert_eq!(read.take("raw").unwrap().bytes.len(), 4097);
        let one: [u32; 3] = read.take("one").unwrap().unpack("one", 3).unwrap();
        assert_eq!(one, [1, 2, 3]);
        assert_eq!(read.take("one"), Err(FormatError::Missing("one".into())));
        read.finish().unwrap();
    }

    #[test]
    fn a_section_that_nobody_took_is_refused() {
        let mut read = StateFile::read(&sample().to_bytes()).unwrap();
        read.take("one").unwrap();
        let e = read.finish().unwrap_err().to_string();
        assert!(
            e.contains("\"raw\", version 7") && e.contains("alveole-vmm 9.9.9"),
            "{e}"
        );
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let good = sample().to_bytes();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(StateFile::read(&bad).is_err(), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn every_cut_is_found() {
        let good = sample().to_bytes();
        for len in 0..good.len() {
            assert!(StateFile::read(&good[..len]).is_err(), "{len} bytes");
        }
        let longer = [good, vec![0]].concat();
        assert!(StateFile::read(&longer).is_err());
    }

    #[test]
    fn a_newer_file_is_told_with_its_writer() {
        let mut bytes = sample().to_bytes();
        bytes[8] = 2;
        let mut header: [u8; HEADER_BYTES] = bytes[..HEADER_BYTES].try_into().unwrap();
        sign(&mut header);
        bytes[..HEADER_BYTES].copy_from_slice(&header);
        assert_eq!(Header::read(&bytes).unwrap().format, 2);
        let e = StateFile::read(&bytes).unwrap_err().to_string();
        assert!(
            e.contains("version 2") && e.contains("up to 1") && e.contains("9.9.9"),
            "{e}"
        );
    }

    #[test]
    fn other_files_are_foreign() {
        for bytes in [&b""[..], b"{}", b"\x89PNG\r\n\x1a\n", &[0; 4096]] {
            assert_eq!(StateFile::read(bytes), Err(FormatError::Foreign));
        }
    }

    #[test]
    fn a_kind_that_is_no_text_is_refused() {
        let mut bytes = sample().to_bytes();
        let mut header: [u8; HEADER_BYTES] =
            bytes[HEADER_BYTES..2 * HEADER_BYTES].try_into().unwrap();
        header[0] = 0xff;
        sign(&mut header);
        bytes[HEADER_BYTES..2 * HEADER_BYTES].copy_from_slice(&header);
        let e = StateFile::read(&bytes).unwrap_err().to_string();
        assert!(e.contains("section 0 is no text"), "{e}");
    }

    #[test]
    fn long_names_are_cut_at_a_character() {
        let name = format!("{}é", "x".repeat(KIND_BYTES - 1));
        assert_eq!(truncated(&name, KIND_BYTES).len(), KIND_BYTES - 1);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(mut tail in proptest::collection::vec(any::<u8>(), 0..512), fix in any::<bool>()) {
            let mut bytes = sample().to_bytes();
            let at = 64.min(bytes.len());
            bytes.truncate(at);
            if fix && tail.len() >= HEADER_BYTES {
                let mut header: [u8; HEADER_BYTES] = tail[..HEADER_BYTES].try_into().unwrap();
                sign(&mut header);
                tail[..HEADER_BYTES].copy_from_slice(&header);
            }
            bytes.extend(tail);
            let len = bytes.len() as u64;
            let mut header: [u8; HEADER_BYTES] = bytes[..HEADER_BYTES].try_into().unwrap();
            put(&mut header, 16, &len.to_le_bytes());
            sign(&mut header);
            bytes[..HEADER_BYTES].copy_from_slice(&header);
            let _ = StateFile::read(&bytes);
        }
    }
}
