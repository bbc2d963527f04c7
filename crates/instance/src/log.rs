//! What the main process said, a line of JSON each: `{"log":"text\n","stream":"stdout","time":"2026-01-02T03:04:05.000000006Z"}`, the form that
//! collectors of containers' logs read.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

/// A log that has grown so far is put aside, and the one before it is gone: twice this is all that a guest can fill.
const MAX_LOG_BYTES: u64 = 64 << 20;
/// A line that is longer is cut into several.
const MAX_LINE_BYTES: usize = 16 << 10;

/// A line, or a piece of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// The text, with its line end if it has one. Bytes that are no UTF-8 are replaced.
    pub log: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// When it was said (RFC 3339).
    pub time: String,
}

/// Where lines are written. What cannot be written is lost: a full disk is no reason to stop a guest.
pub(crate) struct LogWriter {
    path: PathBuf,
    file: Option<File>,
    size: u64,
    lost: u64,
}

impl LogWriter {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        Ok(Self {
            path: path.into(),
            file: Some(file),
            size,
            lost: 0,
        })
    }

    pub(crate) fn write(&mut self, stream: &str, text: &[u8]) {
        let entry = LogEntry {
            log: String::from_utf8_lossy(text).into_owned(),
            stream: stream.into(),
            time: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
        };
        if self.write_entry(&entry).is_err() {
            self.lost += 1;
        }
    }

    fn write_entry(&mut self, entry: &LogEntry) -> io::Result<()> {
        if self.size >= MAX_LOG_BYTES {
            fs::rename(&self.path, self.path.with_extension("1"))?;
            self.file = None;
            self.size = 0;
        }
        if self.file.is_none() {
            self.file = Some(File::options().create(true).append(true).open(&self.path)?);
        }
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        if let Some(file) = &mut self.file {
            // Whole or not at all, as far as that goes: a piece would spoil the next line.
            if let Err(e) = file.write_all(&line) {
                let _ = file.set_len(self.size);
                return Err(e);
            }
            self.size += line.len() as u64;
        }
        Ok(())
    }
}

/// Gathers bytes into lines.
pub(crate) struct Lines {
    stream: &'static str,
    begun: Vec<u8>,
}

impl Lines {
    pub(crate) fn new(stream: &'static str) -> Self {
        Self {
            stream,
            begun: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, bytes: &[u8], log: &mut LogWriter) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            for piece in piece.chunks(MAX_LINE_BYTES) {
                self.begun.extend_from_slice(piece);
                if self.begun.ends_with(b"\n") || self.begun.len() >= MAX_LINE_BYTES {
                    log.write(self.stream, &self.begun);
                    self.begun.clear();
                }
            }
        }
    }

    pub(crate) fn end(&mut self, log: &mut LogWriter) {
        if !self.begun.is_empty() {
            log.write(self.stream, &self.begun);
            self.begun.clear();
        }
    }
}

/// Reads what was said, the older log first, and then what is still being said.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    current: Option<BufReader<File>>,
    /// A line that is not whole yet.
    begun: String,
}

impl LogReader {
    /// Reads the log at this path. One that is not there is empty.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let older = path.with_extension("1");
        let first = File::open(older).or_else(|_| File::open(path)).ok();
        Self {
            path: path.into(),
            current: first.map(BufReader::new),
            begun: String::new(),
        }
    }

    /// The next line that is there. None: there is none now.
    ///
    /// # Errors
    ///
    /// The log cannot be read.
    pub fn next_entry(&mut self) -> io::Result<Option<LogEntry>> {
        loop {
            if self.current.is_none() {
                self.current = File::open(&self.path).ok().map(BufReader::new);
            }
            let Some(reader) = &mut self.current else {
                return Ok(None);
            };
            if reader.read_line(&mut self.begun)? > 0 && self.begun.ends_with('\n') {
                let entry = serde_json::from_str(&self.begun);
                self.begun.clear();
                // A line that a full disk spoiled is passed over.
                if let Ok(entry) = entry {
                    return Ok(Some(entry));
                }
                continue;
            }
            if self.is_newest()? {
                return Ok(None);
            }
            // It was put aside since: on with the one after it.
            self.begun.clear();
            self.current = None;
        }
    }

    fn is_newest(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let Some(reader) = &self.current else {
            return Ok(true);
        };
        let own = reader.get_ref().metadata()?;
        match fs::metadata(&self.path) {
            Ok(newest) => Ok(newest.ino() == own.ino()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(reader: &mut LogReader) -> Vec<(String, String)> {
        let next = || reader.next_entry().unwrap();
        std::iter::from_fn(next)
            .map(|e| (e.stream, e.log))
            .collect()
    }

    #[test]
    fn lines_come_back_as_they_were_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogWriter::open(&path).unwrap();
        let mut reader = LogReader::open(&path);
        let (mut out, mut err) = (Lines::new("stdout"), Lines::new("stderr"));
        out.add(b"one\ntw", &mut log);
        err.add(b"bad \xff\n", &mut log);
        out.add(b"o\nrest", &mut log);
        let pair = |stream: &str, text: &str| (stream.to_owned(), text.to_owned());
        let expected = [
            pair("stdout", "one\n"),
            pair("stderr", "bad \u{fffd}\n"),
            pair("stdout", "two\n"),
        ];
        assert_eq!(all(&mut reader), expected);
        out.end(&mut log);
        assert_eq!(all(&mut reader), [pair("stdout", "rest")]);
        let long = vec![b'x'; MAX_LINE_BYTES * 2 + 5];
        out.add(&long, &mut log);
        out.add(b"\n", &mut log);
        let lengths: Vec<_> = all(&mut reader).iter().map(|(_, t)| t.len()).collect();
        assert_eq!(lengths, [MAX_LINE_BYTES, MAX_LINE_BYTES, 6]);
    }

    #[test]
    fn a_reader_follows_a_log_that_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogWriter::open(&path).unwrap();
        log.write("stdout", b"a\n");
        let mut reader = LogReader::open(&path);
        assert_eq!(all(&mut reader).len(), 1);
        log.write("stdout", b"b\n");
        log.size = MAX_LOG_BYTES;
        log.write("stdout", b"c\n");
        let texts: Vec<_> = all(&mut reader).into_iter().map(|(_, t)| t).collect();
        assert_eq!(texts, ["b\n", "c\n"]);
        assert_eq!(all(&mut LogReader::open(&path)).len(), 3);
    }

    #[test]
    fn a_full_disk_loses_lines_and_nothing_else() {
        let full = Path::new("/dev/full");
        if !full.exists() {
            return;
        }
        let mut log = LogWriter::open(full).unwrap();
        log.write("stdout", b"a\n");
        assert_eq!(log.lost, 1);
    }
}
